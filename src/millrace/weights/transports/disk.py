"""Trainer and engines that share a path and nothing else: a version is a folder in Hugging Face's format, which the
engines read by themselves.

A folder appears when all of it is on the disk, under the version's name. Of those that a run has written the last two
stay, so one can be read while the next is written; what others have left there stays too.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from millrace.checksum import tensor_checksum
from millrace.errors import EngineError, PublishError
from millrace.model_folder import to_disk
from millrace.types import DiskBucket
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport

KEPT = 2
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class DiskTransport(Transport):
    """For engines with Capability.UPDATE_FROM_DISK. Versions are written below `folder`, each with what else an engine
    needs of the model in `model_path`: its config and tokenizer."""

    def __init__(self, folder: Path, model_path: Path) -> None:
        self._folder, self._model_path = folder.absolute(), model_path
        self._version = 0
        self._written: list[Path] = []

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002 (whoever can read may come)
        version: int,
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        self._version = version
        return {}

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """One, when all is written. Raises PublishError where it can't be."""
        place = self._folder / f"version-{self._version:08d}"
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
                (partial / file).chmod(0o644)  # safetensors keeps it to this user, and the engines' may be another
                to_disk(partial / file)
                checksums |= {name: tensor_checksum(tensor) for name, tensor in copies.items()}
                files |= dict.fromkeys(copies, file)
                nbytes += sum(tensor.nbytes for tensor in copies.values())
            self._complete(partial, files, nbytes)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            to_disk(self._folder)
        except (OSError, SafetensorError) as error:
            raise PublishError(f"version {self._version} can't be written to {place}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._written = [*(path for path in self._written if path != place), place]
        for old in self._written[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        del self._written[:-KEPT]
        yield StagedBucket(lambda _: DiskBucket(str(place)), checksums, tuple(files), nbytes)

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the engines read by themselves)
        return

    async def close(self) -> None:
        """The versions stay."""

    def _complete(self, partial: Path, files: Mapping[str, str], nbytes: int) -> None:
        """The index of the weights, and what the model's folder has beside them."""
        index = {"metadata": {"total_size": nbytes}, "weight_map": files}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        for path in self._model_path.iterdir():
            if path.is_file() and not path.name.endswith(WEIGHTS):
                shutil.copyfile(path, partial / path.name)
        for path in partial.iterdir():
            to_disk(path)
        to_disk(partial)
