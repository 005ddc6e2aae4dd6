"""A fleet that its owner shares: processes that follow it, the versions' numbers and labels, and what goes wrong."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM, PreTrainedModel

import millrace
from millrace.errors import ArgumentError, ConfigError, OwnerError, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.launch.ports import free_port
from tests.fleet.test_fleet import CONFIG, expected, greedy, tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


class Process:
    """A process that reads lines, and prints a line of JSON for each."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def read(self) -> dict[str, Any]:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        async with asyncio.timeout(240):  # it imports torch meanwhile, also on a busy machine
            line = await self._process.stdout.readline()
        assert line, "it has ended"
        read: dict[str, Any] = json.loads(line)
        return read

    async def tell(self, line: str) -> dict[str, Any]:
        """Write a line, and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        return await self.read()

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Close its input, after which it ends by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(60):
            assert await self._process.wait() == 0


@asynccontextmanager
async def following(url: str, key: str) -> AsyncIterator[Process]:
    """A process that follows a fleet (`following.py`)."""
    script = str(Path(__file__).with_name("following.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, script, url, key, stdin=PIPE, stdout=PIPE)
    try:
        yield Process(process)
    finally:
        process.terminate()
        await process.wait()


async def test_a_version_numbers_itself_and_has_the_trainers_label(fleet: Fleet, model: PreTrainedModel) -> None:
    before = fleet.version
    assert before is not None
    report = await fleet.publish(tensors(model), label="global_step_10")
    assert (report.version, report.label, fleet.version) == (before + 1, "global_step_10", before + 1)
    report = await fleet.publish(tensors(model), before + 5, label=np.int64(11))  # type: ignore[arg-type]
    assert (report.version, report.label, fleet.version) == (before + 5, 11, before + 5)
    report = await fleet.publish(tensors(model))
    assert (report.version, report.label, fleet.version) == (before + 6, None, before + 6)
    assert fleet.labels == {before + 1: "global_step_10", before + 5: 11}
    events = [event.fields for event in fleet.event_log.newest if event.kind == "publish"]
    assert [(event["version"], event["label"]) for event in events[-3:]] == [
        (before + 1, "global_step_10"),
        (before + 5, 11),
        (before + 6, None),
    ]


async def test_a_version_that_no_engine_took_has_no_label(fleet: Fleet, model: PreTrainedModel) -> None:
    await fleet.publish(tensors(model), label="good")
    good, labels = fleet.version, dict(fleet.labels)
    with pytest.raises(PublishError, match="not newer"):
        await fleet.publish(tensors(model), good, label="again")
    with pytest.raises(PublishError, match="only one side|lm_head|norm"):
        await fleet.publish(tensors(model)[:-1], label="partial")
    with pytest.raises(ArgumentError, match="label must be text or an integer, and is 1.5"):
        await fleet.publish(tensors(model), label=1.5)  # type: ignore[arg-type]
    assert (fleet.version, fleet.labels) == (good, labels)
    assert fleet.event_log.newest[-1].fields["label"] == "partial"


async def test_another_process_generates_and_knows_the_step_of_its_tokens(fleet: Fleet, model: PreTrainedModel) -> None:
    async with fleet.share() as shared:
        assert shared.key not in repr(shared)
        async with following(shared.url, shared.key) as process:
            assert await process.read() == {"version": fleet.version}
            for step in ("step 1", "step 2", "step 3"):
                await fleet.publish(tensors(model), label=step)
                made = await process.tell(step)  # at once, so the follower may not have seen the new snapshot yet
                assert made == {
                    "ids": list(expected(model)),
                    "spans": [[fleet.version, step, 12]],
                    "version": fleet.version,
                }


async def test_a_follower_does_not_publish(fleet: Fleet, model: PreTrainedModel) -> None:
    async with fleet.share() as shared, millrace.follow_fleet(shared.url, shared.key) as follower:
        for publish in (follower.publish, follower.publish_lora):
            with pytest.raises(PublishError, match=f"follows the fleet at {shared.url}.*publish in the process that"):
                await publish(tensors(model), label=3)
        assert (await follower.generate(greedy("still"), deadline=20)).output_ids == expected(model)


async def test_a_wrong_key_and_a_url_without_an_owner_end_in_one_line(fleet: Fleet) -> None:
    [engine, _] = fleet.engines.values()
    nothing = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    async with fleet.share() as shared:
        for url, reason in (
            (shared.url, "refuses the key; pass the key of its Fleet.share$"),
            (
                nothing,
                rf"^no owner of a fleet answers at {nothing} \(no server listens at .*; share a fleet there first$",
            ),
            (engine.url, "(is not the owner of a fleet|refuses the key)"),
        ):
            with pytest.raises(OwnerError, match=reason) as caught:
                async with millrace.follow_fleet(url, "another"):
                    pass
            assert "\n" not in str(caught.value)
        with pytest.raises(
            ConfigError, match=f"can't be shared at 127.0.0.1:{shared.url.rpartition(':')[2]}.*another port"
        ):
            async with fleet.share(port=int(shared.url.rpartition(":")[2])):
                pass
        with pytest.raises(ConfigError, match="198.51.100.7 is not an address of this host"):
            async with fleet.share("198.51.100.7"):
                pass
        for key in ("", "two\nlines", " padded"):
            with pytest.raises(ArgumentError, match="key must be ASCII text"):
                async with fleet.share(key=key):
                    pass


async def test_a_fleet_is_shared_with_other_hosts_only_if_an_address_says_so(fleet: Fleet) -> None:
    async with fleet.share("0.0.0.0", key="a key") as shared:  # that is what is tested
        assert shared.url.startswith("http://127.0.0.1:")
        async with millrace.follow_fleet(shared.url, "a key", seed=3) as follower:
            await follower.reached(fleet.version or 0, deadline=20)
