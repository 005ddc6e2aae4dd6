"""The parts of tensors that the ranks of a server need. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.engines.stock.state import InvalidStateError
from millrace.extension.millrace_boxes import Box, read_box

NeededParts = Sequence[Sequence[Sequence[Box]]]  # by rank and tensor, as boxes


def needs_of(answers: Sequence[Mapping[str, Any]]) -> NeededParts:
    """Return what the ranks need, from the answer of each. Raises InvalidStateError if one can't say it."""
    for rank, answer in enumerate(answers):
        if why := answer.get("unplanned"):
            raise InvalidStateError(f"its rank {rank} can't say which parts of the tensors it needs: {why}")
    return [[[read_box(box) for box in boxes] for boxes in answer["boxes"]] for answer in answers]
