"""The sender's side of the weight loader that SGLang's processes run (`extension/millrace_sglang`)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from secrets import token_hex
from typing import Any

import orjson

from millrace.engines.stock.state import InvalidStateError
from millrace.errors import EngineFailed
from millrace.extension.millrace_boxes import Box, read_box
from millrace.extension.millrace_samples import separated
from millrace.types import ProcessGroup, TensorPart, TensorSpec

NeededParts = Sequence[Sequence[Sequence[Box]]]  # by rank and tensor, as boxes
LOADER = "millrace_sglang.load"  # as --custom-weight-loader and `load_format` name it


class AnswerFiles:
    """Files in memory, one for each rank of a server on this host. A rank opens its file by path and writes its answer
    to it."""

    def __init__(self, ranks: int) -> None:
        self._descriptors = [os.memfd_create("millrace-answer", os.MFD_CLOEXEC) for _ in range(ranks)]

    def places(self) -> list[Mapping[str, object]]:
        """Return what the order for each rank says about its answer, and forget the last answers."""
        for descriptor in self._descriptors:
            os.ftruncate(descriptor, 0)
        return [{"file": f"/proc/{os.getpid()}/fd/{descriptor}"} for descriptor in self._descriptors]

    def read(self) -> list[bytes]:
        """Return the answer of each rank; empty if there is none."""
        return [os.pread(one, os.fstat(one).st_size, 0) for one in self._descriptors]

    def close(self) -> None:
        """Free the memory."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


class AnswerStore:
    """The store of a process group, to which the ranks of a server on any host write their answers.

    group: the group. ranks: of the server. deadline: the seconds that joining it, and each bucket in it, may take.
    Raises RuntimeError if the store can't be reached.
    """

    def __init__(self, group: ProcessGroup, ranks: int, deadline: float) -> None:
        from torch.distributed import TCPStore

        self._name, self._numbers = group.name, range(group.rank_offset, group.rank_offset + ranks)
        body = {key: value for key, value in asdict(group).items() if key not in ("rank_offset", "by_bucket")}
        self._groups = [{**body, "rank": number, "seconds": deadline} for number in self._numbers]
        self._store: Any = TCPStore(
            *(group.address, group.port, group.world_size),
            is_master=False,
            timeout=timedelta(seconds=deadline),
            wait_for_workers=False,
        )

    def places(self, number: int, deadline: float) -> list[Mapping[str, object]]:
        """Return what the order for each rank says about a bucket that comes by the group, under this number."""
        return [{"group": group, "number": number, "seconds": deadline} for group in self._groups]

    def read(self, number: int) -> list[bytes]:
        """Take each rank's answer about a bucket; empty if there is none. Raises RuntimeError if the store is gone."""
        return [self._take(f"{self._name}/answer/{number}/{rank}") for rank in self._numbers]

    def _take(self, key: str) -> bytes:
        if not self._store.check([key]):
            return b""
        answer: bytes = self._store.get(key)
        self._store.delete_key(key)
        return answer


@dataclass(slots=True)
class LoaderUpdate:
    """What a server's loader has answered in one update.

    engine: its name. samples: the sampled checksums of the tensors that arrived, by name. missing: what to say about
    parameters that have no content of this update yet; empty if all have.
    """

    engine: str
    name: str = field(default_factory=lambda: token_hex(8))
    samples: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    def orders(self, tensors: Sequence[TensorSpec], places: Sequence[Mapping[str, object]]) -> list[str]:
        """Return the order for the loader of each rank to load a bucket, as JSON. places: where it answers, and by what
        it receives."""
        layout = orjson.dumps([[spec.name, spec.dtype, spec.shape, spec.offset] for spec in tensors]).decode()
        return self._orders([layout] * len(places), places)

    def questions(self, tensors: Sequence[TensorSpec], places: Sequence[Mapping[str, object]]) -> list[str]:
        """Like `orders`, but each rank answers which parts of these tensors it needs."""
        needs = orjson.dumps({"needs": [[spec.name, spec.dtype, spec.shape] for spec in tensors]}).decode()
        return self._orders([needs] * len(places), places)

    def audits(self, samples: str, places: Sequence[Mapping[str, object]]) -> list[str]:
        """Like `orders`, but each rank compares what it holds with samples of the trainer's weights, given as JSON."""
        return self._orders([samples] * len(places), places)

    def orders_of_parts(
        self, parts: Sequence[Sequence[TensorPart]], places: Sequence[Mapping[str, object]]
    ) -> list[str]:
        """Like `orders`, but each rank loads a bucket of its own, with these parts."""
        rows = ([[part.name, part.dtype, part.box, part.offset] for part in of_rank] for of_rank in parts)
        return self._orders([orjson.dumps({"parts": of_rank}).decode() for of_rank in rows], places)

    def _orders(self, layouts: Sequence[str], places: Sequence[Mapping[str, object]]) -> list[str]:
        return [
            orjson.dumps({"update": self.name, "layout": layout, **place}).decode()
            for layout, place in zip(layouts, places, strict=True)
        ]

    def take(self, tensors: Sequence[TensorSpec], answers: Sequence[bytes]) -> None:
        """Take the answers of all ranks to the order for these tensors.

        Raises EngineFailed if a rank has not answered or holds other content than it was sent, and InvalidStateError if
        it could not load the bucket.
        """
        self.missing = ""
        received: list[list[str]] = []
        for rank, text in enumerate(answers):
            received.append(separated(self._answer(rank, text)["samples"]))
        for spec, *samples_of in zip(tensors, *received, strict=True):
            if len(set(samples_of)) > 1:
                raise EngineFailed(self.engine, f"its ranks received different values of {spec.name}")
            self.samples[spec.name] = samples_of[0]

    def take_parts(self, answers: Sequence[bytes]) -> None:
        """Take the answers of all ranks to an order for parts. Raises as `take` does."""
        self.missing = ""
        for rank, text in enumerate(answers):
            for name, value in self._answer(rank, text)["samples"].items():
                if self.samples.setdefault(name, value) != value:
                    raise EngineFailed(self.engine, f"its ranks received different values of {name}")

    def needs(self, answers: Sequence[bytes]) -> NeededParts:
        """Return what all ranks have answered to `questions`.

        Raises EngineFailed if a rank has not answered, and InvalidStateError if it can't say which parts it needs.
        """
        needed = []
        for rank, text in enumerate(answers):
            answer = self._answer(rank, text)
            if why := answer.get("unplanned"):
                raise InvalidStateError(f"its rank {rank} can't say which parts of the tensors it needs: {why}")
            needed.append([[read_box(box) for box in boxes] for boxes in answer["boxes"]])
        return needed

    def audited(self, answers: Sequence[bytes]) -> list[Mapping[str, Any]]:
        """Return what all ranks have answered to `audits`. Raises as `take` does."""
        found = [self._answer(rank, text) for rank, text in enumerate(answers)]
        for rank, answer in enumerate(found):
            if why := answer.get("unplanned"):
                raise InvalidStateError(f"its rank {rank} can't say where it keeps the tensors: {why}")
        return found

    def _answer(self, rank: int, text: bytes) -> Mapping[str, Any]:
        """Return the answer of a rank, and note which parameters lack content."""
        if not text:
            raise EngineFailed(self.engine, f"the weight loader of its rank {rank} has not answered; see its log")
        answer: Mapping[str, Any] = orjson.loads(text)
        if "error" in answer:
            raise InvalidStateError(f"its rank {rank} could not load the tensors: {answer['error']}")
        if answer.get("missing"):
            names = ", ".join(answer["such as"])
            self.missing = f"{answer['missing']} of its parameters lack content of this version, such as {names}"
        return answer
