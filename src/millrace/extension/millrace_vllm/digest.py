"""Checksums of every tensor in memory. Those of samples are in `millrace_samples`, which the sender has too.

A checksum is two sums modulo 2^64 in 32 hex digits: the sum of the data as integers, and that sum with each integer
weighted by its position. A changed element changes the first sum, an element that moved far changes the second.
"""

from collections.abc import Mapping
from typing import Any

import torch
from millrace_samples import hexadecimal
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

SUM_LANES = 1 << 22  # integers of 8 bytes that are summed at once: 32 MiB
PROBE_ROWS = 256


class StoredTensors:
    """The parameters and persistent buffers of this rank's model."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._names = [
            (path, name)
            for path, module in modules.items()
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None and name not in module._non_persistent_buffers_set
        ]

    def checksums(self) -> dict[str, str]:
        """The checksum of every tensor as it is in memory, by its name.

        A weight that oneDNN has packed is unpacked first, so its checksum is the same as on a GPU. Experts that vLLM
        has packed on the CPU are summed in their packed form."""
        digests = {}
        for path, name in self._names:
            module = self._modules[path]
            tensor = module._parameters.get(name, module._buffers.get(name))
            table = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
            if name == "weight" and "cpu_linear" in vars(module) and not table:
                tensor = unpacked(module)
            if tensor is not None and tensor.numel():
                digests[f"{path}.{name}"] = digest(tensor)
        sums = torch.stack(list(digests.values())).cpu().tolist()  # one transfer for all
        return {name: hexadecimal(pair) for name, pair in zip(digests, sums, strict=True)}


def unpacked(module: Any) -> torch.Tensor:
    """The weight of a linear layer that oneDNN has packed for the CPU, [N, K].

    The kernel offers no way to read it. The layer is therefore applied to the rows of the identity matrix, which
    returns every element unchanged (except for the sign of a zero)."""
    recorded = get_layerwise_info(module).restore_metadata[0]["weight"]
    weight = torch.empty(recorded.shape, dtype=recorded.dtype)
    identity = torch.eye(weight.shape[1], dtype=weight.dtype)
    for start in range(0, len(identity), PROBE_ROWS):
        rows = identity[start : start + PROBE_ROWS]
        weight[:, start : start + PROBE_ROWS] = module.cpu_linear(rows, module.weight, None).T
    return weight


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """The two sums of a tensor's bytes, with eight bytes as one integer: [2] int64 on the tensor's device."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(content) % 8 or content.storage_offset() % 8:
        content = torch.nn.functional.pad(content, (0, -len(content) % 8))
    lanes = content.view(torch.int64)
    places = torch.arange(1, min(len(lanes), SUM_LANES) + 1, device=tensor.device)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(lanes), SUM_LANES):
        some = lanes[start : start + SUM_LANES]
        total = some.sum()
        sums += torch.stack((total, (some * places[: len(some)]).sum() + start * total))
    return sums
