"""Casts weights to the dtype of the engines, tensor by tensor, on each tensor's device."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.checksum import tensor_checksum
from millrace.engines.start import Replica
from millrace.errors import PublishError
from millrace.model_config import folder_dtype, unusual_dtypes
from millrace.model_folder import CASTABLE, StoredTensor, stored_tensors
from millrace.types import EngineInfo
from millrace.weights.folder import FolderTensors
from millrace.weights.source import NamedTensor, WeightSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The dtype of each tensor of a model in the engines, by torch's names.

    usual: the dtype of the tensors that `unusual` does not name; None if it is unknown.
    unusual: the dtypes of the other tensors, by name.

    Only floating-point tensors are cast, and never to or from a quantised dtype, because that needs a scale.
    """

    usual: str | None
    unusual: Mapping[str, str]

    def of(self, name: str) -> str | None:
        """Return the tensor's dtype; None if it is unknown."""
        return self.unusual.get(name, self.usual)

    def cast_to(self, name: str, dtype: "torch.dtype") -> "torch.dtype | None":
        """Return the dtype to cast a tensor of `dtype` to; None if it should not be cast."""
        import torch

        wanted, given = self.of(name), str(dtype).removeprefix("torch.")
        if wanted is None or wanted == given or not {wanted, given} <= CASTABLE:
            return None
        found: torch.dtype = getattr(torch, wanted)
        return found

    def cast(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the tensor in its dtype in the engines. It is the same tensor if it has that dtype."""
        dtype = self.cast_to(name, tensor.dtype)
        return tensor if dtype is None else tensor.detach().to(dtype)


def dtypes_of(info: EngineInfo, folder: Path) -> Dtypes:
    """Return the dtypes that the engine reports. Those that it does not report are read from the model's folder. Raises
    DataError if the folder has no config."""
    usual = info.dtype or folder_dtype(folder)
    return Dtypes(usual, unusual_dtypes(folder) if info.unusual_dtypes is None else info.unusual_dtypes)


def require_one_dtype(engines: Iterable[Replica]) -> None:
    """Raise PublishError if the engines compute in different dtypes, because all get the same tensors."""
    dtypes = {replica.engine.name: replica.info.dtype for replica in engines if replica.info.dtype is not None}
    if len(set(dtypes.values())) > 1:
        each = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise PublishError(f"the engines compute in different dtypes ({each}); start all of them with one --dtype")


def cast(source: WeightSource, dtypes: Dtypes) -> WeightSource:
    """Return the tensors in these dtypes. Each is cast when it is taken."""

    def as_they_come(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            yield name, dtypes.cast(name, tensor)

    return source.converted(as_they_come)


def folder_checksums_as(dtypes: Dtypes, folder: Path, checksums: Mapping[str, str]) -> dict[str, str]:
    """Return the checksums that the tensors in `folder` have after their cast to `dtypes`.

    checksums: the checksums of the tensors as they are in the folder. Only tensors whose dtype differs are read.

    Raises DataError as `stored_tensors` does.
    """

    def changes(name: str, tensor: StoredTensor) -> bool:
        wanted = dtypes.of(name)
        return wanted in CASTABLE and tensor.float_dtype not in (wanted, None)

    changed = {name for name, tensor in stored_tensors(folder).items() if name in checksums and changes(name, tensor)}
    if not changed:
        return dict(checksums)
    casts = ((name, dtypes.cast(name, tensor)) for name, tensor in FolderTensors(folder, frozenset(changed)))
    return dict(checksums) | {name: tensor_checksum(tensor) for name, tensor in casts}
