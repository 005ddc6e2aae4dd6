"""A plugin for vLLM that copies offloaded KV cache on any CPU.

vLLM refuses its OffloadingConnector on the CPU, because it copies by CUDA streams. With this plugin, vLLM's own
connector, scheduler and block manager decide what is stored, loaded and dropped, and only the copies are others. vLLM
finds it if this folder is on the server's PYTHONPATH.
"""

from typing import Any

import torch


def install() -> None:
    """Replace the worker of the CPU tier. vLLM calls this in each of its processes."""
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    class Copies(OffloadingWorker):  # type: ignore[misc]
        """Copies blocks at once, in the order of the jobs."""

        def __init__(self, caches: Any, chunks: int) -> None:
            self.refs = caches.group_data_refs
            self.device = [one.tensor.view(torch.int8).view(-1, one.page_size_bytes) for one in caches.tensors]
            self.host = [torch.zeros(chunks, one.page_size_bytes, dtype=torch.int8) for one in caches.tensors]
            self.done: list[Any] = []

        def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.copy(job_id, src_spec, dst_spec, self.device, self.host, src_spec.group_sizes)

        def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.copy(job_id, src_spec, dst_spec, self.host, self.device, dst_spec.group_sizes)

        def copy(self, job: int, src: Any, dst: Any, sources: Any, targets: Any, sizes: Any) -> bool:
            at = 0
            for refs, size in zip(self.refs, sizes, strict=True):
                here = slice(at, at := at + size)
                for ref in refs:
                    copied = sources[ref.tensor_idx][torch.as_tensor(src.block_ids[here])]
                    targets[ref.tensor_idx][torch.as_tensor(dst.block_ids[here])] = copied
            self.done.append(TransferResult(job, success=True, transfer_size=1, transfer_time=1e-3))
            return True

        def get_finished(self) -> list[Any]:
            done, self.done = self.done, []
            return done

        def wait(self, job_ids: set[int]) -> None:
            """Do nothing: a submitted job has ended."""

    def get_worker(self: Any, kv_caches: Any) -> Any:
        assert self.blocks_per_chunk == 1
        self._worker = self._worker or Copies(kv_caches, self.num_chunks)
        return self._worker

    CPUOffloadingSpec.get_worker = get_worker
