"""The tensors and vocabulary of a model, read from its folder.

A server does not report them, and crashes on a request or an update that does not fit them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    PartsBucket,
    PeerBucket,
    ProcessGroupBucket,
    SentPartsBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)
from millrace.engines.experts import TENSOR, Experts, experts_of
from millrace.engines.stock.state import InvalidStateError
from millrace.engines.stock.tensors import check_shapes, check_tensors
from millrace.model_config import decoder_layers, image_token, read_quantization, vocab_size
from millrace.model_folder import has_weights, stored_tensors


@dataclass(frozen=True, slots=True)
class Model:
    """A model as its folder describes it.

    shapes: of every tensor, by name; None if the folder has no weights. image_token: the placeholder of an image; None
    for a model of text. experts: None for a model without them, and for a folder without weights. quantization: the
    `quantization_config` of a folder whose weights are quantised.
    """

    vocab_size: int
    shapes: Mapping[str, tuple[int, ...]] | None
    image_token: int | None = None
    experts: Experts | None = None
    quantization: Mapping[str, Any] | None = None


def read_model(folder: Path) -> Model:
    """Read a model's folder. Raises DataError if it can't be read or is not a model's folder."""
    shapes = shapes_of(folder) if has_weights(folder) else None
    mixture = shapes is not None and any(TENSOR.search(name) for name in shapes)
    experts = experts_of(shapes, decoder_layers(folder)) if shapes is not None and mixture else None
    return Model(vocab_size(folder), shapes, image_token(folder), experts, read_quantization(folder))


def shapes_of(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each tensor in a folder. Raises DataError if the weights are missing or damaged."""
    return {name: tensor.shape for name, tensor in stored_tensors(folder).items()}


def names_in(bucket: Bucket, model: Model) -> set[str]:
    """Return the names of the tensors in a bucket. Raises InvalidStateError if they do not fit the model."""
    match bucket:
        case DiskBucket(path=folder):
            if not Path(folder).is_dir():  # it is on the engine's host; the engine refuses it if it is missing
                return set(model.shapes or ())
            shapes = shapes_of(Path(folder))
            check_shapes(shapes.items(), model.shapes)
            return set(shapes)
        case (
            CudaIpcBucket(tensors=tensors)
            | TorchStorageBucket(tensors=tensors)
            | SharedMemoryBucket(tensors=tensors)
            | PartsBucket(tensors=tensors)
            | SentPartsBucket(tensors=tensors)
            | ProcessGroupBucket(tensors=tensors)
        ):
            check_tensors(tensors, model.shapes)
            return {tensor.name for tensor in tensors}
        case PeerBucket():
            raise InvalidStateError("it takes no weights from another engine")
