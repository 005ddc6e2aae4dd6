"""The sender's side of the weight loader that SGLang's processes run (`extension/millrace_sglang`)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import orjson

from millrace.engines.stock.state import InvalidStateError
from millrace.errors import EngineFailed
from millrace.types import TensorPart, TensorSpec

NeededParts = Sequence[Sequence[Sequence[tuple[tuple[int, int], ...]]]]  # by rank and tensor, as boxes
LOADER = "millrace_sglang.load"  # as --custom-weight-loader and `load_format` name it


class AnswerFile:
    """A file in memory, which a rank of a server on this host opens by its path and writes its answer to."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("millrace-answer", os.MFD_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def clear(self) -> None:
        """Forget the last answer."""
        os.ftruncate(self._descriptor, 0)

    def read(self) -> bytes:
        """Return the answer; empty if there is none."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def close(self) -> None:
        """Free the memory."""
        os.close(self._descriptor)


@dataclass(slots=True)
class LoaderUpdate:
    """What a server's loader has answered in one update.

    engine: its name. ranks: how many of them answer. samples: the sampled checksums of the tensors that arrived, by
    name. missing: what to say about parameters that have no content of this update yet; empty if all have.
    """

    engine: str
    ranks: int
    files: list[AnswerFile] = field(default_factory=list)
    name: str = field(default_factory=lambda: token_hex(8))
    samples: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    def orders(self, tensors: Sequence[TensorSpec]) -> list[str]:
        """Return the order for the loader of each rank to load a bucket, as JSON, and clear the answers to the last
        one."""
        layout = orjson.dumps([[spec.name, spec.dtype, spec.shape, spec.offset] for spec in tensors]).decode()
        return self._orders([layout] * self.ranks)

    def questions(self, tensors: Sequence[TensorSpec]) -> list[str]:
        """Like `orders`, but each rank answers which parts of these tensors it needs."""
        needs = orjson.dumps({"needs": [[spec.name, spec.dtype, spec.shape] for spec in tensors]}).decode()
        return self._orders([needs] * self.ranks)

    def orders_of_parts(self, parts: Sequence[Sequence[TensorPart]]) -> list[str]:
        """Like `orders`, but each rank loads a bucket of its own, with these parts."""
        rows = ([[part.name, part.dtype, part.box, part.offset] for part in of_rank] for of_rank in parts)
        return self._orders([orjson.dumps({"parts": of_rank}).decode() for of_rank in rows])

    def _orders(self, layouts: Sequence[str]) -> list[str]:
        while len(self.files) < self.ranks:
            self.files.append(AnswerFile())
        for file in self.files:
            file.clear()
        orders = (
            {"update": self.name, "answer": file.path, "layout": layout}
            for file, layout in zip(self.files, layouts, strict=True)
        )
        return [orjson.dumps(order).decode() for order in orders]

    def take(self) -> None:
        """Read the answers to the last order.

        Raises EngineFailed if a rank has not answered or holds other content than it was sent, and InvalidStateError if
        it could not load the bucket.
        """
        self.missing = ""
        for rank, file in enumerate(self.files):
            self._take_one(rank, self._answer(rank, file))

    def needs(self) -> NeededParts:
        """Read the answers to `questions`.

        Raises EngineFailed if a rank has not answered, and InvalidStateError if it can't say which parts it needs.
        """
        needed = []
        for rank, file in enumerate(self.files):
            answer = self._answer(rank, file)
            if why := answer.get("error") or answer.get("unplanned"):
                raise InvalidStateError(f"its rank {rank} can't say which parts of the tensors it needs: {why}")
            needed.append([[box_of(box) for box in boxes] for boxes in answer["boxes"]])
        return needed

    def close(self) -> None:
        """Free the memory of the answers."""
        for file in self.files:
            file.close()
        self.files.clear()

    def _answer(self, rank: int, file: AnswerFile) -> Mapping[str, Any]:
        text = file.read()
        if not text:
            raise EngineFailed(self.engine, f"the weight loader of its rank {rank} has not answered; see its log")
        answer: Mapping[str, Any] = orjson.loads(text)
        return answer

    def _take_one(self, rank: int, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise InvalidStateError(f"its rank {rank} could not load the tensors: {answer['error']}")
        for name, value in answer["samples"].items():
            if self.samples.setdefault(name, value) != value:
                raise EngineFailed(self.engine, f"its ranks received different values of {name}")
        if answer.get("missing"):
            names = ", ".join(answer["such as"])
            self.missing = f"{answer['missing']} of its parameters lack content of this version, such as {names}"


def box_of(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return the box that a rank has written as JSON."""
    return tuple((start, end) for start, end in rows)
