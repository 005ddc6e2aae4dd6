"""With no room for versions, events and logs, the run goes on and reports what is missing."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.fleet.event_log import EventLog
from millrace.fleet.local import open_fleet
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.weights.store import VersionStore
from tests.rollout.test_scheduler import make_runner

PROBLEMS = list(generate_problems(7, 8))
ROOM = 256 * 1024  # bytes in a file; a version has more than twice as many


@contextmanager
def no_room() -> Iterator[None]:
    """Limits every file of this process to ROOM bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_loses_its_files_and_no_sample(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1)
    for name in ("embedded-0.log", "events.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    folder = tmp_path / "versions"
    with EventLog(tmp_path / "events.jsonl") as event_log, caplog.at_level(logging.ERROR):
        # The transport is gloo, since shared memory is files too.
        async with open_fleet(
            config, tiny_model, log_dir=tmp_path, transport="gloo", folder=folder, event_log=event_log
        ) as fleet, RolloutScheduler(make_runner(fleet, tiny_model), samples_per_group=2) as scheduler:  # fmt: skip
            scheduler.start(((f"g{i}", problem) for i, problem in enumerate(PROBLEMS)), version=0)
            with no_room():
                report = await fleet.publish(tensors, 1)
            assert not report.failed
            assert report.unstored is not None
            assert "File too large" in report.unstored
            groups = [await scheduler.next_group() for _ in PROBLEMS]
            assert (await fleet.publish(tensors, 2)).unstored is None
            assert {state.version for state in fleet.snapshot.replicas if state.routable} == {2}
        assert {sample.status for group in groups for sample in group.samples} == {SampleStatus.FINISHED}
        assert event_log.metrics.unwritten > 0
    assert sum("events.jsonl can't be written" in record.getMessage() for record in caplog.records) == 1
    assert VersionStore(str(folder), tiny_model, keep=2).versions == (2,)
