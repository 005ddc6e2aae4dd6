"""A version's weights as a folder in Hugging Face's format."""

import itertools
import json
import mmap
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.checksum import checksum, tensor_checksum
from millrace.errors import PublishError
from millrace.model_folder import StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch

    from millrace.weights.transports.base import NamedTensors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@dataclass(frozen=True, slots=True)
class WrittenFolder:
    """A folder that was written to `path`.

    checksums: the checksum of each tensor by name (`millrace.checksum`).
    nbytes: the size of all tensors.
    """

    path: Path
    checksums: Mapping[str, str]
    nbytes: int


def folder_checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every tensor in the folder's safetensors files. Does not import torch. Raises DataError as
    `stored_tensors` does."""
    checksums: dict[str, str] = {}
    for path, tensors in itertools.groupby(stored_tensors(folder).items(), lambda item: item[1].file):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            for name, tensor in tensors:
                with view[tensor.begin : tensor.end] as data:
                    checksums[name] = checksum(data)
            view.release()
    return checksums


def read_tensor(stored: StoredTensor, name: str) -> "torch.Tensor":
    """Return one tensor of a folder, on the CPU, memory-mapped."""
    from safetensors import safe_open

    with safe_open(stored.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def read_tensors(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> "dict[str, torch.Tensor]":
    """Return several tensors of a folder by name, on the CPU, memory-mapped. Each file is opened once."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    in_order = sorted(names, key=lambda name: stored[name].file)
    for path, several in itertools.groupby(in_order, lambda name: stored[name].file):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in several}
    return found


@dataclass(frozen=True, slots=True)
class FolderTensors:
    """The tensors of a model's folder, or only those named in `only`. Each is memory-mapped when it is taken. Can be
    iterated again. Raises DataError as `stored_tensors` does."""

    folder: Path
    only: Collection[str] | None = None

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tensor.shape) for name, tensor in stored_tensors(self.folder).items() if self._has(name)]

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        from safetensors import safe_open

        for path, tensors in itertools.groupby(stored_tensors(self.folder).items(), lambda item: item[1].file):
            with safe_open(path, framework="pt") as file:
                for name, _ in tensors:
                    if self._has(name):
                        yield name, file.get_tensor(name)

    def _has(self, name: str) -> bool:
        return self.only is None or name in self.only


def write_folder(place: Path, buckets: "Iterator[NamedTensors]", model_path: Path) -> WrittenFolder:
    """Write a folder with the tensors, one file for each bucket, and the other files of the folder `model_path`, such
    as config and tokenizer.

    `place` is created, or replaced, when everything is written. It is not flushed to the disk. Raises PublishError if
    it can't be written, or if a name occurs twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = place.with_name(f".{place.name}.partial")
    checksums: dict[str, str] = {}
    files: dict[str, str] = {}
    nbytes = 0
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, tensors in enumerate(buckets):
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
            if len(copies) < len(tensors) or checksums.keys() & copies.keys():
                raise PublishError("the trainer named a tensor twice")
            file = f"model-{number:05d}.safetensors"
            save_file(copies, partial / file, metadata={"format": "pt"})
            (partial / file).chmod(0o644)  # safetensors makes it private, but engines may run as another user
            checksums |= {name: tensor_checksum(tensor) for name, tensor in copies.items()}
            files |= dict.fromkeys(copies, file)
            nbytes += sum(tensor.nbytes for tensor in copies.values())
        if not files:
            raise PublishError("the trainer gave no tensors")
        index = {"metadata": {"total_size": nbytes}, "weight_map": files}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        copy_other_files(model_path, partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except (OSError, SafetensorError) as error:
        raise PublishError(f"{place} can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return WrittenFolder(place, checksums, nbytes)


def copy_other_files(model_path: Path, place: Path) -> None:
    """Copy the files of a model's folder that have no weights, such as config and tokenizer. Raises OSError."""
    for path in model_path.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, place / path.name)
