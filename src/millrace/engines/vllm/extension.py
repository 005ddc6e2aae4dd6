"""Millrace's extension in the workers of a vLLM server (`extension/millrace_vllm`), as the adapter calls it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import orjson

from millrace.buckets import Bucket, ProcessGroup, TensorSpec
from millrace.engines.audit import Answers, HeldLayer, WeightSample, texts_of
from millrace.engines.http_engine import CONTROL_DEADLINE
from millrace.engines.stock.parts import NeededParts, needs_of
from millrace.engines.vllm.payload import AnyParts, description, parts, rows_of, samples_of, samples_of_parts
from millrace.errors import EngineFailed, EngineRefused

RPC_PATH = "/collective_rpc?every_rank=true"  # see `millrace_vllm_keys`

logger = logging.getLogger(__name__)


class Extension:
    """Calls the extension of one server, and loads buckets by it.

    name: the server's. control, decode: the adapter's `_control` and `_decode`. ranks: returns how many ranks it has.
    samples: the sampled checksums of the tensors in the open update, by name.
    """

    def __init__(
        self,
        name: str,
        control: Callable[..., Awaitable[Any]],
        decode: Callable[[str, Callable[[], Any]], Any],
        ranks: Callable[[], Awaitable[int]],
    ) -> None:
        self.samples: dict[str, str] = {}
        self._name, self._control, self._decode, self._ranks = name, control, decode, ranks
        self._said = ""  # why it has read something whole although it got the changes
        self._to_open = False  # whether the next bucket opens the update in the extension
        self._opening = asyncio.Lock()  # held while the first bucket opens it
        self._needs: tuple[object, NeededParts] | None = None  # what it was asked about, and the parts that it needs

    async def call(self, method: str, *arguments: str, deadline: float = CONTROL_DEADLINE) -> Any:
        """Call a method on every rank. Return the answers. Raises EngineFailed if a rank fails."""
        results = await self._call(method, *arguments, deadline=deadline)
        for rank, result in enumerate(results):
            if error := result.get("error"):
                raise EngineFailed(self._name, f"rank {rank}: {error}")
        if len(results) != (ranks := await self._ranks()):
            raise EngineFailed(self._name, f"{method}: {len(results)} of its {ranks} ranks have answered")
        return results

    async def answering(self) -> int:
        """Return how many ranks answer."""
        return len(await self._call("millrace_state"))

    async def _call(self, method: str, *arguments: str, deadline: float = CONTROL_DEADLINE) -> Any:
        body = {"method": method, "args": arguments}
        return (await self._control(RPC_PATH, body, deadline=deadline))["results"]

    async def slots(self) -> list[int | None]:
        """Return the id of the LoRA adapter in each slot; None for an empty one."""
        slots: list[int | None] = (await self.call("millrace_slots"))[0]["slots"]
        return slots

    async def join(self, group: ProcessGroup, deadline: float) -> None:
        """Join a process group. Raises EngineRefused if it is not one for whole buckets."""
        if not group.by_bucket:
            raise EngineRefused(self._name, "its extension takes whole buckets by a process group (`by_bucket`)")
        text = orjson.dumps({**asdict(group), "seconds": deadline}).decode()
        await self.call("millrace_join", text, deadline=deadline)

    async def audit(
        self, samples: Sequence[WeightSample], deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]]:
        """Compare the layers with samples of the trainer's weights. See `Engine.audit`."""
        answers = Answers()
        for first, text in texts_of(samples):
            answers.add(first, await self.call("millrace_audit", text, deadline=deadline))
        return answers.layers(), answers.unplaced()

    def open(self) -> None:
        """Have the next bucket open an update, which saves a call."""
        self.samples, self._to_open = {}, True

    async def needs(self, tensors: Sequence[TensorSpec], deadline: float) -> NeededParts:
        """Return which parts of the tensors the ranks need. Asks them, unless the last question was the same."""
        asked = tuple((spec.name, spec.dtype, spec.shape) for spec in tensors)
        if self._needs is None or self._needs[0] != asked:
            answers = await self.call("millrace_needs", orjson.dumps(rows_of(tensors)).decode(), deadline=deadline)
            self._needs = asked, self._decode("millrace_needs", lambda: needs_of(answers))
        return self._needs[1]

    def loading(self, bucket: Bucket, ranks: int) -> Callable[[float], Awaitable[None]]:
        """Return a function that has the ranks load a bucket within a deadline in seconds.

        Raises InvalidStateError for a bucket that the extension can't read.
        """
        if isinstance(bucket, AnyParts):
            return partial(self._load_parts, bucket, *parts(bucket, ranks))
        return partial(self._load, *description(bucket, ranks))

    async def _load(self, place: Mapping[str, object], tensors: Sequence[TensorSpec], deadline: float) -> None:
        results = await self._order("millrace_load", place, [rows_of(tensors)], deadline)
        self.samples |= self._decode(
            "millrace_load", lambda: samples_of([tensor.name for tensor in tensors] or results[0]["names"], results)
        )
        if (why := next((one["whole"] for one in results if one.get("whole")), "")) and why != self._said:
            logger.info("engine %s reads whole %s", self._name, why)
            self._said = why

    async def _load_parts(
        self, bucket: AnyParts, place: Mapping[str, object], rows: Sequence[object], deadline: float
    ) -> None:
        try:
            results = await self._order("millrace_load_parts", place, rows, deadline)
        except BaseException:
            self._needs = None  # ask again, because the server may not remember the question
            raise
        self.samples |= self._decode("millrace_load_parts", lambda: samples_of_parts(bucket, results))

    async def _order(self, method: str, place: Mapping[str, object], rows: Sequence[object], deadline: float) -> Any:
        """Have the extension load a bucket, and open the update first if that is due."""
        head = {**place, "seconds": deadline}

        async def call(*, begin: bool) -> Any:
            texts = [orjson.dumps(value).decode() for value in (head | {"begin": begin}, *rows)]
            return await self.call(method, *texts, deadline=deadline)

        async with self._opening:  # no other bucket may overtake the first one
            if self._to_open:
                self._to_open = False
                return await call(begin=True)
        return await call(begin=False)
