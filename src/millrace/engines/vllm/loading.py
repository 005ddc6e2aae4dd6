"""What a vLLM server's extension (`extension/millrace_vllm`) is asked in an update, and what it has answered."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from millrace.buckets import Bucket, TensorSpec
from millrace.engines.stock.parts import NeededParts, needs_of
from millrace.engines.vllm.payload import AnyParts, description, parts, rows_of, samples_of, samples_of_parts

logger = logging.getLogger(__name__)


class ExtensionLoader:
    """Loads buckets by the extension.

    name: the server's.
    rpc: calls a method of the extension on every rank, with arguments and a deadline, and returns the answers. decode:
        the adapter's `_decode`.
    samples: the sampled checksums of the tensors in the open update, by name.
    """

    def __init__(
        self, name: str, rpc: Callable[..., Awaitable[Any]], decode: Callable[[str, Callable[[], Any]], Any]
    ) -> None:
        self.samples: dict[str, str] = {}
        self._name = name
        self._said = ""  # why it has read something whole although it got the changes
        self._rpc, self._decode = rpc, decode
        self._to_open = False  # whether the next bucket opens the update in the extension
        self._opening = asyncio.Lock()  # held while the first bucket opens it
        self._needs: tuple[object, NeededParts] | None = None  # what it was asked about, and the parts that it needs

    def open(self) -> None:
        """Have the next bucket open an update, which saves a call."""
        self.samples, self._to_open = {}, True

    async def needs(self, tensors: Sequence[TensorSpec], deadline: float) -> NeededParts:
        """Return which parts of the tensors the ranks need. Asks them, unless the last question was the same."""
        asked = tuple((spec.name, spec.dtype, spec.shape) for spec in tensors)
        if self._needs is None or self._needs[0] != asked:
            answers = await self._rpc("millrace_needs", orjson.dumps(rows_of(tensors)).decode(), deadline=deadline)
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
            return await self._rpc(method, *texts, deadline=deadline)

        async with self._opening:  # no other bucket may overtake the first one
            if self._to_open:
                self._to_open = False
                return await call(begin=True)
        return await call(begin=False)
