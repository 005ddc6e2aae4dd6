"""Routed experts of a real engine, beside the trainer's own forward pass. This is beyond the conformance checks and
uses the same server."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.conformance import Check, Runner, select
from millrace.fleet.fleet import Fleet
from millrace.train.batch import TrainSample, collate
from millrace.types import GenerateRequest, Generation, PauseMode, SamplingParams
from tests.architectures import make_moe_folder
from tests.conformance.run_checks import run_check
from tests.train.small_models import make_config, make_policy

DEADLINE = 120.0
PROMPT, TOKENS = 24, 48


def make_expert_folders(parent: Path) -> tuple[Path, Path]:
    """Makes two mixtures of experts in bfloat16 with other weights. The weights are so large that experts matter as
    much as the token itself, as in a trained model."""
    folders = parent / "own", parent / "other"
    for seed, folder in enumerate(folders):
        model = make_moe_folder(folder)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folders


async def sampled(fleet: Fleet, count: int) -> list[TrainSample]:
    draw = np.random.default_rng(0)
    sampling = SamplingParams(TOKENS, temperature=0.0, ignore_eos=True)
    asked = [GenerateRequest(tuple(draw.integers(20, 200, PROMPT)), sampling) for _ in range(count)]
    return [
        TrainSample(
            np.array(request.input_ids + made.output_ids),
            np.arange(PROMPT + TOKENS) >= PROMPT,
            np.concatenate([np.zeros(PROMPT, np.float32), made.logprobs]),
            1.0,
            routed_experts=made.routed_experts,
        )
        for request, made in zip(asked, await fleet.generate_all(asked, deadline=DEADLINE), strict=True)
    ]


class ReturnsExperts:
    """Tests of an engine that returns routed experts, whose subclass is in a module with the fixtures `fleet`,
    `folders` and `runner`."""

    @pytest.mark.parametrize("check", select("experts.*"), ids=lambda check: check.name)
    async def test_it_does_what_the_contract_says(self, runner: Runner, check: Check) -> None:
        await run_check(runner, check, frozenset())

    async def test_replay_brings_the_trainer_closer(self, fleet: Fleet, folders: tuple[Path, Path]) -> None:
        """The engine computes in bfloat16 and the trainer in float32, so their routers decide differently."""
        policy = make_policy(folders[0], make_config())
        batch = collate(await sampled(fleet, 10))
        assert batch.experts_BTLK is not None
        gaps = {}
        for replayed in (None, batch.experts_BTLK):
            with torch.no_grad():
                logprobs_BT = policy.token_logprobs(batch.token_ids_BT, 1.0, experts_BTLK=replayed).logprobs_BT
            gaps[replayed is not None] = (logprobs_BT - batch.engine_logprobs_BT).abs()[batch.mask_BT]
        assert gaps[True].max() < 0.1
        assert gaps[False].max() > 2 * gaps[True].max()
        assert gaps[False].mean() > gaps[True].mean()

    async def test_experts_are_those_that_transformers_chooses(self, fleet: Fleet, folders: tuple[Path, Path]) -> None:
        """They are in the order of layers and tokens: few differ, where the router's decision is close."""
        model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
        [sample, *_] = await sampled(fleet, 1)
        assert sample.routed_experts is not None
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(sample.token_ids)[None], output_router_logits=True).router_logits
        own = torch.stack([layer.topk(2).indices for layer in logits], dim=1)[:-1].sort(-1).values
        theirs = np.sort(sample.routed_experts, axis=-1)
        assert (own.numpy() == theirs).mean() > 0.95

    async def test_a_partial_rollout_keeps_the_experts_of_the_weights_that_made_it(
        self, fleet: Fleet, folders: tuple[Path, Path]
    ) -> None:
        """A publish of other weights comes in the middle. The first part's experts are those of the old weights, and
        the others those that the new weights choose for the same tokens."""
        room = fleet.context_length - PROMPT - 2
        own, other = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16) for one in folders)
        request = GenerateRequest(tuple(range(30, 30 + PROMPT)), SamplingParams(room, temperature=0.0, ignore_eos=True))
        before = await fleet.generate(request, deadline=DEADLINE)
        running = asyncio.Event()

        async def stream() -> Generation:
            async for made in fleet.stream(request, deadline=DEADLINE):
                if len(made.output_ids) > 20:
                    running.set()
            return made

        [engine] = fleet.engines.values()
        task = asyncio.create_task(stream())
        await running.wait()
        await engine.pause(PauseMode.KEEP)  # or it might end before the publish begins
        await fleet.publish(list(other.named_parameters()), 2600)
        await engine.resume()
        made = await task
        [_, second] = made.version_spans
        known = PROMPT + second.start - 1
        assert made.routed_experts is not None
        assert before.routed_experts is not None
        assert np.array_equal(made.routed_experts[:known], before.routed_experts[:known])
        ids = request.input_ids + made.output_ids
        again = GenerateRequest(ids, SamplingParams(1, temperature=0.0), routed_experts_start=known)
        computed = await fleet.generate(again, deadline=DEADLINE)
        assert computed.routed_experts is not None
        agree = np.sort(made.routed_experts[known:], -1) == np.sort(computed.routed_experts[:-1], -1)
        assert agree.mean() > 0.95
        await fleet.publish(list(own.named_parameters()), 2601)
