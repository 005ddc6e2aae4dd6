"""Checks that an update brings the model's tensors, and all of them. Pure.

The servers silently drop a tensor of unknown name, crash on a wrong shape, and mix versions if a tensor is missing.
"""

from collections.abc import Iterable, Mapping

from millrace.buckets import TensorSpec
from millrace.engines.stock.state import InvalidStateError

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(tensors: Iterable[TensorSpec], shapes: Shapes | None) -> None:
    """Raise InvalidStateError for a tensor that is not the model's. See `check_shapes`."""
    check_shapes(((tensor.name, tensor.shape) for tensor in tensors), shapes)


def check_shapes(tensors: Iterable[tuple[str, tuple[int, ...]]], shapes: Shapes | None) -> None:
    """Raise InvalidStateError for a tensor that is not the model's.

    shapes: the model's shapes. If they are None (unknown), nothing is checked.
    """
    if shapes is None:
        return
    for name, shape in tensors:
        if name not in shapes:
            raise InvalidStateError(f"the model has no tensor {name}")
        if shape != shapes[name]:
            raise InvalidStateError(f"{name} has shape {shape}; in the model it has {shapes[name]}")


def checksums_by_rank(ranks: Iterable[Mapping[str, Mapping[str, str]]]) -> Mapping[str, str]:
    """Merge the ranks' `checksums`, with each name prefixed by its rank."""
    return {f"rank{rank}:{name}": value for rank, held in enumerate(ranks) for name, value in held["checksums"].items()}


def check_whole(loaded: Iterable[str], shapes: Shapes | None) -> None:
    """Raise InvalidStateError if tensors of the model are missing."""
    if shapes is not None and (missing := sorted(shapes.keys() - set(loaded))):
        raise InvalidStateError(
            f"{len(missing)} of {len(shapes)} tensors are missing, {missing[0]} among them; "
            "if the trainer's model has fewer tensors than its folder, start from a folder without them"
        )
