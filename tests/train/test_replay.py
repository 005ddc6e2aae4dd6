"""The policy routes tokens to the experts that the engine chose, in every architecture by the same rule."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from millrace.errors import DataError
from millrace.train.batch import TrainSample, collate
from millrace.train.policy import Policy
from millrace.train.replay import RoutingReplay
from millrace.train.trainer import Trainer
from millrace.types import ExpertArray
from tests.architectures import ARCHITECTURES, make_model
from tests.train.small_models import CPU, PLAIN, make_config, make_samples

MIXTURES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v3"]
ROWS, LENGTH, CHOSEN, COUNT = 2, 7, 2, 4


def mixture(name: str, chosen: int = CHOSEN) -> PreTrainedModel:
    """A mixture of experts with weights so large that each expert matters."""
    model: PreTrainedModel = make_model(name, num_experts_per_tok=chosen).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


def make_policy(name: str, **changes: object) -> Policy:
    return Policy(mixture(name), CPU, make_config(**PLAIN, **changes), "it reads text")


def drawn(layers: int, seed: int = 0, rows: int = ROWS) -> Tensor:
    """Different experts for each token and layer, in no order."""
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, LENGTH, layers)
    return torch.rand(*shape, COUNT, generator=draw).argsort(-1)[..., :CHOSEN].to(torch.int16)


def tokens(rows: int = ROWS) -> Tensor:
    return torch.randint(0, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def seen_by_experts(model: PreTrainedModel, run: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """The indices [N, K] and weights [N, K] that reach the experts of each layer while `run` runs."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((args[1], args[2]))

    handles = [block.experts.register_forward_pre_hook(note) for block in blocks(model)]  # type: ignore[union-attr]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_get_the_replayed_tokens_with_the_routers_own_weights(name: str) -> None:
    model = mixture(name)
    replay, ids = RoutingReplay(model), tokens()
    own = seen_by_experts(model, lambda: model(input_ids=ids))
    experts = drawn(len(own))
    with replay.replaying(experts):
        replayed = seen_by_experts(model, lambda: model(input_ids=ids))
    for layer, (indices, weights) in enumerate(replayed):
        assert torch.equal(indices, experts[:, :, layer].flatten(0, 1).long())
        assert (weights > 0).all()
    # In the first layer the hidden states are the same, so experts that are in both have proportional weights, and a
    # token whose experts are the same has the same weights.
    (indices, weights), (_, chosen) = own[0], replayed[0]
    same = (indices.sort(-1).values == replayed[0][0].sort(-1).values).all(-1)
    assert same.any()
    left = weights.gather(-1, indices.argsort(-1))[same]
    torch.testing.assert_close(chosen.gather(-1, replayed[0][0].argsort(-1))[same], left)


@pytest.mark.parametrize("name", MIXTURES)
def test_unknown_experts_and_the_models_own_change_nothing(name: str) -> None:
    model = mixture(name)
    replay, ids = RoutingReplay(model), tokens()
    logits: Tensor = model(input_ids=ids).logits
    own = seen_by_experts(model, lambda: model(input_ids=ids))
    chosen = torch.stack([indices.view(ROWS, LENGTH, CHOSEN) for indices, _ in own], dim=2).to(torch.int16)
    with replay.replaying(chosen):
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
    with replay.replaying(torch.full_like(chosen, -1)):
        assert torch.equal(model(input_ids=ids).logits, logits)
    with replay.replaying(drawn(len(own))):
        assert not torch.allclose(model(input_ids=ids).logits, logits)
    with replay.replaying(None):
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_token_sees_the_replay_of_the_tokens_before_it_only() -> None:
    model = mixture("qwen3_moe")
    replay, ids, experts = RoutingReplay(model), tokens(1), drawn(2, rows=1)
    known = 4
    with replay.replaying(experts):
        whole: Tensor = model(input_ids=ids).logits
    experts[:, known:] = -1
    with replay.replaying(experts):
        part: Tensor = model(input_ids=ids).logits
    torch.testing.assert_close(part[:, :known], whole[:, :known])
    assert not torch.allclose(part[:, known:], whole[:, known:])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradients_flow_into_the_router_through_the_weights(name: str) -> None:
    """They are those of finite differences, with the experts held still."""
    policy = make_policy(name)
    ids, experts = tokens(), drawn(2)

    def total() -> Tensor:
        return policy.token_logprobs(ids, 1.0, experts_BTLK=experts).logprobs_BT.double().sum()

    total().backward()  # type: ignore[no-untyped-call]
    routers = [p for n, p in policy.parameters().items() if ("gate." in n or "router." in n) and p.ndim == 2]
    assert len(routers) == 2
    for router in routers:
        assert router.grad is not None
        step = 1e-3 * router.grad / router.grad.norm()
        with torch.no_grad():
            router.add_(step)
            above = total()
            router.sub_(2 * step)
            below = total()
            router.add_(step)
        assert float((above - below) / 2e-3) == pytest.approx(float(router.grad.norm()), rel=0.05)


def test_layers_that_are_computed_again_replay_again() -> None:
    ids, experts = tokens(), drawn(2)
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy("qwen3_moe", gradient_checkpointing=checkpointing)
        policy.token_logprobs(ids, 1.0, experts_BTLK=experts).logprobs_BT.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append({name: parameter.grad for name, parameter in policy.parameters().items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def with_experts(sample: TrainSample, seed: int, known: int) -> TrainSample:
    draw = np.random.default_rng(seed)
    order = draw.random((min(known, sample.token_ids.size), 2, COUNT)).argsort(-1)
    experts: ExpertArray = order[..., :CHOSEN].astype(np.uint8)
    return replace(sample, routed_experts=experts)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_step_replays_each_samples_own_experts(minibatches: int) -> None:
    """The engine's logprobs are those of the replayed experts, so a step finds no gap. Without replay it finds one."""
    samples = [
        with_experts(sample, seed, known=99 if seed % 3 else 4) if seed % 4 else sample
        for seed, sample in enumerate(make_samples(12))
    ]
    policy = make_policy("qwen3_moe")
    with torch.no_grad():
        made = []
        for sample in samples:
            batch = collate([sample])
            logprobs = policy.token_logprobs(batch.token_ids_BT, 1.0, experts_BTLK=batch.experts_BTLK).logprobs_BT
            made.append(replace(sample, logprobs=logprobs[0].numpy()))
    config = make_config(**PLAIN, lr=1e-9, minibatches=minibatches)
    assert Trainer(policy, config).train_step(made, 1.0).largest_logprob_gap < 1e-3
    blind = [replace(sample, routed_experts=None) for sample in made]
    assert Trainer(policy, config).train_step(blind, 1.0).largest_logprob_gap > 0.1


def test_the_reference_routes_by_itself() -> None:
    policy = make_policy("qwen3_moe")
    ids = tokens()
    alone = policy.token_logprobs(ids, 1.0).logprobs_BT
    policy.take_reference()
    policy.token_logprobs(ids, 1.0, experts_BTLK=drawn(2))
    torch.testing.assert_close(policy.reference_logprobs(ids, 1.0), alone.detach())


def test_a_model_without_experts_refuses_them() -> None:
    policy = make_policy("qwen3")
    policy.token_logprobs(tokens(), 1.0)
    with pytest.raises(DataError, match=r"routed experts of 2 layers, and the policy \(qwen3\) has 0 layers"):
        policy.token_logprobs(tokens(), 1.0, experts_BTLK=drawn(2))


def test_experts_of_another_model_are_refused() -> None:
    policy = make_policy("qwen3_moe")
    with pytest.raises(DataError, match=r"routed experts of 3 layers, and the policy \(qwen3_moe\) has 2 layers"):
        policy.token_logprobs(tokens(), 1.0, experts_BTLK=drawn(3))
    with pytest.raises(DataError, match=r"expert 4, and the policy \(qwen3_moe\) has 4 in a layer"):
        policy.token_logprobs(tokens(), 1.0, experts_BTLK=drawn(2) + 1)


def test_a_router_that_works_in_another_way_is_refused() -> None:
    """Two experts a token are replayed in a model that routes to three."""
    policy = Policy(mixture("qwen3_moe", chosen=3), CPU, make_config(), "it reads text")
    with pytest.raises(DataError, match="does not know how qwen3_moe routes: a layer has 0 top-k"):
        policy.token_logprobs(tokens(), 1.0, experts_BTLK=drawn(2))


def test_every_mixture_of_the_other_tests_is_here() -> None:
    assert {name for name in ARCHITECTURES if blocks(make_model(name, num_experts_per_tok=CHOSEN))} == set(MIXTURES)
