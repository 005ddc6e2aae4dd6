"""Weights in the dtype of the engines: each tensor is cast when its turn comes, on the device that holds it."""

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
from millrace.weights.plan import announced

if TYPE_CHECKING:
    import torch

    NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Which dtype each tensor of a model has in the engines, by torch's names: `usual`, unless it is in `unusual`.

    Only floating tensors are cast, and never to or from a quantised dtype: that takes a scale."""

    usual: str | None
    unusual: Mapping[str, str]

    def of(self, name: str) -> str | None:
        """None where nothing is known of it, and it stays as it is."""
        return self.unusual.get(name, self.usual)

    def cast_to(self, name: str, dtype: "torch.dtype") -> "torch.dtype | None":
        """What a tensor of `dtype` is to be cast to; None where it stays as it is."""
        import torch

        wanted, given = self.of(name), str(dtype).removeprefix("torch.")
        if wanted is None or wanted == given or not {wanted, given} <= CASTABLE:
            return None
        found: torch.dtype = getattr(torch, wanted)
        return found

    def cast(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        """The tensor itself where it has its dtype already."""
        dtype = self.cast_to(name, tensor.dtype)
        return tensor if dtype is None else tensor.detach().to(dtype)


def dtypes_of(info: EngineInfo, folder: Path) -> Dtypes:
    """What an engine says of itself. Where it does not: the dtype of the model's folder, and for the tensors that the
    folder stores in another dtype than most, that one. Reads the folder. Raises DataError where it has no config."""
    usual = info.dtype or folder_dtype(folder)
    return Dtypes(usual, unusual_dtypes(folder) if info.unusual_dtypes is None else info.unusual_dtypes)


def require_one_dtype(engines: Iterable[Replica]) -> None:
    """Raises PublishError for engines of several dtypes: all get the same tensors."""
    told = {one.engine.name: one.info.dtype for one in engines if one.info.dtype is not None}
    if len(set(told.values())) > 1:
        each = ", ".join(f"{name} in {dtype}" for name, dtype in told.items())
        raise PublishError(f"the engines compute in different dtypes ({each}); start all of them with one --dtype")


def cast(tensors: "Iterable[NamedTensor]", dtypes: Dtypes) -> "Iterable[NamedTensor]":
    """The tensors in these dtypes. It is as lazy as what is given, can be gone through as often, and announces the same
    shapes."""
    if isinstance(tensors, Iterator):
        return _as_they_come(tensors, dtypes)
    shapes = announced(tensors)
    return _Cast(tensors, dtypes) if shapes is None else _AnnouncedCast(tensors, dtypes, shapes)


def folder_checksums_as(dtypes: Dtypes, folder: Path, checksums: Mapping[str, str]) -> dict[str, str]:
    """`checksums` are those of the tensors in `folder`. Returns the checksums that the same tensors have in `dtypes`;
    reads only those whose dtype differs. Raises DataError as `stored_tensors` does."""

    def changes(name: str, tensor: StoredTensor) -> bool:
        wanted = dtypes.of(name)
        return wanted in CASTABLE and tensor.float_dtype not in (wanted, None)

    changed = {name for name, tensor in stored_tensors(folder).items() if name in checksums and changes(name, tensor)}
    if not changed:
        return dict(checksums)
    cast_ones = ((name, dtypes.cast(name, tensor)) for name, tensor in FolderTensors(folder, frozenset(changed)))
    return dict(checksums) | {name: tensor_checksum(tensor) for name, tensor in cast_ones}


def _as_they_come(tensors: "Iterator[NamedTensor]", dtypes: Dtypes) -> "Iterator[NamedTensor]":
    for name, tensor in tensors:
        yield name, dtypes.cast(name, tensor)


@dataclass(frozen=True, slots=True)
class _Cast:
    tensors: "Iterable[NamedTensor]"
    dtypes: Dtypes

    def __iter__(self) -> "Iterator[NamedTensor]":
        return _as_they_come(iter(self.tensors), self.dtypes)


@dataclass(frozen=True, slots=True)
class _AnnouncedCast(_Cast):
    announced: Mapping[str, tuple[int, ...]]

    def shapes(self) -> "Iterable[tuple[str, tuple[int, ...]]]":
        return self.announced.items()
