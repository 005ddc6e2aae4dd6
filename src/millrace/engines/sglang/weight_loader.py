"""What the weight loader of an SGLang server (`extension/millrace_sglang`) is asked, and what it has answered."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from millrace.buckets import (
    Bucket,
    Changes,
    CudaIpcBucket,
    DiskBucket,
    PartsBucket,
    ProcessGroup,
    ProcessGroupBucket,
    RankAnswers,
    SentPartsBucket,
    TensorSpec,
    TorchStorageBucket,
)
from millrace.engines.answers import AnswerFiles, AnswerFilesPool
from millrace.engines.audit import Answers, HeldLayer, WeightSample, texts_of
from millrace.engines.sglang.channel import Order, Orders
from millrace.engines.sglang.loading import NO_BUCKET, AnswerStore, LoaderUpdate, in_files
from millrace.engines.sglang.payload import loader_payloads, order_payloads, parts_payloads
from millrace.engines.stock.parts import NeededParts
from millrace.errors import EngineError, EngineFailed, LocalError

Load = Callable[[float], Awaitable[None]]  # loads a bucket within a deadline in seconds
logger = logging.getLogger(__name__)


class WeightLoader:
    """The weight loader in all ranks of one server.

    name: the server's. order: sends an order to each rank by HTTP. here: whether the server runs on this host.
    orders: what sends the orders to load a bucket.
    """

    def __init__(self, name: str, order: Order, *, here: bool) -> None:
        self.orders = Orders(name, order, by_channel=here)
        self._name, self._order, self._here = name, order, here
        self._update: LoaderUpdate | None = None  # what it has done in the open update
        self._files: AnswerFilesPool | None = None  # for answers, if it has got orders on this host
        self._groups: dict[str, AnswerStore] = {}  # by the name of the group
        self._loads_changes: bool | None = None  # whether it can write what has changed; None: not known yet
        # The tensors that it was asked about, the parts it needs, and the group in whose store it said so.
        self._needs: tuple[object, NeededParts, str | None] | None = None

    def begin(self) -> None:
        """Forget the last update."""
        self._update = None

    @property
    def samples(self) -> Mapping[str, str]:
        """The sampled checksums of the tensors in the open update, by name."""
        return self._update.samples if self._update is not None else {}

    @property
    def missing(self) -> str:
        """What to say about parameters that have no content of the open update yet; empty if all have."""
        return self._update.missing if self._update is not None else ""

    def loading(self, bucket: Bucket, ranks: int) -> Load | None:
        """Return a function that has it load a bucket; None for a bucket that SGLang loads itself."""
        match bucket:
            case ProcessGroupBucket(group_name=name) if name in self._groups:
                return partial(self._load_by_group, bucket, self._groups[name])
            case PartsBucket():
                return partial(self._load_parts, bucket)
            case SentPartsBucket():
                return partial(self._load_sent_parts, bucket, self._groups[bucket.group_name])
            case CudaIpcBucket() | TorchStorageBucket() if self._can_answer(bucket):
                return partial(self._load, bucket, ranks)
        return None

    def known_needs(self, tensors: Sequence[TensorSpec], group: str | None) -> NeededParts | None:
        """Return the answer to the last question, if that was the same."""
        if self._needs is None or (self._needs[0], self._needs[2]) != (_asked(tensors), group):
            return None
        return self._needs[1]

    async def ask_needs(
        self, tensors: Sequence[TensorSpec], ranks: int, group: str | None, deadline: float
    ) -> NeededParts:
        """Ask the ranks which parts of the tensors they need. group: in whose store they answer; None: in files."""
        question = LoaderUpdate(self._name)
        if group is not None:
            store = self._groups[group]
            await self._order(order_payloads(question.questions(tensors, store.places(NO_BUCKET, deadline))), deadline)
            needs = question.needs(await store.answers(self._name, NO_BUCKET))
        else:
            with self._answer_files(ranks) as files:
                await self._order(order_payloads(question.questions(tensors, in_files(files.answers()))), deadline)
                needs = question.needs(files.read())
        self._needs = _asked(tensors), needs, group
        return needs

    async def audit(
        self, samples: Sequence[WeightSample], ranks: int, deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]]:
        """Return what `Engine.audit` does."""
        answers, question = Answers(), LoaderUpdate(self._name)
        with self._answer_files(ranks) as files:
            for first, text in texts_of(samples):
                await self._order(order_payloads(question.audits(text, in_files(files.answers()))), deadline)
                answers.add(first, question.audited(files.read()))
        return answers.layers(), answers.unplaced()

    async def join(self, group: ProcessGroup, ranks: int, deadline: float) -> None:
        """Connect to the store of a group. The ranks join it with the first bucket."""
        try:
            self._groups[group.name] = await asyncio.to_thread(AnswerStore, group, ranks, deadline)
        except RuntimeError as error:  # torch's
            raise LocalError(self._name, f"the store of group {group.name} can't be reached: {error}") from error

    def leave(self, name: str) -> bool:
        """Forget a group, and return whether it was known. The ranks leave it when the sender's store ends."""
        return self._groups.pop(name, None) is not None

    def changes(self, bucket: DiskBucket) -> Changes | None:
        """Return what to write instead of the whole folder; None if SGLang must read the folder."""
        return bucket.changes if self._loads_changes else None

    async def compare_folder(self, bucket: DiskBucket, changes: Changes | None, ranks: int, deadline: float) -> None:
        """Have the ranks write the changes, if there are some, and compare their parameters with the folder. Does
        nothing if they can't."""
        if not bucket.digest or self._loads_changes is False or not self._can_answer(bucket):
            return
        ends, update = time.monotonic() + deadline, LoaderUpdate(self._name)
        with self._answers(bucket.answers, ranks) as answers:
            orders = update.orders_of_folder(bucket.path, None if changes is None else changes.path, in_files(answers))
            await self._order(order_payloads(orders), max(ends - time.monotonic(), 0.001))
            texts = await self._read(answers, ends - time.monotonic())
        if changes is None and (why := update.why_no_folder(texts)) is not None:
            logger.warning("engine %s reads each version whole, because %s", self._name, why)
            self._loads_changes = False
            return
        update.take_parts(texts)
        self._update, self._loads_changes = update, True

    def close(self) -> None:
        """Free the memory, and let the server go."""
        if self._files is not None:
            self._files.close()
        self.orders.close()
        self._files = None
        self._groups.clear()

    def _can_answer(self, bucket: CudaIpcBucket | TorchStorageBucket | DiskBucket) -> bool:
        """Return whether there are files on the server's host for the answers."""
        return bucket.answers is not None or self._here

    def _opened(self) -> LoaderUpdate:
        self._update = self._update or LoaderUpdate(self._name)
        return self._update

    async def _load(self, bucket: CudaIpcBucket | TorchStorageBucket, ranks: int, deadline: float) -> None:
        """Have the ranks load a bucket in memory."""
        ends, update = time.monotonic() + deadline, self._opened()
        with self._answers(bucket.answers, ranks) as answers:
            orders = update.orders(bucket.tensors, in_files(answers))
            await self.orders.send(loader_payloads(bucket, orders), deadline)
            update.take(bucket.tensors, await self._read(answers, ends - time.monotonic()))

    async def _load_parts(self, bucket: PartsBucket, deadline: float) -> None:
        """Have each rank load a bucket of parts of its own."""
        update = self._opened()
        with self._asking_again(), self._answer_files(len(bucket.ranks)) as files:
            orders = update.orders_of_parts([rank.parts for rank in bucket.ranks], in_files(files.answers()))
            await self.orders.send(parts_payloads(bucket.ranks, orders), deadline)
            update.take_parts(files.read())

    async def _load_by_group(self, bucket: ProcessGroupBucket, store: AnswerStore, deadline: float) -> None:
        """Have the ranks load a bucket that they receive."""
        assert bucket.number is not None
        update = self._opened()
        orders = update.orders(bucket.tensors, store.places(bucket.number, deadline))
        await self.orders.send(order_payloads(orders), deadline)
        update.take(bucket.tensors, await store.answers(self._name, bucket.number))

    async def _load_sent_parts(self, bucket: SentPartsBucket, store: AnswerStore, deadline: float) -> None:
        """Have each rank load the parts that it receives."""
        update = self._opened()
        with self._asking_again():
            orders = update.orders_of_parts(bucket.parts, store.places(bucket.number, deadline))
            await self.orders.send(order_payloads(orders), deadline)
            update.take_parts(await store.answers(self._name, bucket.number))

    @contextmanager
    def _asking_again(self) -> Iterator[None]:
        """Forget the needed parts if the block raises, because the ranks may not remember the question."""
        try:
            yield
        except BaseException:
            self._needs = None
            raise

    @contextmanager
    def _answers(self, given: RankAnswers | None, ranks: int) -> Iterator[RankAnswers]:
        """Yield where the ranks answer: the given files, or some of this process."""
        if given is not None:
            yield given
            return
        with self._answer_files(ranks) as files:
            yield files.answers()

    async def _read(self, answers: RankAnswers, deadline: float) -> Sequence[bytes]:
        """Return the ranks' answers. Raises EngineFailed if they can't be read."""
        try:
            return await answers.read(max(deadline, 0.001))
        except EngineError as error:
            raise EngineFailed(self._name, f"the answers of its weight loader can't be read: {error}") from error

    def _answer_files(self, ranks: int) -> AbstractContextManager[AnswerFiles]:
        """Return files that the ranks write their answers to, for one order."""
        self._files = self._files or AnswerFilesPool(ranks)
        return self._files.taken()


def _asked(tensors: Sequence[TensorSpec]) -> object:
    return tuple((spec.name, spec.dtype, spec.shape) for spec in tensors)
