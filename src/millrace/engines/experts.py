"""The experts that a server routed tokens to, as its answers have them. Pure.

SGLang and vLLM return a row for each decoder layer, also for those without experts. Millrace keeps the layers with
experts, in the smallest dtype.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.types import ExpertArray, FinishReason, GenerateRequest, Generation

# A tensor of one expert, with its number, or of all experts of a layer.
TENSOR = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?experts\.(?:(\d+)\.)?")
MOST_IN_UINT8 = 256


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a model: `count` in each of the decoder layers `layers`, of `decoder_layers` in all."""

    layers: tuple[int, ...]
    decoder_layers: int
    count: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The dtype of a `Generation.routed_experts`."""
        return np.uint8 if self.count <= MOST_IN_UINT8 else np.uint16


def experts_of(shapes: Mapping[str, tuple[int, ...]], decoder_layers: int) -> Experts | None:
    """Return the experts of a model with these tensors; None if it has none.

    shapes: of the tensors by name, with one tensor for each expert, or one for all experts of a layer. Layers after
    `decoder_layers`, which predict further tokens, do not count.
    """
    layers, count = set(), 0
    for name, shape in shapes.items():
        if (found := TENSOR.search(name)) and int(found[1]) < decoder_layers:
            layers.add(int(found[1]))
            count = max(count, int(found[2]) + 1 if found[2] is not None else shape[0])
    return Experts(tuple(sorted(layers)), decoder_layers, count) if layers else None


def compacted(table: NDArray[Any], experts: Experts, *, rows: int) -> ExpertArray | None:
    """Return a server's table of experts as a `Generation.routed_experts`; None if it has no rows.

    table: integers, [rows, decoder_layers, K], or flat. Raises ValueError if it has another size, or names experts that
    the model does not have.
    """
    if not rows:
        return None
    per_row, rest = divmod(table.size, rows * experts.decoder_layers)
    if rest or not per_row:
        raise ValueError(
            f"the routed experts have {table.size} entries, and not one or more for each of {rows} tokens and "
            f"{experts.decoder_layers} layers"
        )
    kept = table.reshape(rows, experts.decoder_layers, per_row)[:, list(experts.layers)]
    if kept.min() < 0 or kept.max() >= experts.count:
        raise ValueError(f"the routed experts are {kept.min()} to {kept.max()}; the model has {experts.count}")
    return kept.astype(experts.dtype)


def asked_from(request: GenerateRequest) -> int:
    """Return the first position of which a server is asked for experts.

    With images, a server counts positions in another prompt than the request's, so it is asked for all of them.
    """
    return 0 if request.images else request.routed_experts_start


def with_experts(
    request: GenerateRequest, made: Generation, table: NDArray[Any] | None, experts: Experts
) -> Generation:
    """Return the whole answer to a request with its routed experts.

    table: as in `compacted`, from position `asked_from(request)` on. Raises ValueError if there is none, unless the
    request was aborted, and the errors of `compacted`.
    """
    start = asked_from(request)
    rows = made.prompt_tokens + len(made.output_ids) - 1 - start  # no layer has read the last token
    if table is None or not made.output_ids:
        if made.finish_reason is not FinishReason.ABORT and rows:
            raise ValueError("the answer has no routed experts")
        return made
    compact = compacted(table, experts, rows=rows)
    unwanted = request.routed_experts_start - start
    return replace(made, routed_experts=compact[unwanted:] if compact is not None and unwanted else compact)
