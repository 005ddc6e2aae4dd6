"""What vLLM and SGLang lack on the CPU to spread experts over data-parallel ranks. Everything else is as on a GPU.

With several data-parallel ranks, a mixture of experts gathers the ranks' tokens and scatters the results, and with
expert parallelism each rank computes its own experts. On the CPU, vLLM 0.32 and SGLang 0.5.23 load such a model, and
die in their first forward pass: the two collectives need NCCL, and the code of experts reads some that the rank does
not have. SGLang's `torch_native` attention also lacks the length of padding. Plugins of the two engines add the
collectives, over gloo, and let a rank compute its own experts.
"""

import sys
from pathlib import Path

GATHER = """
import torch
import torch.distributed as dist


def gathered(tensor, sizes, world_size, group):
    sizes = sizes or [len(tensor)] * world_size
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])
"""
VLLM = """
import torch
import torch.distributed as dist
from millrace_gather import gathered


def all_gatherv(self, input_, dim=0, sizes=None):
    assert dim == 0
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    return gathered(input_, sizes, self.world_size, self.device_group)


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
SGLANG = """
import torch
import torch.nn.functional as F
from millrace_gather import gathered


def all_gatherv(self, input_, sizes=None, output=None):
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, one, sizes)[0] for one in input_]
    whole = gathered(input_, sizes, self.world_size, self.cpu_group)
    return [whole if output is None else output.copy_(whole)]


def of_this_rank(layer, x, topk_output, moe_runner_config):
    assert moe_runner_config.activation == "silu"
    output = torch.zeros_like(x)
    for expert, (both, down) in enumerate(zip(layer.w13_weight, layer.w2_weight)):
        weight = torch.where(topk_output.topk_ids == expert, topk_output.topk_weights, 0).sum(1)
        gate, up = F.linear(x, both).chunk(2, -1)
        output += weight[:, None].to(x.dtype) * F.linear(F.silu(gate) * up, down)
    return output


def register():
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.moe import fused_moe_native

    GroupCoordinator.all_gatherv = all_gatherv
    GroupCoordinator.reduce_scatterv = GroupCoordinator._deterministic_reduce_scatterv
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    fused_moe_native.moe_forward_native = of_this_rank
"""
FILES = {
    "millrace_gather.py": GATHER,
    "millrace_vllm_collectives.py": VLLM,
    "millrace_sglang_collectives.py": SGLANG,
    "millrace_collectives-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: millrace-collectives\nVersion: 0\n",
    "millrace_collectives-0.dist-info/entry_points.txt": (
        "[vllm.general_plugins]\nmillrace_collectives = millrace_vllm_collectives:register\n"
        "[sglang.srt.plugins]\nmillrace_collectives = millrace_sglang_collectives:register\n"
    ),
}


def install_collectives(folder: Path) -> dict[str, str]:
    """Writes the plugins into a folder. Returns the variables with which the engines load them."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {"PYTHONPATH": str(folder)}


if __name__ == "__main__":
    install_collectives(Path(sys.argv[1]))
