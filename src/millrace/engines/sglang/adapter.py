"""The adapter for stock SGLang."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import urlsplit

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    PartsBucket,
    ProcessGroup,
    ProcessGroupBucket,
    RankAnswers,
    SentPartsBucket,
    SharedMemoryBucket,
    TensorSpec,
    TorchStorageBucket,
)
from millrace.engines.answers import AnswerFiles, AnswerFilesPool
from millrace.engines.audit import Answers, HeldLayer, WeightSample, texts_of
from millrace.engines.http_engine import ABORT_DEADLINE, IDLE_POLL_SECONDS, MEMORY_DEADLINE
from millrace.engines.sglang.channel import Orders
from millrace.engines.sglang.facts import SGLangFacts, read_facts
from millrace.engines.sglang.guards import check_request
from millrace.engines.sglang.loading import LOADER, MISSING_LOADER, NO_BUCKET, AnswerStore, LoaderUpdate, in_files
from millrace.engines.sglang.payload import loader_payloads, order_payloads, parts_payloads, payloads
from millrace.engines.sglang_wire import (
    PAUSE_MODES,
    decode_generate,
    decode_loads,
    distributed_body,
    encode_generate,
    group_body,
    wire_id,
)
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.images import data_url
from millrace.engines.stock.parts import NeededParts
from millrace.engines.stock.state import InvalidStateError, ServerState
from millrace.engines.stock.tensors import checksums_by_rank
from millrace.engines.versions import decode_version
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable, LocalError
from millrace.http import HttpClient
from millrace.http.hosts import is_loopback
from millrace.types import Capability, EngineInfo, EngineLoad, GenerateRequest, Generation, MemoryTag, PauseMode

IDLE_DEADLINE = 10.0  # seconds in which a rank without requests is idle
PAUSE_DEADLINE = 60.0  # seconds; it waits for the requests of other clients to end
logger = logging.getLogger(__name__)

WITHOUT_FLUSH = {"flush_cache": False, "abort_all_requests": False}  # the adapter did both before


def encode(request: GenerateRequest, *, stream: bool = False, experts: bool = False) -> Mapping[str, object]:
    """Return the body of POST /generate, with the request's images. experts: whether to ask for the routed experts."""
    body = encode_generate(request, stream=stream, experts=experts)
    if not request.images:
        return body
    return {**body, "image_data": [data_url(image) for image in request.images], "return_prompt_token_ids": True}


class SGLangEngine(StockEngine[SGLangFacts]):
    """One SGLang server."""

    _has_ordered = False  # whether the weight loader has done anything
    _session: bool | None = None  # whether the server has an update session open; None: unknown
    _by_loader: LoaderUpdate | None = None  # what the server's weight loader has done in the open update
    _files: AnswerFilesPool | None = None  # of the weight loader, if it has got buckets in memory
    _groups: Mapping[str, AnswerStore] = {}  # of the weight loader, by the name of the group
    _loads_changes: bool | None = None  # whether the weight loader can write what has changed; None: not known yet
    # The tensors that it was asked about, the parts it needs, and the group in whose store it said so.
    _needs: tuple[object, NeededParts, str | None] | None = None

    async def initialize(self, version: int | None = None) -> None:
        # /freeze_gc excludes the objects made at startup from garbage collection. On the CPU every cache flush runs the
        # collector, which takes half a second without it.
        await self._resume_server()
        await self._control("/freeze_gc", {}, repeatable=True)
        if version is None:
            await self._attach()

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        end, path = time.monotonic() + deadline, "/flush_cache"
        if (await self._facts()).caches > 1:
            # SGLang returns the answer of only one data-parallel rank. So no rank may have a request before, and each
            # waits until its last step has ended.
            while (load := await self.loads()).running_requests + load.waiting_requests:
                if time.monotonic() + IDLE_POLL_SECONDS >= end:
                    raise EngineTimeout(self.name, f"{path}: requests still ran after {deadline:.0f} s")
                await asyncio.sleep(IDLE_POLL_SECONDS)
            path += f"?timeout={IDLE_DEADLINE:.0f}"
        await self._retry_until_idle(path, {}, end - time.monotonic())

    async def leave_group(self, name: str) -> None:
        if name in self._groups:  # the weight loader leaves when the sender's store ends
            self._groups = {other: store for other, store in self._groups.items() if other != name}
            return
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def checksums(self) -> Mapping[str, str]:
        """Return SGLang's own digests of the tensors as each rank holds them, fused and sharded.

        Names begin with the rank.
        """
        async with self._control_call():
            body = await self._control("/weights_checker", {"action": "checksum"}, repeatable=True)
        return checksums_by_rank(body["ranks"])

    async def sampled_checksums(self) -> Mapping[str, str]:
        if Capability.SAMPLED_CHECKSUMS not in (await self._facts()).info.capabilities:
            raise EngineRefused(self.name, "it does not have Millrace's weight loader, which makes the checksums")
        if self.state.updating is None:
            raise EngineRefused(self.name, "no update is open; sampled checksums are of an update's tensors")
        return self._by_loader.samples if self._by_loader is not None else {}

    async def needed_parts(
        self, tensors: Sequence[TensorSpec], *, deadline: float, group: str | None = None
    ) -> NeededParts:
        info = (await self._facts()).info
        if Capability.UPDATE_FROM_PARTS not in info.capabilities:
            raise EngineRefused(self.name, "it does not have Millrace's weight loader, which takes parts of tensors")
        asked = tuple((spec.name, spec.dtype, spec.shape) for spec in tensors)
        if self._needs is None or (self._needs[0], self._needs[2]) != (asked, group):
            torn = self.state.torn
            await self.begin_update(0)  # the server takes no order outside of an update
            try:
                async with self._control_call():
                    self._needs = asked, await self._ask_needs(tensors, info.ranks, group, deadline), group
            finally:
                try:
                    await self.rollback()
                except EngineRefused:
                    if not torn:  # otherwise the weights are as they were: not whole
                        raise
        return self._needs[1]

    async def _ask_needs(
        self, tensors: Sequence[TensorSpec], ranks: int, group: str | None, deadline: float
    ) -> NeededParts:
        question = LoaderUpdate(self.name)
        if group is not None:
            store = self._groups[group]
            orders = question.questions(tensors, store.places(NO_BUCKET, deadline))
            await self._order(order_payloads(orders), deadline)
            return question.needs(await store.answers(self.name, NO_BUCKET))
        with self._answer_files(ranks) as files:
            await self._order(order_payloads(question.questions(tensors, in_files(files.answers()))), deadline)
            return question.needs(files.read())

    async def audit(
        self, samples: Sequence[WeightSample], *, deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]] | None:
        if not self._here:
            return None
        answers, question = Answers(), LoaderUpdate(self.name)
        async with self._control_call():
            with self._answer_files((await self._facts()).info.ranks) as files:
                for first, text in texts_of(samples):
                    await self._order(order_payloads(question.audits(text, in_files(files.answers()))), deadline)
                    answers.add(first, question.audited(files.read()))
        return answers.layers(), answers.unplaced()

    async def close(self) -> None:
        if self._files is not None:
            self._files.close()
        self._orders.close()
        self._files, self._groups = None, {}
        await super().close()

    async def loads(self) -> EngineLoad:
        body = await self._ask("/v1/loads")
        return self._decode("/v1/loads", lambda: decode_loads(body))

    async def info(self) -> EngineInfo:
        facts = await self._facts()
        model = await self._ask("/model_info")
        return replace(
            facts.info, model_path=model["model_path"], weight_version=decode_version(model["weight_version"])
        )

    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        experts = (await self._facts()).experts if by is self._http else None  # a router drops what asks for them
        sent = encode(request, experts=experts is not None)
        body = await by.generate("/generate", sent, deadline=deadline, headers=headers)
        return self._decode_generation("/generate", lambda: decode_generate(request, body, experts))

    async def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        experts = (await self._facts()).experts
        sent = encode(request, stream=True, experts=experts is not None)
        async for event in self._events("/generate", sent, deadline):
            made = self._decode_generation("/generate", partial(decode_generate, request, event, experts))
            yield made, event["meta_info"]["finish_reason"] is not None

    async def _detokenize(self, tokens: Sequence[int], deadline: float) -> str:
        body = {"tokens": tokens, "skip_special_tokens": False}
        answer = await self._http.generate("/v1/detokenize", body, deadline=deadline)
        return self._decode("/v1/detokenize", lambda: str(answer["text"]))

    async def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            await self._control("/abort_request", {"rid": wire_id(name)}, deadline=ABORT_DEADLINE, repeatable=True)

    async def _abort_all(self, names: Sequence[str]) -> None:  # noqa: ARG002
        await self._control("/abort_request", {"abort_all": True}, repeatable=True)

    async def _pause_server(self, mode: PauseMode) -> None:
        if mode is PauseMode.ABORT:
            # Abort first: SGLang's own pause checks only once a second whether all requests have ended.
            await self._abort_until_ended(self._calls.sent, self._abort_all)
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, deadline=PAUSE_DEADLINE, repeatable=True)

    async def _resume_server(self) -> None:
        await self._control("/continue_generation", {}, repeatable=True)

    async def _release(self, before: ServerState, after: ServerState) -> None:
        tags = sorted(after.asleep - before.asleep)
        await self._control("/release_memory_occupation", {"tags": tags}, deadline=MEMORY_DEADLINE)

    async def _reallocate(self, what: frozenset[MemoryTag]) -> None:
        # Not repeatable: allocating a tag twice kills the server.
        await self._control("/resume_memory_occupation", {"tags": sorted(what)}, deadline=MEMORY_DEADLINE)

    async def _open_update(self) -> None:
        self._by_loader = None
        if Capability.UPDATE_SESSION in (await self._facts()).info.capabilities:
            self._session = None  # unknown until the answer arrives
            await self._control("/begin_weight_update", {})
            self._session = True

    def _loader(self, bucket: Bucket, facts: SGLangFacts) -> Callable[[float], Awaitable[None]]:
        body: Mapping[str, object]
        match bucket:
            case ProcessGroupBucket(group_name=name) if name in self._groups:
                return partial(self._load_by_group, bucket, self._groups[name])
            case PartsBucket():
                return partial(self._load_parts, bucket)
            case SentPartsBucket():
                return partial(self._load_sent_parts, bucket, self._groups[bucket.group_name])
            case CudaIpcBucket() | TorchStorageBucket() if self._can_answer(bucket, facts):
                return partial(self._load_by_loader, bucket, facts.info.ranks)
            case CudaIpcBucket() | TorchStorageBucket():
                path = "/update_weights_from_tensor"
                shares = payloads(bucket, facts.info.ranks)
                body = {"serialized_named_tensors": shares, "load_format": "flattened_bucket"}
            case ProcessGroupBucket():
                path, body = "/update_weights_from_distributed", distributed_body(bucket)
            case DiskBucket():
                return partial(self._load_folder, bucket, self._holds, facts)
            case SharedMemoryBucket():
                raise InvalidStateError("it can't open a memory file; send the tensors by torch storage")

        async def send(deadline: float) -> None:
            await self._control(path, {**body, **WITHOUT_FLUSH}, deadline=deadline)

        return send

    def _can_answer(self, bucket: CudaIpcBucket | TorchStorageBucket | DiskBucket, facts: SGLangFacts) -> bool:
        """Return whether the server has the weight loader, and there are files on its host for the loader's answers."""
        return Capability.SAMPLED_CHECKSUMS in facts.info.capabilities and (bucket.answers is not None or self._here)

    async def _load_by_loader(self, bucket: CudaIpcBucket | TorchStorageBucket, ranks: int, deadline: float) -> None:
        """Have the server's weight loader load a bucket in memory, and read its answers."""
        ends = time.monotonic() + deadline
        update = self._by_loader = self._by_loader or LoaderUpdate(self.name)
        with self._answers(bucket.answers, ranks) as answers:
            await self._order_load(loader_payloads(bucket, update.orders(bucket.tensors, in_files(answers))), deadline)
            update.take(bucket.tensors, await self._read(answers, ends - time.monotonic()))

    @contextmanager
    def _answers(self, given: RankAnswers | None, ranks: int) -> Iterator[RankAnswers]:
        """Yield where the weight loader's ranks answer: the given files, or some of this process."""
        if given is not None:
            yield given
            return
        with self._answer_files(ranks) as files:
            yield files.answers()

    async def _read(self, answers: RankAnswers, deadline: float) -> Sequence[bytes]:
        """Return the answers of the weight loader's ranks. Raises EngineFailed if they can't be read."""
        try:
            return await answers.read(max(deadline, 0.001))
        except EngineError as error:
            raise EngineFailed(self.name, f"the answers of its weight loader can't be read: {error}") from error

    async def _load_folder(self, bucket: DiskBucket, holds: str, facts: SGLangFacts, deadline: float) -> None:
        """Have the server read a folder, or its weight loader write only what has changed, if it holds the version
        before. The loader then compares the parameters with the folder."""
        ends = time.monotonic() + deadline
        changes = bucket.changes if self._loads_changes else None
        if changes is not None and changes.base != holds:
            changes = None
        if changes is None:
            body = {"model_path": bucket.path, **WITHOUT_FLUSH}
            await self._control("/update_weights_from_disk", body, deadline=deadline)
        if not bucket.digest or self._loads_changes is False or not self._can_answer(bucket, facts):
            return
        update, file = LoaderUpdate(self.name), changes.path if changes is not None else None
        with self._answers(bucket.answers, facts.info.ranks) as answers:
            orders = update.orders_of_folder(bucket.path, file, in_files(answers))
            await self._order(order_payloads(orders), max(ends - time.monotonic(), 0.001))
            texts = await self._read(answers, ends - time.monotonic())
        if changes is None and (why := update.why_no_folder(texts)) is not None:
            logger.warning("engine %s reads each version whole, because %s", self.name, why)
            self._loads_changes = False
            return
        update.take_parts(texts)
        self._by_loader, self._loads_changes = update, True

    async def _load_parts(self, bucket: PartsBucket, deadline: float) -> None:
        """Have the server's weight loader load a bucket of parts in each rank, and read its answers."""
        update = self._by_loader = self._by_loader or LoaderUpdate(self.name)
        try:
            with self._answer_files(len(bucket.ranks)) as files:
                orders = update.orders_of_parts([rank.parts for rank in bucket.ranks], in_files(files.answers()))
                await self._order_load(parts_payloads(bucket.ranks, orders), deadline)
                update.take_parts(files.read())
        except BaseException:
            self._needs = None  # ask again, because the server may not remember the question
            raise

    async def _load_by_group(self, bucket: ProcessGroupBucket, store: AnswerStore, deadline: float) -> None:
        """Have the server's weight loader load a bucket that its ranks receive, and read its answers."""
        assert bucket.number is not None
        update = self._by_loader = self._by_loader or LoaderUpdate(self.name)
        places = store.places(bucket.number, deadline)
        await self._order_load(order_payloads(update.orders(bucket.tensors, places)), deadline)
        update.take(bucket.tensors, await store.answers(self.name, bucket.number))

    async def _load_sent_parts(self, bucket: SentPartsBucket, store: AnswerStore, deadline: float) -> None:
        """Have the server's weight loader load the parts that each rank receives, and read its answers."""
        update = self._by_loader = self._by_loader or LoaderUpdate(self.name)
        try:
            orders = update.orders_of_parts(bucket.parts, store.places(bucket.number, deadline))
            await self._order_load(order_payloads(orders), deadline)
            update.take_parts(await store.answers(self.name, bucket.number))
        except BaseException:
            self._needs = None  # ask again, because the server may not remember the question
            raise

    def _answer_files(self, ranks: int) -> AbstractContextManager[AnswerFiles]:
        """Return files that the weight loader's ranks write their answers to, for one order."""
        self._files = self._files or AnswerFilesPool(ranks)
        return self._files.taken()

    async def _order_load(self, shares: Sequence[str], deadline: float) -> None:
        """Send an order to load a bucket, beside which others may be under way."""
        await self._orders.send(shares, deadline)

    @asynccontextmanager
    async def _control_call(self, *, beside_loads: bool = False) -> AsyncIterator[None]:
        async with super()._control_call(beside_loads=beside_loads):
            if not beside_loads:
                self._orders.release()
            yield

    @cached_property
    def _orders(self) -> Orders:
        """What sends the orders to load a bucket."""
        return Orders(self.name, self._order, by_channel=self._here)

    @property
    def _here(self) -> bool:
        """Whether the server runs on this host."""
        return is_loopback(str(urlsplit(self.url).hostname))

    async def _order(self, shares: Sequence[str], deadline: float) -> None:
        """Send an order to the weight loader of each rank by HTTP."""
        body = {"serialized_named_tensors": shares, "load_format": LOADER, **WITHOUT_FLUSH}
        try:
            await self._control("/update_weights_from_tensor", body, deadline=deadline)
        except EngineUnreachable as error:
            if not self._attached or self._has_ordered:
                raise
            raise EngineUnreachable(self.name, MISSING_LOADER, sent=error.sent) from error
        self._has_ordered = True

    async def _commit(self, version: int) -> None:
        if self._by_loader is not None and self._by_loader.missing:
            raise InvalidStateError(self._by_loader.missing)
        ending = asyncio.create_task(self._orders.end())
        try:
            await self._end_session()
            body = {"new_version": str(version), "abort_all_requests": False}
            await self._control("/update_weight_version", body)
        finally:
            await ending

    async def _abort_update(self) -> None:
        await self._orders.end()
        try:
            await self._end_session()
        except EngineRefused:  # another client has ended the session
            self._session = False

    async def _end_session(self) -> None:
        """End the update session. Raises EngineRefused if it is known to be open, and the server has none."""
        if self._session is False:
            return
        try:
            await self._control("/end_weight_update", {})
        except EngineRefused:
            if self._session is not None:
                raise  # otherwise no session was open
        self._session = False

    async def _load_lora(self, name: str, path: str, deadline: float) -> None:
        body = await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path}, deadline=deadline)
        if (body["loaded_adapters"] or {}).get(name) != path:
            raise EngineFailed(
                self.name, f"it did not load the LoRA adapter {name} from {path}; loaded: {body['loaded_adapters']}"
            )

    async def _unload_lora(self, name: str, worker_id: int | None, deadline: float) -> None:  # noqa: ARG002
        """Unload a LoRA adapter. SGLang waits until no request uses it."""
        await self._control("/unload_lora_adapter", {"lora_name": name}, deadline=deadline)

    async def _join(self, group: ProcessGroup, deadline: float) -> None:
        if group.by_bucket:
            ranks = (await self._facts()).info.ranks
            try:
                store = await asyncio.to_thread(AnswerStore, group, ranks, deadline)
            except RuntimeError as error:  # torch's
                raise LocalError(self.name, f"the store of group {group.name} can't be reached: {error}") from error
            self._groups = {**self._groups, group.name: store}
            return
        await self._control("/init_weights_update_group", group_body(group, deadline), deadline=deadline)

    async def _probe(self, deadline: float) -> None:
        # Not /health: it generates a token, which fails while the server is paused or asleep.
        await self._http.control("GET", "/server_info", deadline=deadline)

    async def _read_facts(self) -> SGLangFacts:
        served, server = await self._ask("/model_info"), await self._ask("/server_info")
        paths = (await self._ask("/openapi.json"))["paths"]
        model = await self._read_model(Path(served["model_path"]))
        return read_facts(paths, served, server, model)

    def _check(self, request: GenerateRequest, facts: SGLangFacts) -> None:
        check_request(request, facts.limits)

    def _why_no_sleep(self) -> str:
        return "it was started without --enable-memory-saver, so it can't release memory"
