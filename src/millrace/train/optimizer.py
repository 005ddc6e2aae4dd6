"""The AdamW optimizer and its learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from millrace.config.models import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step`, counted from 0.

    It rises linearly and reaches `lr` at step `lr_warmup_steps`. From there it follows the schedule to
    `lr * min_lr_ratio` at `total_steps`, and stays there.
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
    """Return a fused AdamW optimizer (arXiv:1711.05101).

    Matrices, including embeddings, have weight decay. Norms and biases have none.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def global_grad_norm(parameters: Iterable[Parameter]) -> Tensor:
    """Return the norm of all gradients of all ranks, a scalar. Collective if the gradients are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def apply_gradients(optimizer: torch.optim.Optimizer, *, grad_norm: Tensor, max_grad_norm: float, lr: float) -> None:
    """Clip the gradients to `max_grad_norm`, take one optimizer step at `lr`, and clear the gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_state(optimizer: torch.optim.AdamW, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Return the moments and step counts, as `NAME.exp_avg` and so on: the tensors themselves, not copies.

    Parameters without a step so far get the initial state of AdamW, so that a checkpoint can be loaded into it.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update((f"{name}.{key}", value) for key, value in state.items())
    return tensors
