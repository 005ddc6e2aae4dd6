"""Buckets that a rank opens: memory files, GPU memory by CUDA IPC, and checkpoint folders on disk."""

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import torch
from millrace_files import mapped_tensors
from millrace_words import first_line
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from .errors import RpcError
from .messages import TensorSpec, take, take_bytes


def mapped_file(path: str) -> torch.Tensor:
    """The bytes of a memory file, without a copy. The pages are private, so this process cannot change the sender's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RpcError(f"{path} is not a regular file")
            return torch.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise RpcError(f"could not map {path}: {error}") from error


def opened_ipc(share: dict[str, Any], nbytes: int, device: torch.device) -> torch.Tensor:
    """The bytes of another process's GPU memory, by CUDA IPC. A share can be opened once."""
    if device.type != "cuda":
        raise RpcError("CUDA IPC needs an engine on a GPU")
    index = torch.cuda.current_device()  # vLLM has set it to this rank's
    wanted, own = take(share, "device", str), str(torch.cuda.get_device_properties(index).uuid)
    size = take(share, "storage_bytes", int)
    if wanted != own:
        raise RpcError(f"the share is on GPU {wanted}, this rank is on GPU {own}")
    if not 0 < nbytes <= size:
        raise RpcError(f"the bucket has {nbytes} bytes and its share has {size}")
    try:
        memory: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
            *(torch.Tensor, torch.Size([nbytes]), (1,), 0, torch.UntypedStorage, torch.uint8, index),
            *(take_bytes(share, "handle"), size, take(share, "storage_offset", int), False),
            *(take_bytes(share, "ref_counter_handle"), take(share, "ref_counter_offset", int)),
            *(take_bytes(share, "event_handle"), take(share, "event_sync_required", bool)),
        )
    except RuntimeError as error:
        raise RpcError(f"could not open the share: {first_line(error)}") from error
    return memory


def view(bucket: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A tensor in a bucket's bytes, without a copy."""
    return bucket[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint on this host, mapped into memory. If the folder has an index, only the tensors that
    the index names belong to the model."""
    tensors: dict[str, torch.Tensor] = {}
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        places = json.loads(index.read_text())["weight_map"] if index.is_file() else None
        names = set(places.values()) if places else [single.name] if single.is_file() else None
        files = sorted(folder.glob("*.safetensors")) if names is None else [folder / name for name in sorted(names)]
        for file in files:
            for name, tensor in mapped_tensors(file)[0].items():
                if places is not None and places.get(name) != file.name:
                    continue
                if name in tensors:
                    raise RpcError(f"{name} is in two files of {folder}")
                tensors[name] = tensor
    except (OSError, ValueError, KeyError) as error:
        raise RpcError(f"could not read {folder}: {first_line(error)}") from error
    if not tensors:
        raise RpcError(f"{folder} has no safetensors files on this host")
    return tensors
