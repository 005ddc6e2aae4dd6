"""The model's weights, and the transaction that replaces them.

An update is staged: it is written to a second set of tensors while the first one serves. The commit swaps the two sets
by pointer, between two steps. The old set is kept as the staging set of the next update, until the weights sleep.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from millrace.buckets import TensorSpec
from millrace.checkpoint_names import View, names_of
from millrace.checksum import Checksum, checksum
from millrace.errors import DataError, MillraceError
from millrace.model_folder import CASTABLE, StoredTensor, stored_tensors

CHUNK_BYTES = 1 << 20  # each chunk is hashed after it is read, while its bytes are in the CPU cache


class UpdateRefused(MillraceError):
    """The update does not fit the model, or is not possible now. The served weights are unchanged."""


@dataclass(slots=True)
class Session:
    """An open update. staged: the names of the complete tensors, as sent, with their checksums (None: unknown yet)."""

    staged: dict[str, str | None] = field(default_factory=dict)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the module, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Part:
    """The place of a checkpoint's tensor in the model: a view of the tensor `live`."""

    live: str
    view: View


class WeightStore:
    """Parameters and persistent buffers, under their names in a checkpoint.

    stored: the names in the checkpoint; None: the names that `save_pretrained` would use. If the checkpoint splits a
    tensor of the model (experts), an update brings the parts. If it has a tensor under several names (tied weights), an
    update brings one or more of them.

    `swap`, `release` and `resume` run in the model thread, while no other call runs. All other calls run in the loader
    thread, one at a time.
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str] | None = None) -> None:
        self._live: dict[str, torch.Tensor] = {}
        first_names: dict[int, str] = {}
        names = names_of(model, stored)
        self._parts: dict[str, Part] = {}  # by the names in any checkpoint, not only this one
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = first_names.setdefault(id(tensor), name)
            if first == name:
                tensor.data = tensor.data.clone()  # not mapped from the file, which may change
                self._live[name] = tensor
            self._parts |= {part: Part(first, view) for part, view in names.views(name).items()}
        self._named = {name: part for name, part in self._parts.items() if stored is None or name in stored}
        self._ignored = frozenset(name for name in stored or () if name not in self._parts)
        self._tied: dict[Part, list[str]] = {}
        for name, part in self._parts.items():
            self._tied.setdefault(part, []).append(name)
        self._shapes = {name: tensor.shape for name, tensor in self._live.items()}
        self._staging: dict[str, torch.Tensor] | None = None
        self._session: Session | None = None
        self._asleep = False

    @property
    def in_session(self) -> bool:
        return self._session is not None

    def unlike(self, dtype: torch.dtype) -> dict[str, str]:
        """Return the dtypes (torch's names) of the weights with another dtype, under all their names."""
        held = {name: self._live[part.live].dtype for name, part in self._parts.items()}
        return {name: dtype_name(own) for name, own in held.items() if own is not dtype}

    def begin(self) -> None:
        if self._session is not None:
            raise UpdateRefused("an update is already open; end or abort it first")
        if self._asleep:
            raise UpdateRefused("the weights are released; resume them before an update")
        if self._staging is None:
            self._staging = self._allocate()
        self._session = Session()

    def abort(self) -> None:
        """Drop the open update, if there is one."""
        self._session = None

    def load_shared_memory(self, path: str, specs: Sequence[TensorSpec]) -> None:
        """Read tensors from a memory file.

        The file is read, not mapped. That is faster for one pass, and a file that its owner truncates does not kill
        this process.
        """
        session, tensors = self._open(specs)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for spec, tensor in zip(specs, tensors, strict=True):
                    if spec.nbytes != tensor.nbytes or spec.offset < 0 or spec.offset + spec.nbytes > size:
                        raise UpdateRefused(
                            f"{spec.name}: {spec.nbytes} bytes at offset {spec.offset} of a file with {size} bytes; "
                            f"the tensor has {tensor.nbytes} bytes"
                        )
                    self._record(session, spec.name, tensor, _read(_file_at(file.fileno(), spec.offset), tensor))
        except OSError as error:
            raise UpdateRefused(f"could not read {path}: {error.strerror}") from error

    def load_broadcast(self, specs: Sequence[TensorSpec], receive: Callable[[torch.Tensor], None]) -> None:
        """Receive tensors one by one, in the order of `specs`."""
        session, tensors = self._open(specs)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.is_contiguous():
                receive(tensor)
            else:
                received = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                receive(received)
                tensor.copy_(received)
            self._record(session, spec.name, tensor, None)

    def load_stream(self, specs: Sequence[TensorSpec], read: Callable[[memoryview], int]) -> None:
        """Read tensors that follow each other. `read` fills memory in part, and returns how much; 0 at the end."""
        for spec in specs:
            session, [tensor] = self._open([spec])
            self._record(session, spec.name, tensor, _read(lambda chunk, _: read(chunk), tensor))

    def load_folder(self, path: Path) -> None:
        """Read a model's folder. Floats of another dtype are cast to the model's, as when the engine starts."""
        try:
            for name, stored in stored_tensors(path).items():
                self._load_stored(name, stored)
        except (DataError, SafetensorError, OSError) as error:
            raise UpdateRefused(f"could not read {path}: {error}") from error

    def _load_stored(self, name: str, stored: StoredTensor) -> None:
        with safe_open(stored.file, framework="pt") as content:
            tensor = content.get_tensor(name)
        part = self._parts.get(name)
        if part is not None:
            dtype = self._live[part.live].dtype
            if {dtype_name(tensor.dtype), dtype_name(dtype)} <= CASTABLE:
                tensor = tensor.to(dtype)
        spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes)
        session, [staged] = self._open([spec])
        staged.copy_(tensor)
        self._record(session, name, staged, None)

    def check_complete(self) -> None:
        """Raise UpdateRefused unless every tensor of the model is staged. The update stays open."""
        if self._session is None:
            raise UpdateRefused("no update is open; begin one first")
        come = {self._parts[name] for name in self._session.staged if name in self._parts}
        missing = [name for name, part in self._named.items() if part not in come]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UpdateRefused(f"the update lacks {len(missing)} of {len(self._named)} tensors: {shown}")

    def checksums(self) -> dict[str, str]:
        """Return the checksums of the staged tensors while an update is open, otherwise of the served ones."""
        if self._session is not None and self._staging is not None:
            for name, digest in self._session.staged.items():
                if digest is None:
                    self._session.staged[name] = _checksum(self._staged(name))
            return {name: digest for name, digest in self._session.staged.items() if digest is not None}
        served = self.served(self._named)
        return {name: _checksum(tensor) for name, tensor in served.items() if tensor.numel()}

    def served(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the served tensors of these names, which may be those of any checkpoint."""
        if self._asleep:
            raise UpdateRefused("the weights are released; they can't be read")
        if unknown := [name for name in names if name not in self._parts]:
            raise UpdateRefused(f"the model has no tensor {unknown[0]}")
        parts = {name: self._parts[name] for name in names}
        return {name: part.view.of(self._live[part.live].data) for name, part in parts.items()}

    def swap(self) -> None:
        """Swap the served and the staged tensors, and close the update."""
        self.check_complete()
        assert self._staging is not None
        for name, tensor in self._live.items():
            served = tensor.data
            tensor.data = self._staging[name]
            self._staging[name] = served
        if any(self._staging[name].shape != shape for name, shape in self._shapes.items()):
            self._staging = None  # the old set is empty after a sleep
        self._session = None

    def release(self) -> None:
        """Free both sets of tensors."""
        if self._session is not None:
            raise UpdateRefused("an update is open; end or abort it before the weights are released")
        for tensor in self._live.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._staging = None
        self._asleep = True

    def resume(self) -> None:
        """Allocate one set of tensors, for the update that must come next."""
        self._staging = self._allocate()
        self._asleep = False

    def _allocate(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(self._shapes[name], dtype=tensor.dtype, device=tensor.device)
            for name, tensor in self._live.items()
        }

    def _staged(self, name: str) -> torch.Tensor:
        assert self._staging is not None
        part = self._parts[name]
        return part.view.of(self._staging[part.live])

    def _open(self, specs: Sequence[TensorSpec]) -> tuple[Session, list[torch.Tensor]]:
        """Return the staging tensors for these specs, after checking all of them. They now count as not staged.

        A tensor that the model's class ignores gets a tensor that is dropped.
        """
        if self._session is None or self._staging is None:
            raise UpdateRefused("no update is open; begin one first")
        tensors = []
        coming = {spec.name for spec in specs}
        filled = {self._parts[name] for name in self._session.staged if name in self._parts and name not in coming}
        for spec in specs:
            if spec.name in self._ignored:
                tensors.append(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))
                continue
            if spec.name not in self._parts:
                raise UpdateRefused(f"the model has no tensor {spec.name}")
            tensor = self._staged(spec.name)
            if tuple(tensor.shape) != tuple(spec.shape) or dtype_name(tensor.dtype) != spec.dtype:
                raise UpdateRefused(
                    f"{spec.name} is {dtype_name(tensor.dtype)}{list(tensor.shape)} in the model, "
                    f"{spec.dtype}{list(spec.shape)} in the update"
                )
            # A second copy of a tied tensor is compared with the first, so it must not overwrite it.
            part = self._parts[spec.name]
            copy = len(self._tied[part]) > 1 and part in filled
            tensors.append(torch.empty_like(tensor) if copy else tensor)
            filled.add(part)
        for spec in specs:
            self._session.staged.pop(spec.name, None)
        return self._session, tensors

    def _record(self, session: Session, name: str, tensor: torch.Tensor, digest: str | None) -> None:
        """Record a tensor as staged. If a tied tensor came under two names, both must be equal."""
        part = self._parts.get(name)
        alike = self._tied[part] if part is not None else []
        if part is None or len(alike) > 1:
            digest = digest or _checksum(tensor)
        session.staged[name] = digest
        came = [one for one in alike if one in session.staged]
        if len({session.staged[one] for one in came}) > 1:
            for one in came:
                del session.staged[one]
            raise UpdateRefused(f"{' and '.join(came)} are one tensor in the model but differ in the update")


def _checksum(tensor: torch.Tensor) -> str:
    return checksum(byte_view(tensor.cpu()))


def _file_at(descriptor: int, offset: int) -> Callable[[memoryview, int], int]:
    """Return a function that reads from a file: it takes memory, and the position after `offset`."""
    return lambda chunk, position: os.preadv(descriptor, [chunk], offset + position)


def _read(read: Callable[[memoryview, int], int], tensor: torch.Tensor) -> str | None:
    """Fill the tensor. `read` takes memory to fill and a position, and returns how many bytes it has read.

    Return the checksum of a CPU tensor, or None for one on another device."""
    on_cpu = tensor.device.type == "cpu"
    in_place = on_cpu and tensor.is_contiguous()
    target = tensor if in_place else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not on_cpu)
    view = byte_view(target)
    digest = Checksum()
    position = 0
    while position < len(view):
        chunk = view[position : position + CHUNK_BYTES]
        count = read(chunk, position)
        if count == 0:
            raise UpdateRefused(f"the tensors end {len(view) - position} bytes too early; their owner has ended")
        if on_cpu:
            digest.update(chunk[:count])
        position += count
    if not in_place:
        tensor.copy_(target)
    return digest.hexdigest() if on_cpu else None
