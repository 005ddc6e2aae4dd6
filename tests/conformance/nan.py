"""Weights with NaN: every engine reports them in the same way, and no engine is blamed for them."""

import itertools
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.errors import NonFiniteLogprobs
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import MAX_FAILURES
from millrace.types import GenerateRequest, SamplingParams

PROMPT = (5, 17, 300, 42, 8)
SAYS = r"the weights of version {} gave token 0 of request nan-\d+\S* the logprob nan.*healthy: check the weights"


async def check_nan_weights(fleet: Fleet, tiny_model: Path, version: int) -> None:
    """Publishes weights with a NaN as `version`, and sound ones as the next version."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sound = {name: parameter.detach() for name, parameter in model.named_parameters()}
    broken = {**sound, "model.norm.weight": torch.full_like(sound["model.norm.weight"], float("nan"))}
    names = (f"nan-{number}" for number in itertools.count())
    engine = next(iter(fleet.engines.values()))

    def request(temperature: float) -> GenerateRequest:
        return GenerateRequest(PROMPT, SamplingParams(4, temperature, ignore_eos=True), request_id=next(names))

    await fleet.publish(list(broken.items()), version, require_finite=False)
    for temperature in [0.0, 1.0] * MAX_FAILURES:
        with pytest.raises(NonFiniteLogprobs, match=SAYS.format(version)):
            await fleet.generate(request(temperature), deadline=60)
    with pytest.raises(NonFiniteLogprobs, match=SAYS.format(version)):
        async for _ in engine.stream(request(1.0), deadline=60):
            pass
    assert all(state.routable and not state.failures for state in fleet.snapshot.replicas)

    await fleet.publish(list(sound.items()), version + 1)
    for _ in range(4):  # vLLM on the CPU may first read NaN that the last version left in its cache
        with suppress(NonFiniteLogprobs):
            await fleet.generate(request(0.0), deadline=60)
    assert len((await fleet.generate(request(0.0), deadline=60)).output_ids) == 4
