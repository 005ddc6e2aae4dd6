"""Which tensors an update may bring: those of the model, and all of them. The servers drop an unknown name without a
word, die of a wrong shape, and mix versions where some are missing. Pure."""

from collections.abc import Iterable, Mapping

from millrace.engines.stock.state import InvalidStateError
from millrace.types import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(tensors: Iterable[TensorSpec], shapes: Shapes | None) -> None:
    """Raises InvalidStateError for tensors that are not the model's."""
    check_shapes(((tensor.name, tensor.shape) for tensor in tensors), shapes)


def check_shapes(tensors: Iterable[tuple[str, tuple[int, ...]]], shapes: Shapes | None) -> None:
    """Raises InvalidStateError for tensors that are not the model's. `shapes` are the model's; None, where nobody knows
    them, checks nothing."""
    if shapes is None:
        return
    for name, shape in tensors:
        if name not in shapes:
            raise InvalidStateError(f"the model has no tensor {name}")
        if shape != shapes[name]:
            raise InvalidStateError(f"{name} has shape {shape}, in the model it is {shapes[name]}")


def checksums_by_rank(ranks: Iterable[Mapping[str, Mapping[str, str]]]) -> Mapping[str, str]:
    """One name for each tensor of each rank, from what the ranks answer: each a mapping with `checksums`."""
    return {f"rank{rank}:{name}": value for rank, held in enumerate(ranks) for name, value in held["checksums"].items()}


def check_whole(loaded: Iterable[str], shapes: Shapes | None) -> None:
    """Raises InvalidStateError when tensors of the model are missing."""
    if shapes is not None and (missing := sorted(shapes.keys() - set(loaded))):
        raise InvalidStateError(
            f"{len(missing)} of {len(shapes)} tensors are missing, {missing[0]} among them; "
            "where the trainer's model has fewer than its folder, start from a folder without them"
        )
