"""Engines outlive the owner of their fleet: it is killed, its followers generate on, and the next owner takes over."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM, PreTrainedModel

import millrace
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.start import ADMIN_KEY, API_KEY
from millrace.errors import EngineRefused, LaunchError, NoEngineError
from millrace.fleet.client import FleetClient
from millrace.launch.ports import free_port
from millrace.launch.process import ServerProcess
from millrace.types import Generation, Health, RoutingContext
from tests.fleet.test_fleet import expected, greedy, tensors
from tests.fleet.test_sharing import Process, following

KEY, ADMIN = "the engines' key", "the engines' admin key"
SHARED = "the fleet's key"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def urls(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sequence[str]]:
    """Two engines that no fleet has started."""
    logs = tmp_path_factory.mktemp("logs")
    servers, urls = [], []
    try:
        for number in range(2):
            port = free_port("127.0.0.1")
            command = [sys.executable, "-m", "millrace.engines.embedded", "--model", str(tiny_model)]
            command += ["--port", str(port), "--weight-version", "0", "--threads", "1"]
            environment = {"MILLRACE_API_KEY": KEY, "MILLRACE_ADMIN_API_KEY": ADMIN}
            name = f"engine-{number}"
            servers.append(await ServerProcess.start(name, command, logs / f"{name}.log", env=environment))
            urls.append(f"http://127.0.0.1:{port}")
        for server, url in zip(servers, urls, strict=True):
            engine = EmbeddedEngine("engine", url, api_key=KEY)

            async def healthy(engine: EmbeddedEngine = engine) -> bool:
                return await engine.health() is Health.READY

            await server.until_healthy(healthy, deadline=180)
            await engine.close()
        yield urls
    finally:
        await asyncio.gather(*(server.end() for server in servers))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@asynccontextmanager
async def owning(model: Path, port: int, config: Mapping[str, Any], **options: object) -> AsyncIterator[Process]:
    """A process that owns the fleet of these engines (`owning.py`). It is killed at the end, if it has not ended."""
    script = str(Path(__file__).with_name("owning.py"))
    arguments = [str(model), str(port), SHARED, json.dumps(config), json.dumps(options)]
    process = await asyncio.create_subprocess_exec(sys.executable, script, *arguments, stdin=PIPE, stdout=PIPE)
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def at(urls: Sequence[str]) -> Mapping[str, Any]:
    """The config of these engines."""
    return {"kind": "embedded", "urls": list(urls), "replicas": len(urls)}


class Generating:
    """Generates until it is told to stop. Every request must succeed."""

    def __init__(self, fleet: FleetClient) -> None:
        self._fleet = fleet
        self.made: list[Generation] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.made.append(await self._fleet.generate(greedy(f"loop/{len(self.made)}"), deadline=120))

    async def more(self, count: int = 5) -> list[Generation]:
        """Wait for `count` more generations, and return them. Raises the error of a request that failed."""
        before = len(self.made)
        async with asyncio.timeout(120):
            while len(self.made) < before + count:
                if self._task.done():
                    self._task.result()
                await asyncio.sleep(0.01)
        return self.made[before:]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def versions(made: Sequence[Generation]) -> set[int | None]:
    return {span.version for generation in made for span in generation.version_spans}


async def test_followers_generate_while_the_owner_is_away_and_find_the_next_one(
    urls: Sequence[str], tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    folder, port = str(tmp_path / "versions"), free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    async with owning(tiny_model, port, at(urls), folder=folder) as first:
        assert await first.read() == {"version": 0, "serves": [0, 0]}
        async with millrace.follow_fleet(url, SHARED) as follower, following(url, SHARED) as other:
            generating = Generating(follower)
            assert await other.read() == {"version": 0}
            assert await first.tell("publish 1.0 step 7") == {"version": 1, "serves": [1, 1]}
            await follower.reached(1, deadline=60)
            made = await other.tell("while the owner is there")
            assert made == {"ids": list(expected(model)), "spans": [[1, "step 7", 12]], "version": 1}

            with pytest.raises(LaunchError, match=f"^process {first.pid} owns the engine at {urls[0]}, .*follow"):
                async with millrace.open_fleet(at(urls), tiny_model, log_dir=tmp_path):
                    pass

            await first.kill()
            assert versions(await generating.more()) == {1}
            assert await other.tell("while no owner is there") == made
            with pytest.raises(NoEngineError, match="no engine at version 2 or later could serve within 0 s"):
                await follower.reached(2, deadline=0.1)

            # Its engines hold the last stored version, so they serve at once.
            async with owning(tiny_model, port, at(urls), folder=folder) as second:
                assert await second.read() == {"version": 1, "serves": [1, 1]}
                await generating.more()
                assert await second.tell("publish 0.5 step 8") == {"version": 2, "serves": [2, 2]}
                await follower.reached(2, deadline=60)
                assert (follower.version, follower.labels) == (2, {1: "step 7", 2: "step 8"})
                made = await other.tell("by the second owner")
                assert (made["spans"], made["version"]) == ([[2, "step 8", 12]], 2)
                await second.kill()
            assert versions(await generating.more()) == {2}

            # It does not know what its engines hold, so they serve after its first publish, whose number is new.
            async with owning(tiny_model, port, at(urls)) as third:
                assert await third.read() == {"version": 0, "serves": []}
                assert await third.tell("publish 1.0 step 9") == {"version": 3, "serves": [3, 3]}
                made = await other.tell("by the third owner")
                assert made == {"ids": list(expected(model)), "spans": [[3, "step 9", 12]], "version": 3}
                # It is killed in the middle of a publish.
                assert await third.tell("stop 1.5") == {"stopped": True}
                await third.kill()
            assert versions(await generating.more()) == {3}

            async with (
                millrace.open_fleet(at(urls), tiny_model, log_dir=tmp_path) as fourth,
                fourth.share(port=port, key=SHARED),
            ):
                report = await fourth.publish(tensors(model), label="step 10")
                assert (report.version, report.failed) == (4, {})
                await follower.reached(4, deadline=60)
                assert await generating.more()
            assert versions(await generating.more()) == {4}  # the engines were not started by it, and go on
            await generating.stop()


@pytest.fixture(scope="module", autouse=True)
def keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY, KEY)
        patch.setenv(ADMIN_KEY, ADMIN)
        yield


async def test_an_owner_on_another_host_is_noticed_at_the_next_publish(urls: Sequence[str]) -> None:
    """Claims do not reach there, so each owner is one adapter here."""
    url = urls[0]
    first, second = (EmbeddedEngine(name, url, api_key=KEY, admin_key=ADMIN) for name in ("first", "second"))
    try:
        await first.initialize()
        await second.initialize()
        before = (await first.info()).weight_version
        assert before is not None
        await first.begin_update(before + 1)
        with pytest.raises(EngineRefused, match="an update is already open"):
            await second.begin_update(before + 1)
        await first.rollback()
        await second._control("/update_weight_version", {"new_version": str(before + 1)})
        says = (
            f"another process publishes to it too: it reports weight version {before + 1}, .* left it at {before}; let"
        )
        with pytest.raises(EngineRefused, match=says):
            await first.begin_update(before + 2)
    finally:
        await first.close()
        await second.close()


async def test_a_suspect_engine_serves_again_while_the_owner_is_away(
    urls: Sequence[str], tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port("127.0.0.1")
    async with owning(tiny_model, port, at(urls[:1])) as owner:
        await owner.read()
        await owner.tell("publish 1.0 step 1")
        async with millrace.follow_fleet(f"http://127.0.0.1:{port}", SHARED) as follower:
            await owner.kill()
            await follower.replicas.suspect("embedded-0", EngineRefused("embedded-0", "a fault that has passed"))
            made = await follower.generate(greedy("again"), deadline=60, routing=RoutingContext(min_version=1))
            assert len(made.output_ids) == 12
