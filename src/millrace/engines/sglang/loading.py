"""The sender's side of the weight loader that SGLang's processes run (`extension/millrace_sglang`)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from secrets import token_hex
from typing import Any

import orjson

from millrace.buckets import ProcessGroup, RankAnswers, TensorPart, TensorSpec
from millrace.engines.stock.parts import NeededParts, needs_of
from millrace.engines.stock.state import InvalidStateError
from millrace.errors import EngineFailed
from millrace.extension.millrace_samples import separated

LOADER = "millrace_sglang.load"  # as --custom-weight-loader and `load_format` name it
NO_BUCKET = -1  # in place of a bucket's number
MISSING_LOADER = (
    "it ended with its first order to the weight loader; if its log says that there is no module named "
    "millrace_sglang, put the folder that has it on the server's PYTHONPATH (docs/sglang.md)"
)


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
        """Return what the order for each rank says about a bucket that comes by the group, under this number. With
        NO_BUCKET, the ranks only join and answer."""
        return [{"group": group, "number": number, "seconds": deadline} for group in self._groups]

    async def answers(self, engine: str, number: int) -> list[bytes]:
        """Return what `read` returns, without blocking. engine: its name. Raises EngineFailed if the store is gone."""
        try:
            return await asyncio.to_thread(self.read, number)
        except RuntimeError as error:  # torch's
            raise EngineFailed(engine, f"the answers of its weight loader can't be read: {error}") from error

    def read(self, number: int) -> list[bytes]:
        """Take each rank's answer about a bucket; empty if there is none. Raises RuntimeError if the store is gone."""
        return [self._take(f"{self._name}/answer/{number}/{rank}") for rank in self._numbers]

    def _take(self, key: str) -> bytes:
        if not self._store.check([key]):
            return b""
        answer: bytes = self._store.get(key)
        self._store.delete_key(key)
        return answer


def in_files(answers: RankAnswers) -> list[Mapping[str, object]]:
    """Return what the order for each rank says about its answer, if it writes that to a file."""
    return [{"file": path} for path in answers.files]


@dataclass(slots=True)
class LoaderUpdate:
    """What a server's loader has answered in one update.

    engine: its name. samples: the sampled checksums of the tensors that arrived, by name. lacking: for each rank, how
    many parameters have no content of this update yet, and names of some.
    """

    engine: str
    name: str = field(default_factory=lambda: token_hex(8))
    samples: dict[str, str] = field(default_factory=dict)
    lacking: dict[int, tuple[int, Sequence[str]]] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """What to say about parameters that have no content of this update yet; empty if all have."""
        for count, some in self.lacking.values():
            if count:
                lack = "lacks" if count == 1 else "lack"
                return f"{count} of its parameters {lack} content of this version, such as {', '.join(some)}"
        return ""

    def orders(self, tensors: Sequence[TensorSpec], places: Sequence[Mapping[str, object]]) -> list[str]:
        """Return the order for the loader of each rank to load a bucket: a line of JSON, and the layout as JSON. The
        loader knows a layout again by its text, and does not read it twice.

        places: where a rank answers, and by what it receives.
        """
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

    def orders_of_folder(self, folder: str, changes: str | None, places: Sequence[Mapping[str, object]]) -> list[str]:
        """Return the order for each rank to compare its parameters with the folder of a version. changes: the file from
        which it writes what has changed before; None after the server has read the folder."""
        text = orjson.dumps({"folder": folder} if changes is None else {"folder": folder, "changes": changes}).decode()
        return self._orders([text] * len(places), places)

    def _orders(self, layouts: Sequence[str], places: Sequence[Mapping[str, object]]) -> list[str]:
        return [
            f"{orjson.dumps({'update': self.name, **place}).decode()}\n{layout}"
            for layout, place in zip(layouts, places, strict=True)
        ]

    def take(self, tensors: Sequence[TensorSpec], answers: Sequence[bytes]) -> None:
        """Take the answers of all ranks to the order for these tensors.

        Raises EngineFailed if a rank has not answered or holds other content than it was sent, and InvalidStateError if
        it could not load the bucket.
        """
        first, *others = (self._samples_of(rank, text) for rank, text in enumerate(answers))
        names, samples = [spec.name for spec in tensors], separated(first)
        for other in others:
            for name, one, value in zip(names, samples, separated(other), strict=True) if other != first else ():
                if one != value:
                    raise EngineFailed(self.engine, f"its ranks received different values of {name}")
        self.samples.update(zip(names, samples, strict=True))

    def take_parts(self, answers: Sequence[bytes]) -> None:
        """Take the answers of all ranks to an order for parts or for a folder. Raises as `take` does."""
        for rank, text in enumerate(answers):
            for name, value in self._samples_of(rank, text).items():
                if self.samples.setdefault(name, value) != value:
                    raise EngineFailed(self.engine, f"its ranks received different values of {name}")

    def why_no_folder(self, answers: Sequence[bytes]) -> str | None:
        """Return why a rank can't compare its parameters with a folder; None if all ranks can."""
        for rank, text in enumerate(answers):
            if not text:
                return f"its rank {rank} can't write to the files for the answers of its weight loader"
            if why := orjson.loads(text).get("unplanned"):
                return f"{why}"
        return None

    def needs(self, answers: Sequence[bytes]) -> NeededParts:
        """Return what all ranks have answered to `questions`.

        Raises EngineFailed if a rank has not answered, and InvalidStateError if it can't say which parts it needs.
        """
        return needs_of([self._answer(rank, text) for rank, text in enumerate(answers)])

    def _samples_of(self, rank: int, text: bytes) -> Any:
        """Return the samples in a rank's answer, and note which parameters lack content."""
        answer = self._answer(rank, text)
        # They only become fewer, and the answers to two orders may be read in either order.
        found = answer.get("missing", 0), answer.get("such as", ())
        self.lacking[rank] = min(found, self.lacking.get(rank, found), key=lambda one: one[0])
        return answer["samples"]

    def audited(self, answers: Sequence[bytes]) -> list[Mapping[str, Any]]:
        """Return what all ranks have answered to `audits`. Raises as `take` does."""
        found = [self._answer(rank, text) for rank, text in enumerate(answers)]
        for rank, answer in enumerate(found):
            if why := answer.get("unplanned"):
                raise InvalidStateError(f"its rank {rank} can't say where it keeps the tensors: {why}")
        return found

    def _answer(self, rank: int, text: bytes) -> Mapping[str, Any]:
        """Return the answer of a rank. Raises EngineFailed if there is none, and InvalidStateError if it is an
        error."""
        if not text:
            raise EngineFailed(self.engine, f"the weight loader of its rank {rank} has not answered; see its log")
        answer: Mapping[str, Any] = orjson.loads(text)
        if "error" in answer:
            raise InvalidStateError(f"its rank {rank} could not load the tensors: {answer['error']}")
        return answer
