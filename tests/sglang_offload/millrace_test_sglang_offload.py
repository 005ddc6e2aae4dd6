"""A plugin for SGLang that copies the KV cache of its hierarchical cache with torch.

On the CPU, SGLang lacks the kernel that copies pages between the device and the host. With this plugin, SGLang's own
cache decides what is stored, loaded and dropped, and only the copies are others. SGLang finds it if this folder is on
the server's PYTHONPATH.
"""

import torch


def install() -> None:
    """Install the copies. SGLang calls this in each of its processes."""
    try:
        from sglang.srt.mem_cache.pool_host import mha as pool
    except ImportError:  # 0.5.15
        from sglang.srt.mem_cache import memory_pool_host as pool

    pool.transfer_kv_direct = transfer


def transfer(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """SGLang's `transfer_kv_direct`. The indices are of tokens."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
