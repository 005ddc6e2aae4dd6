"""Publishing by broadcast to a fleet of real embedded engines. A fault of one engine must not cost the others the
version."""

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.transports.process_group import ProcessGroupTransport
from millrace.weights.transports.sending_group import SendingGroup
from tests.fleet.signals import kill_engine, send_signal
from tests.weights.variants import louder

CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=3, threads=1, faults=True)
BUCKET = 64 * 1024
DEADLINE = 16.0  # seconds; a quarter of it is for joining a group, and for each broadcast
FIRST, MIDDLE, LAST = "embedded-0", "embedded-1", "embedded-2"

Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture(params=[False, True], ids=["apart", "together"])
async def fleet(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet whose engines are each in a group of their own, as with gloo, or all in one, as with NCCL."""
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
        fleet._versions.transport = ProcessGroupTransport(SendingGroup, torch.device("cpu"), together=request.param)
        yield fleet


@pytest.fixture
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


async def served(fleet: Fleet) -> dict[str, int | None]:
    """Returns the version that each routable engine makes tokens with."""
    return {name: version for name, (version, _) in (await made(fleet)).items()}


async def made(fleet: Fleet) -> dict[str, tuple[int | None, tuple[int, ...]]]:
    answers = {}
    for state in fleet.snapshot.replicas:
        if state.routable:
            request = GenerateRequest(
                (5, 17, 300), SamplingParams(8, temperature=0.0, ignore_eos=True), request_id="one"
            )
            generation = await fleet.engines[state.name].generate(request, deadline=20)
            answers[state.name] = (generation.version_spans[-1].version, generation.output_ids)
    return answers


class Weights:
    """Tensors that can be iterated again. The first iteration calls `happens` after half of them."""

    def __init__(self, tensors: Tensors, happens: Callable[[], None]) -> None:
        self._tensors, self._happens = tensors, happens
        self.rounds = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.rounds += 1
        first = self.rounds == 1
        for index, entry in enumerate(self._tensors):
            if first and index == len(self._tensors) // 2:
                self._happens()
            yield entry


async def test_a_failed_engine_does_not_fail_the_others(fleet: Fleet, tensors: Tensors) -> None:
    before = await made(fleet)
    transport = fleet._versions.transport
    assert isinstance(transport, ProcessGroupTransport)

    assert not (await fleet.publish(louder(tensors), 1, bucket_bytes=BUCKET, deadline=DEADLINE)).failed
    assert not {tokens for _, tokens in (await made(fleet)).values()} & {tokens for _, tokens in before.values()}
    groups = [one.group for one in transport._joined]
    assert len(groups) == (1 if transport.together else 3)
    assert not (await fleet.publish(tensors, 2, bucket_bytes=BUCKET, deadline=DEADLINE)).failed
    assert [one.group for one in transport._joined] == groups
    assert await made(fleet) == {name: (2, tokens) for name, (_, tokens) in before.items()}

    refusing = fleet.engines[FIRST]
    assert isinstance(refusing, EmbeddedEngine)
    await refusing.inject_fault("refuse_update", count=2)
    report = await fleet.publish(louder(tensors), 3, bucket_bytes=BUCKET, deadline=DEADLINE)
    assert set(report.failed) == {FIRST}
    assert await served(fleet) == {MIDDLE: 3, LAST: 3}

    source = Weights(tensors, lambda: kill_engine(fleet, MIDDLE))
    # A source that can be iterated only once can't be sent again, so the old version still serves.
    if transport.together:
        with pytest.raises(PublishError, match=MIDDLE):
            await fleet.publish(iter(source), 4, bucket_bytes=BUCKET, deadline=DEADLINE)
        assert await served(fleet) == {LAST: 3}
    else:
        report = await fleet.publish(iter(source), 4, bucket_bytes=BUCKET, deadline=DEADLINE)
        assert set(report.failed) == {MIDDLE}
        assert await served(fleet) == {LAST: 4}
    await fleet.publish(tensors, 5, bucket_bytes=BUCKET, deadline=DEADLINE)
    assert await made(fleet) == {LAST: (5, before[LAST][1])}


@pytest.mark.parametrize("fleet", [True], ids=["together"], indirect=True)
async def test_an_engine_that_hangs_in_a_common_broadcast_is_left_out_of_the_next(
    fleet: Fleet, tensors: Tensors
) -> None:
    source = Weights(louder(tensors), lambda: send_signal(fleet, MIDDLE, signal.SIGSTOP))
    report = await fleet.publish(source, 1, bucket_bytes=BUCKET, deadline=DEADLINE)
    assert source.rounds == 2
    assert set(report.failed) == {MIDDLE}
    assert await served(fleet) == {FIRST: 1, LAST: 1}
