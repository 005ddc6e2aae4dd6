"""The model's weights and the transaction that replaces them.

An update is staged: it is written into a second set of tensors while the first one serves, and the commit exchanges the
two between two steps, by pointer. The old set stays as the staging set of the next update, whose memory is then there
already, until the weights sleep.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from millrace.checkpoint_names import View, names_of
from millrace.checksum import Checksum, checksum
from millrace.errors import DataError, MillraceError
from millrace.model_folder import CASTABLE, StoredTensor, stored_tensors
from millrace.types import TensorSpec

CHUNK_BYTES = 1 << 20  # read and hashed in turns, so that the hash finds the bytes in the processor's cache


class UpdateRefused(MillraceError):
    """The update does not fit the model or the state it is in. The served weights are untouched."""


@dataclass(slots=True)
class Session:
    """An open update. staged: the tensors that are there whole, by the names under which they came, with their
    checksums where they are known already."""

    staged: dict[str, str | None] = field(default_factory=dict)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """As in `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor of the checkpoint is in the model: a part of the tensor `live`, or all of it."""

    live: str
    view: View


class WeightStore:
    """Parameters and persistent buffers, by their names in the checkpoint whose tensors are called `stored`; None: as
    `save_pretrained` would call them. A tensor of the model that the checkpoint has in parts (experts) comes part by
    part, each into its place; one that it has under several names (tied) comes under all of them or some.

    Everything but `swap`, `release` and `resume` runs in the loader's thread, one call at a time; these three run in
    the model thread while no other call does.
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str] | None = None) -> None:
        self._live: dict[str, torch.Tensor] = {}
        first_names: dict[int, str] = {}
        names = names_of(model, stored)
        self._parts: dict[str, Part] = {}  # by the checkpoint's names, also those that this one does not have
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = first_names.setdefault(id(tensor), name)
            if first == name:
                tensor.data = tensor.data.clone()  # off the file that it was mapped from: that file may change
                self._live[name] = tensor
            self._parts |= {part: Part(first, view) for part, view in names.views(name).items()}
        self._named = {name: part for name, part in self._parts.items() if stored is None or name in stored}
        self._passed = frozenset(name for name in stored or () if name not in self._parts)
        self._alike: dict[Part, list[str]] = {}
        for name, part in self._parts.items():
            self._alike.setdefault(part, []).append(name)
        self._shapes = {name: tensor.shape for name, tensor in self._live.items()}
        self._staging: dict[str, torch.Tensor] | None = None
        self._session: Session | None = None
        self._asleep = False

    @property
    def in_session(self) -> bool:
        return self._session is not None

    def unlike(self, dtype: torch.dtype) -> dict[str, str]:
        """The dtypes (torch's names) of the weights whose dtype is not this one, by all their names in checkpoints."""
        held = {name: self._live[part.live].dtype for name, part in self._parts.items()}
        return {name: dtype_name(own) for name, own in held.items() if own is not dtype}

    def begin(self) -> None:
        if self._session is not None:
            raise UpdateRefused("an update is open already; end or abort it first")
        if self._asleep:
            raise UpdateRefused("the weights are released; resume them before an update")
        if self._staging is None:
            self._staging = self._allocate()
        self._session = Session()

    def abort(self) -> None:
        """Drops what was staged. There need be no open update: a rollback may come twice."""
        self._session = None

    def load_shared_memory(self, path: str, specs: Sequence[TensorSpec]) -> None:
        """Reads tensors out of a memory file. It is read and not mapped: that is faster for one pass, and a file that
        its owner cuts short does not kill this process."""
        session, tensors = self._open(specs)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for spec, tensor in zip(specs, tensors, strict=True):
                    if spec.nbytes != tensor.nbytes or spec.offset < 0 or spec.offset + spec.nbytes > size:
                        raise UpdateRefused(
                            f"{spec.name}: {spec.nbytes} bytes at {spec.offset} in a file of {size}; "
                            f"the tensor has {tensor.nbytes} bytes"
                        )
                    self._book(session, spec.name, tensor, _read(file.fileno(), spec.offset, tensor))
        except OSError as error:
            raise UpdateRefused(f"could not read {path}: {error.strerror}") from error

    def load_broadcast(self, specs: Sequence[TensorSpec], receive: Callable[[torch.Tensor], None]) -> None:
        """Receives tensors one by one, in the order of `specs`."""
        session, tensors = self._open(specs)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.is_contiguous():
                receive(tensor)
            else:
                received = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                receive(received)
                tensor.copy_(received)
            self._book(session, spec.name, tensor, None)

    def load_folder(self, path: Path) -> None:
        """Reads a model's folder. Floats of another dtype than the model's are cast, as when the engine started from
        such a folder."""
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
        self._book(session, name, staged, None)

    def check_complete(self) -> None:
        """Raises UpdateRefused unless every tensor of the model is staged whole. The update stays open."""
        if self._session is None:
            raise UpdateRefused("no update is open; begin one first")
        come = {self._parts[name] for name in self._session.staged if name in self._parts}
        missing = [name for name, part in self._named.items() if part not in come]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UpdateRefused(f"the update lacks {len(missing)} of {len(self._named)} tensors: {shown}")

    def checksums(self) -> dict[str, str]:
        """Of what is staged so far while an update is open, otherwise of what is served."""
        if self._session is not None and self._staging is not None:
            for name, digest in self._session.staged.items():
                if digest is None:
                    self._session.staged[name] = _checksum(self._staged(name))
            return {name: digest for name, digest in self._session.staged.items() if digest is not None}
        if self._asleep:
            raise UpdateRefused("the weights are released; there is nothing to sum")
        served = {name: part.view.of(self._live[part.live].data) for name, part in self._named.items()}
        return {name: _checksum(tensor) for name, tensor in served.items() if tensor.numel()}

    def swap(self) -> None:
        """Exchanges served and staged tensors and closes the update."""
        self.check_complete()
        assert self._staging is not None
        for name, tensor in self._live.items():
            served = tensor.data
            tensor.data = self._staging[name]
            self._staging[name] = served
        if any(self._staging[name].shape != shape for name, shape in self._shapes.items()):
            self._staging = None  # the old set was empty: the weights had slept
        self._session = None

    def release(self) -> None:
        """Drops both sets."""
        if self._session is not None:
            raise UpdateRefused("an update is open; end or abort it before the weights are released")
        for tensor in self._live.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._staging = None
        self._asleep = True

    def resume(self) -> None:
        """Takes the memory for one set: that of the update which has to come now."""
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
        """The staging tensors for these specs, all of them checked first. From here on they count as not staged. A
        tensor that the model's class ignores gets a place that is dropped."""
        if self._session is None or self._staging is None:
            raise UpdateRefused("no update is open; begin one first")
        tensors = []
        coming = {spec.name for spec in specs}
        filled = {self._parts[name] for name in self._session.staged if name in self._parts and name not in coming}
        for spec in specs:
            if spec.name in self._passed:
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
            # A second copy of a tied tensor is compared with the first, and must not write over it.
            part = self._parts[spec.name]
            copy = len(self._alike[part]) > 1 and part in filled
            tensors.append(torch.empty_like(tensor) if copy else tensor)
            filled.add(part)
        for spec in specs:
            self._session.staged.pop(spec.name, None)
        return self._session, tensors

    def _book(self, session: Session, name: str, tensor: torch.Tensor, digest: str | None) -> None:
        """Counts a tensor as staged. One that came under two of its names must have come twice the same."""
        part = self._parts.get(name)
        alike = self._alike[part] if part is not None else []
        if part is None or len(alike) > 1:
            digest = digest or _checksum(tensor)
        session.staged[name] = digest
        came = [one for one in alike if one in session.staged]
        if len({session.staged[one] for one in came}) > 1:
            for one in came:
                del session.staged[one]
            raise UpdateRefused(f"{' and '.join(came)} are one tensor in the model and differ in the update")


def _checksum(tensor: torch.Tensor) -> str:
    return checksum(byte_view(tensor.cpu()))


def _read(descriptor: int, offset: int, tensor: torch.Tensor) -> str | None:
    """Fills the tensor from a file. Returns the checksum of a CPU tensor; None: it is on a device, ask it there."""
    on_cpu = tensor.device.type == "cpu"
    in_place = on_cpu and tensor.is_contiguous()
    target = tensor if in_place else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not on_cpu)
    view = byte_view(target)
    digest = Checksum()
    position = 0
    while position < len(view):
        chunk = view[position : position + CHUNK_BYTES]
        count = os.preadv(descriptor, [chunk], offset + position)
        if count == 0:
            raise UpdateRefused(f"the memory file ends at {offset + position}; its owner has cut it short")
        if on_cpu:
            digest.update(chunk[:count])
        position += count
    if not in_place:
        tensor.copy_(target)
    return digest.hexdigest() if on_cpu else None
