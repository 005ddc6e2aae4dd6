"""The audit of an engine's layers: samples of the trainer's weights go to each rank, and come back compared."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import orjson

from millrace.quantisation import LayerForm

CHUNK_BYTES = 4 * 2**20  # of sampled values in one call


@dataclass(frozen=True, slots=True)
class WeightSample:
    """Elements of one of the trainer's matrices.

    name, dtype, shape: of the tensor that the engine gets for it. packed: how many weights one element of that tensor
    has. rows, columns: the places of the elements. values: of the trainer, [rows, columns] in bfloat16, as bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    values: bytes


@dataclass(frozen=True, slots=True)
class HeldLayer:
    """What an engine holds of one layer.

    layer: the engine's name of it. tensor: the name of one of the tensors that it got for the layer. form: how it holds
    the weights. error: the L2 norm of what it holds minus what the trainer has, over the norm of what the trainer has,
    both over the sampled elements; None if it can't be measured. note: why not.
    """

    layer: str
    tensor: str
    form: LayerForm
    error: float | None
    note: str = ""


def texts_of(samples: Sequence[WeightSample]) -> Iterator[tuple[int, str]]:
    """Yield the samples as JSON, in parts that are sent one by one. With each comes the number of its first sample."""
    rows: list[object] = []
    size = first = 0
    for number, one in enumerate(samples):
        values = b64encode(one.values).decode()
        rows.append([one.name, one.dtype, one.shape, one.packed, one.rows, one.columns, values])
        size += len(one.values)
        if size >= CHUNK_BYTES or number == len(samples) - 1:
            yield first, orjson.dumps({"audit": rows}).decode()
            rows, size, first = [], 0, number + 1


class Answers:
    """Collects the answers of all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[str, LayerForm, float, float, int, str]] = {}
        self._elsewhere: dict[int, int] = {}
        self._ranks = 0

    def add(self, first: int, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Add the ranks' answers to the part whose first sample has this number. Raises ValueError or KeyError if one
        is no answer."""
        self._ranks = len(ranks)
        for answer in ranks:
            for number in answer["elsewhere"]:
                self._elsewhere[first + number] = self._elsewhere.get(first + number, 0) + 1
            for layer, (tensor, dtype, bits, block, difference, norm, elements, note) in answer["layers"].items():
                form = LayerForm(dtype, bits, None if block is None else (block[0], block[1]))
                before = self._sums.get(layer, (tensor, form, 0.0, 0.0, 0, ""))
                worst = max(before[1], form, key=lambda one: one.bits)
                self._sums[layer] = (
                    *(before[0], worst, before[2] + difference, before[3] + norm, before[4] + elements),
                    before[5] or note,
                )

    def layers(self) -> list[HeldLayer]:
        """Return the layers, in the order of their names."""
        return [
            HeldLayer(layer, tensor, form, relative(difference, norm) if elements else None, note)
            for layer, (tensor, form, difference, norm, elements, note) in sorted(self._sums.items())
        ]

    def unplaced(self) -> list[int]:
        """Return the numbers of the samples of which no rank has anything that it can compare."""
        return sorted(number for number, ranks in self._elsewhere.items() if ranks == self._ranks)


def relative(difference: float, norm: float) -> float:
    """Return the error for two sums of squares."""
    return sqrt(difference / norm) if norm > 0 else (inf if difference > 0 else 0.0)
