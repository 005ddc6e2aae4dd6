"""What a model's folder says of the model that a server holds: the server does not tell, and dies where it is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.engines.stock.tensors import check_shapes, check_tensors
from millrace.model_config import vocab_size
from millrace.model_folder import has_weights, stored_tensors
from millrace.types import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)


@dataclass(frozen=True, slots=True)
class Model:
    """shapes: of every tensor under the trainer's name; None where the folder has no weights."""

    vocab_size: int
    shapes: Mapping[str, tuple[int, ...]] | None


def read_model(folder: Path) -> Model:
    """Raises DataError when the folder can't be read here, or is not a model's."""
    return Model(vocab_size(folder), shapes_of(folder) if has_weights(folder) else None)


def shapes_of(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Raises DataError when the folder has no weights or they are damaged."""
    return {name: tensor.shape for name, tensor in stored_tensors(folder).items()}


def names_in(bucket: Bucket, model: Model) -> set[str]:
    """The tensors that a bucket brings. Raises InvalidStateError where they are not the model's."""
    match bucket:
        case DiskBucket(path=folder):
            if not Path(folder).is_dir():  # it is on another host, and a missing one is refused there
                return set(model.shapes or ())
            shapes = shapes_of(Path(folder))
            check_shapes(shapes.items(), model.shapes)
            return set(shapes)
        case (
            CudaIpcBucket(tensors=tensors)
            | TorchStorageBucket(tensors=tensors)
            | SharedMemoryBucket(tensors=tensors)
            | ProcessGroupBucket(tensors=tensors)
        ):
            check_tensors(tensors, model.shapes)
            return {tensor.name for tensor in tensors}
