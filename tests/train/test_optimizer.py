from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.models import OptimizerConfig
from millrace.train.optimizer import apply_gradients, global_grad_norm, learning_rate, make_optimizer

configs = st.builds(
    OptimizerConfig,
    lr=st.floats(1e-6, 1.0),
    lr_schedule=st.sampled_from(["constant", "cosine", "linear"]),
    lr_warmup_steps=st.integers(0, 20),
    min_lr_ratio=st.floats(0, 1),
)


@given(configs, st.integers(1, 200))
def test_the_rate_rises_to_lr_then_never_rises_again(config: OptimizerConfig, total: int) -> None:
    rates = [learning_rate(config, step, total) for step in range(total + 10)]
    peak = config.lr_warmup_steps
    assert all(0 < rate <= config.lr * (1 + 1e-9) for rate in rates[: peak + 1])
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert all(rate >= config.lr * config.min_lr_ratio * (1 - 1e-9) for rate in rates[peak:])
    if peak < len(rates):
        assert rates[peak] == pytest.approx(config.lr)


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.6), ("cosine", 0.6)])
def test_the_schedules_by_hand(schedule: str, half: float) -> None:
    config = OptimizerConfig(lr=1.0, lr_schedule=schedule, lr_warmup_steps=3, min_lr_ratio=0.2)  # type: ignore[arg-type]
    assert [learning_rate(config, step, 13) for step in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 8, 13) == pytest.approx(half)
    assert learning_rate(config, 13, 13) == pytest.approx(1.0 if schedule == "constant" else 0.2)
    assert learning_rate(config, 99, 13) == learning_rate(config, 13, 13)


def test_cosine_starts_slower_than_linear() -> None:
    cosine, linear = (OptimizerConfig(lr=1.0, lr_schedule=s) for s in ("cosine", "linear"))
    assert learning_rate(cosine, 2, 10) > learning_rate(linear, 2, 10)
    assert learning_rate(cosine, 8, 10) < learning_rate(linear, 8, 10)


def test_only_matrices_decay() -> None:
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, bias], OptimizerConfig(lr=0.1, weight_decay=0.5))
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    apply_gradients(optimizer, grad_norm=torch.tensor(0.0), max_grad_norm=1.0, lr=0.1)
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert bias.tolist() == [1.0, 1.0]
    assert matrix.grad is None


def test_gradients_are_clipped_by_their_norm_over_all_parameters() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    parameters[0].grad, parameters[1].grad = torch.tensor([30.0]), torch.tensor([40.0])
    norm = global_grad_norm(parameters)
    assert norm.item() == pytest.approx(50.0)
    apply_gradients(optimizer, grad_norm=norm, max_grad_norm=5.0, lr=0.5)
    assert [p.item() for p in parameters] == pytest.approx([-1.5, -2.0], rel=1e-4)
