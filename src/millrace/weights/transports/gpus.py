"""The GPUs that this process sees, and which of them each rank of an engine is on."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from millrace.engines.stock.arguments import device_names

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """The GPUs that this process sees, in torch's order.

    names: as CUDA_VISIBLE_DEVICES has them: indices or UUIDs; empty if they are not known. uuids: without the prefix
    `GPU-`.
    """

    names: tuple[str, ...]
    uuids: tuple[str, ...]

    @classmethod
    def here(cls) -> Self:
        """Return the GPUs that this process sees."""
        import torch

        count = torch.cuda.device_count()
        uuids = tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))
        return cls(names_of(os.environ.get(VISIBLE), count), uuids)

    def unseen(self, gpus: Iterable[str]) -> tuple[str, ...]:
        """Return those of an engine's GPUs that this process does not see."""
        return tuple(gpu for gpu in gpus if self._knows(gpu) and self._index(gpu) is None)

    def indices(self, gpus: Sequence[str]) -> tuple[int, ...]:
        """Return torch's index of the GPU of each rank, in the order of `gpus`; empty if one of them is not known."""
        found = [self._index(gpu) for gpu in gpus]
        return tuple(index for index in found if index is not None) if None not in found else ()

    def _knows(self, gpu: str) -> bool:
        """Whether it is known if this process sees the GPU: an index can't be compared with UUIDs."""
        return not gpu.isdecimal() or (bool(self.names) and all(name.isdecimal() for name in self.names))

    def _index(self, gpu: str) -> int | None:
        if gpu in self.names:
            return self.names.index(gpu)
        if gpu.isdecimal():
            return None
        start = gpu.removeprefix("GPU-").lower()  # CUDA also accepts the beginning of a UUID
        return next((index for index, uuid in enumerate(self.uuids) if uuid.lower().startswith(start)), None)


def names_of(visible: str | None, count: int) -> tuple[str, ...]:
    """Return the names of `count` GPUs in CUDA_VISIBLE_DEVICES; empty if it does not name them all.

    visible: its value; None if it is not set.
    """
    if visible is None:
        return tuple(map(str, range(count)))
    names = tuple(device_names(visible))
    return names if len(names) == count else ()


def why_unseen(engine: str, gpus: Sequence[str]) -> str:
    """Return why an engine on these GPUs, which this process does not see, can't get weights by CUDA IPC."""
    where = f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(gpus)}"
    return (
        f"{engine} is on {where}, which this process does not see; make {'them' if len(gpus) > 1 else 'it'} visible "
        f"({VISIBLE}; with Ray, RAY_EXPERIMENTAL_NOSET_{VISIBLE}=1), or use another transport than cuda_ipc"
    )
