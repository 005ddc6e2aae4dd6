"""Penalties, bias and prompts' logprobs on a real engine, beside transformers' own forward pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.engines.base import Engine
from millrace.types import Capability, Float32Array, GenerateRequest, Generation, SamplingParams

PROMPT = (5, 17, 300, 42, 300, 8)
TOKENS = 12
CLOSE = 2e-3  # nats, in float32


def logprobs_of(
    model: PreTrainedModel, ids: tuple[int, ...], split: int, sampling: SamplingParams, *, counts_prompt: bool
) -> Float32Array:
    """The logprobs [V] after these tokens, those from `split` on being output, as docs/generating.md defines them."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].float()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    for token in set(ids if counts_prompt else ids[split:]):
        scaled = logits[token] / sampling.repetition_penalty, logits[token] * sampling.repetition_penalty
        logits[token] = scaled[0] if logits[token] > 0 else scaled[1]
    for token in set(ids[split:]):
        logits[token] -= sampling.frequency_penalty * ids[split:].count(token) + sampling.presence_penalty
    return torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1).numpy()


def require_expected(
    model: PreTrainedModel, request: GenerateRequest, made: Generation, *, counts_prompt: bool
) -> None:
    """Each token has the logprob that transformers gives it, and is the likeliest if the request is greedy."""
    split = len(request.input_ids) - request.continued_tokens
    for place, token in enumerate(made.output_ids):
        ids = request.input_ids + made.output_ids[:place]
        expected = logprobs_of(model, ids, split, request.sampling, counts_prompt=counts_prompt)
        assert abs(expected[token] - made.logprobs[place]) < CLOSE, (request.sampling, place)
        if not request.sampling.temperature:
            assert expected.max() - expected[token] < CLOSE, (request.sampling, place)


async def check_samples_as_transformers_would(engine: Engine, folder: Path) -> None:
    """In one call, and in a call that continues another's tokens."""
    info = await engine.info()
    model = AutoModelForCausalLM.from_pretrained(folder)
    counts_prompt = Capability.PROMPT_PENALTY in info.capabilities
    base = SamplingParams(TOKENS, temperature=0.0, ignore_eos=True)
    changes = [base, replace(base, logit_bias={7: 3.0, 9: 3.1, 300: -5.0})]
    if Capability.PENALTIES in info.capabilities:
        changes += [
            replace(base, repetition_penalty=1.4),
            replace(base, frequency_penalty=0.3, logit_bias={7: 3.0, 9: 3.1}),
            replace(base, presence_penalty=0.7, frequency_penalty=-0.1),
            replace(base, presence_penalty=-0.5),
        ]
    for sampling in changes:
        for temperature in (0.0, 0.7):
            request = GenerateRequest(PROMPT, replace(sampling, temperature=temperature), prompt_logprobs=True)
            made = await engine.generate(request, deadline=120)
            assert len(made.output_ids) == TOKENS
            require_expected(model, request, made, counts_prompt=counts_prompt)
            require_prompt_scored(model, made)
        whole = await engine.generate(GenerateRequest(PROMPT, sampling), deadline=120)
        first = await engine.generate(GenerateRequest(PROMPT, replace(sampling, max_new_tokens=5)), deadline=120)
        rest = GenerateRequest(PROMPT + first.output_ids, replace(sampling, max_new_tokens=7), continued_tokens=5)
        second = await engine.generate(rest, deadline=120)
        if not second.penalty_restarts:
            assert first.output_ids + second.output_ids == whole.output_ids, sampling
            require_expected(model, rest, second, counts_prompt=counts_prompt)
        else:
            assert second.penalty_restarts == (0,)
            exact = sampling.repetition_penalty == 1.0 and not sampling.presence_penalty
            assert not exact, sampling
            assert info.kind != "embedded"


def require_prompt_scored(model: PreTrainedModel, made: Generation) -> None:
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    assert made.prompt_logprobs is not None
    assert np.isnan(made.prompt_logprobs[0])
    expected = [float(logprobs[place, token]) for place, token in enumerate(PROMPT[1:])]
    np.testing.assert_allclose(made.prompt_logprobs[1:], expected, atol=CLOSE)
