"""What vLLM on the CPU lacks to spread experts over ranks.

With several data-parallel ranks, vLLM's mixtures of experts gather the ranks' tokens and scatter the results, and with
expert parallelism each rank computes its own experts. vLLM 0.32 loads such a model on the CPU, and dies in its first
forward pass: its communicator for the CPU lacks the two collectives, and its kernel reads experts that the rank does
not have. A plugin of vLLM adds the collectives, over gloo, and hides the other ranks' experts from the kernel.
Everything else is as on a GPU.
"""

import sys
from pathlib import Path

PLUGIN = """
import torch
import torch.distributed as dist


def all_gatherv(self, input_, dim=0, sizes=None):
    assert dim == 0
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([one[:size] for one, size in zip(gathered, sizes)])


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    assert dim == 0
    total = input_.contiguous().clone()
    dist.all_reduce(total, group=self.device_group)
    sizes = sizes or [len(total) // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group].contiguous()


def of_this_rank(apply):
    def applied(self, *args, **kwargs):
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            ids, weights = expert_map[kwargs["topk_ids"].long()], kwargs["topk_weights"]
            kwargs["topk_weights"] = torch.where(ids < 0, torch.zeros_like(weights), weights)
            kwargs["topk_ids"] = ids.clamp(min=0).to(kwargs["topk_ids"].dtype)
        return apply(self, *args, **kwargs)

    return applied


def register():
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    CPUUnquantizedExperts.apply = of_this_rank(CPUUnquantizedExperts.apply)
"""
FILES = {
    "millrace_collectives.py": PLUGIN,
    "millrace_collectives-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: millrace-collectives\nVersion: 0\n",
    "millrace_collectives-0.dist-info/entry_points.txt": (
        "[vllm.general_plugins]\nmillrace_collectives = millrace_collectives:register\n"
    ),
}


def install_collectives(folder: Path) -> dict[str, str]:
    """Writes the plugin into a folder. Returns the variables with which vLLM loads it."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {"PYTHONPATH": str(folder)}


if __name__ == "__main__":
    install_collectives(Path(sys.argv[1]))
