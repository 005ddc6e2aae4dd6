"""Publishing through a folder to real embedded engines."""

import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import GenerateRequest, SamplingParams
from tests.fleet.signals import kill_engine

Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture
async def fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1)
    async with open_fleet(
        config, tiny_model, log_dir=tmp_path, transport="disk", folder=tmp_path / "versions"
    ) as fleet:
        yield fleet


@pytest.fixture
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def expected(model: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


async def test_versions_are_folders_that_engines_and_other_programs_can_read(
    fleet: Fleet, tensors: Tensors, tmp_path: Path
) -> None:
    prompt = (5, 17, 300)
    elsewhere = tmp_path / "versions" / "version-00000099"  # a version of another run
    elsewhere.mkdir(parents=True)
    for version in (1, 2, 3):
        scaled = [(name, tensor * (1 + version / 10)) for name, tensor in tensors]
        assert not (await fleet.publish(scaled, version, bucket_bytes=64 * 1024)).failed
    with pytest.raises(PublishError, match="named a tensor twice"):  # this waits until version 3 is safe
        await fleet.publish([*tensors, tensors[0]], 4)
    folders = sorted(path.name for path in (tmp_path / "versions").iterdir())
    assert folders == ["index.json", "version-00000002", "version-00000003", elsewhere.name]
    written = tmp_path / "versions" / "version-00000003"
    # Engines of another user can read it.
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in written.iterdir())
    last = AutoModelForCausalLM.from_pretrained(written)
    for engine in fleet.engines.values():
        request = GenerateRequest(prompt, SamplingParams(8, temperature=0.0, ignore_eos=True), request_id="one")
        generation = await engine.generate(request, deadline=20)
        assert generation.output_ids == expected(last, prompt)
        assert {span.version for span in generation.version_spans} == {3}

    one, _ = fleet.engines
    kill_engine(fleet, one)
    await fleet.restart(one)
    assert fleet.snapshot.get(one).version == 3

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk
    try:
        with pytest.raises(PublishError, match="version-00000004 can't be written"):
            await fleet.publish(tensors, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {state.version for state in fleet.snapshot.replicas if state.routable} == {3}
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == folders
    assert not (await fleet.publish(tensors, 4)).failed

    # The files of a failed publish are not used by the next one of the same number.
    with pytest.raises(PublishError, match="no engine took version 5"):
        await fleet.publish(tensors[:-1], 5)
    assert not (await fleet.publish([(name, tensor * 2) for name, tensor in tensors], 5)).failed
    doubled = AutoModelForCausalLM.from_pretrained(tmp_path / "versions" / "version-00000005")
    assert torch.equal(dict(doubled.named_parameters())[tensors[0][0]], tensors[0][1] * 2)
    request = GenerateRequest(prompt, SamplingParams(8, temperature=0.0, ignore_eos=True), request_id="five")
    for engine in fleet.engines.values():
        assert (await engine.generate(request, deadline=20)).output_ids == expected(doubled, prompt)
