"""AdamW and its learning rate."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from millrace.config.models import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of `step`, counted from 0.

    Rises linearly to `lr`, which the step `lr_warmup_steps` is the first to have, then follows the schedule towards
    `lr * min_lr_ratio`, which it would reach at `total_steps` and keeps from there on.
    """
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / (config.lr_warmup_steps + 1)
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps))
    match config.lr_schedule:
        case "constant":
            return config.lr
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def make_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused. Matrices, embeddings among them, have weight decay; norms and biases have
    none."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def global_grad_norm(parameters: Iterable[Parameter]) -> Tensor:
    """The norm over all gradients of all ranks: scalar. Collective where the gradients are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def apply_gradients(optimizer: torch.optim.Optimizer, *, grad_norm: Tensor, max_grad_norm: float, lr: float) -> None:
    """Scales the gradients down to `max_grad_norm` where they are above it, takes one step at `lr`, and drops them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_state(optimizer: torch.optim.AdamW, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """The moments and step counts themselves (not copies), as `NAME.exp_avg` and so on. A parameter that has had no
    step yet gets its state here, as AdamW would make it, so that a checkpoint can be read into it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update((f"{name}.{key}", value) for key, value in state.items())
    return tensors
