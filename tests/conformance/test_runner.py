"""The runner itself, on a real server: what it does after a check that went wrong."""

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.buckets import DiskBucket
from millrace.conformance import CHECKS, Check, Outcome, Runner, Subject, checks, select
from millrace.conformance.check import CheckFailed, Examine, Lacking
from millrace.conformance.requests import alike, fingerprint
from millrace.conformance.weights import by_disk, next_version
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import ConfigError, EngineError
from millrace.types import Capability, EngineInfo, Health, PauseMode
from tests.conformance.conftest import ADMIN_KEY, API_KEY, embedded_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(
    tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Subject]:
    async with embedded_server(tiny_model, tmp_path_factory.mktemp("logs"), "--faults") as url:
        engine = EmbeddedEngine("embedded", url, api_key=API_KEY, admin_key=ADMIN_KEY)
        yield Subject(engine, await engine.info(), tiny_model, other_model)
        await engine.close()


def made(examine: Examine, *needs: Capability) -> Check:
    return Check("made.up", "as the test has it", frozenset(needs), examine)


async def test_names_are_unique_and_claims_are_written() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.claim and check.name.count(".") == 1 for check in CHECKS)


async def test_checks_are_chosen_by_name() -> None:
    assert {check.name.partition(".")[0] for check in select("pause.*")} == {"pause"}
    with pytest.raises(ConfigError, match=r"no check matches pausing; the groups are .*pause\.\*"):
        select("pausing")


async def test_an_engine_is_reset_whatever_state_a_check_left(subject: Subject) -> None:
    async def mess(subject: Subject) -> None:
        await by_disk(subject, subject.other or Path(), await next_version(subject))
        await subject.engine.sleep()
        await subject.engine.wake()
        await subject.engine.begin_update(await next_version(subject) + 1)
        await subject.engine.load(DiskBucket(str(subject.other)), deadline=10)
        await subject.engine.pause(PauseMode.KEEP)
        raise CheckFailed("seen on purpose")

    before = await fingerprint(subject)
    runner = Runner(subject)
    result = await runner.examine(made(mess))
    assert (result.outcome, result.reason, runner.lost) == (Outcome.FAILED, "seen on purpose", None)
    assert await subject.engine.health() is Health.READY
    assert alike(await fingerprint(subject), before)


async def test_a_check_that_leaves_the_engine_paused_has_failed(subject: Subject) -> None:
    result = await Runner(subject).examine(made(lambda subject: subject.engine.pause(PauseMode.KEEP)))
    assert (result.outcome, result.reason) == (Outcome.FAILED, "the engine is paused after the check")
    assert await subject.engine.health() is Health.READY


async def test_a_check_has_a_deadline(subject: Subject) -> None:
    async def forever(_subject: Subject) -> None:
        await asyncio.Event().wait()

    result = await Runner(subject, deadline=0.1).examine(made(forever))
    assert (result.outcome, result.reason) == (Outcome.FAILED, "the check did not end within 0.1 s")


async def test_a_missing_requirement_is_named(subject: Subject) -> None:
    async def never(_subject: Subject) -> None:
        raise AssertionError("it was made without what it needs")

    async def unable(_subject: Subject) -> None:
        raise Lacking("the moon is not full")

    able = Subject(subject.engine, subject.info, subject.folder, subject.other)
    poor = Subject(subject.engine, _without(subject, Capability.SLEEP), subject.folder, subject.other)
    result = await Runner(poor).examine(made(never, Capability.SLEEP, Capability.PAUSE_KEEP))
    assert (result.outcome, result.reason) == (Outcome.LACKING, "the engine lacks sleep")
    result = await Runner(able).examine(made(unable))
    assert (result.outcome, result.reason) == (Outcome.LACKING, "the moon is not full")
    bare = Runner(Subject(subject.engine, subject.info))
    reasons = {(await bare.examine(check)).reason for check in select("update.disk")}
    assert reasons == {"no folder with other weights of the same shapes was given"}


@pytest.mark.parametrize("changed", [False, True])
async def test_weights_that_can_not_be_restored_matter_only_if_a_check_changed_them(
    subject: Subject, changed: bool
) -> None:
    async def spoil(subject: Subject) -> None:
        assert isinstance(subject.engine, EmbeddedEngine)
        if changed:
            await by_disk(subject, subject.other or Path(), await next_version(subject))
        await subject.engine.inject_fault("refuse_update", count=1)
        raise CheckFailed("seen on purpose")

    assert isinstance(subject.engine, EmbeddedEngine)
    runner = Runner(subject)
    first, *rest = [result async for result in runner.run([made(spoil), *select("identity.*")])]
    await subject.engine.inject_fault("refuse_update", count=0)
    assert (first.outcome, first.reason) == (Outcome.FAILED, "seen on purpose")
    if not changed:
        assert runner.lost is None
        assert {result.outcome for result in rest} == {Outcome.PASSED}
        return
    assert runner.lost is not None  # but the engine is not called dead
    assert runner.lost.startswith("after check made.up the server answered but did not serve, and no more checks")
    assert {(result.outcome, result.skipped) for result in rest} == {(Outcome.LACKING, True)}
    await by_disk(subject, subject.folder or Path(), await next_version(subject))


async def test_after_the_servers_death_nothing_more_is_tried(subject: Subject) -> None:
    async def kill(subject: Subject) -> None:
        assert isinstance(subject.engine, EmbeddedEngine)
        with pytest.raises(EngineError):
            await subject.engine.inject_fault("crash")
        raise CheckFailed("it was killed")

    runner = Runner(subject)
    results = [result async for result in runner.run([made(kill), *select("identity.*")])]
    assert runner.lost is not None
    assert runner.lost.startswith("after check made.up the server was dead, and no more checks were run: ")
    assert results[0].reason == "it was killed"
    reason = "not run: the server did not serve after made.up"
    assert {(r.outcome, r.reason) for r in results[1:]} == {(Outcome.LACKING, reason)}


def _without(subject: Subject, capability: Capability) -> EngineInfo:
    return replace(subject.info, capabilities=subject.info.capabilities - {capability})


async def test_no_check_is_left_out() -> None:
    """A check that is written but not listed would never run."""
    written = {
        one.name
        for module in pkgutil.iter_modules(checks.__path__, f"{checks.__name__}.")
        for value in vars(importlib.import_module(module.name)).values()
        for one in (value if isinstance(value, tuple) else (value,))
        if isinstance(one, Check)
    }
    assert written == {check.name for check in CHECKS}
    assert len(CHECKS) == len(written)
