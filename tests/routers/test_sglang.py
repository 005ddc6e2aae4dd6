"""The real sglang-router in front of real embedded engines."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import ConfigError, EngineRefused, EngineUnreachable, LaunchError, NoEngineError
from millrace.fleet.event_log import EventLog, Outcome
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Attested
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.launch.ports import free_port
from millrace.routers.base import RouterClient
from millrace.routers.start import ROUTER_KEY, StartedRouter, start_router
from millrace.types import (
    ANYWHERE,
    FinishReason,
    GenerateRequest,
    Generation,
    MemoryTag,
    RoutingContext,
    SamplingParams,
)
from tests.engines.processes import below, command_lines
from tests.fleet.test_fleet import (
    CONFIG,
    busy,
    embedded,
    expected,
    following,
    greedy,
    idle,
    running,
    slow_down,
    tensors,
)

ROUTER = SGLangRouterConfig(kind="sglang")
BY_ROUTER = ("sglang-router", Outcome.FINISHED)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", autouse=True)
def installed(router_python: Callable[[str], Path]) -> None:
    router_python("sglang")


@pytest.fixture(scope="module")
def dead_proxy() -> Iterator[None]:
    """The environment names a proxy at which nothing listens, as on hosts without outgoing access."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            for spelling in (name, name.upper()):
                patch.setenv(spelling, "http://127.0.0.1:9")
        for spelling in ("no_proxy", "NO_PROXY"):
            patch.delenv(spelling, raising=False)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, dead_proxy: None
) -> AsyncIterator[Fleet]:
    logs = tmp_path_factory.mktemp("logs")
    async with open_fleet(
        CONFIG, tiny_model, log_dir=logs, folder=logs / "versions", router=ROUTER, restarts=3
    ) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared_fleet: Fleet) -> AsyncIterator[Fleet]:
    await until_listed(shared_fleet, 2)
    yield shared_fleet
    await slow_down(shared_fleet, 0.0)
    await shared_fleet.replicas.until(lambda: len(shared_fleet.snapshot.routable) == 2, 30)


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def router_of(fleet: Fleet) -> RouterClient:
    assert fleet.external_router is not None
    return fleet.external_router.router


async def until_listed(fleet: Fleet, count: int) -> None:
    """Waits until the router sends requests to `count` engines and the fleet knows it."""
    assert fleet.external_router is not None
    async with asyncio.timeout(30):
        while not (fleet.external_router.serving and len(fleet.external_router.engines) == count):
            await asyncio.sleep(0.02)


async def test_a_request_goes_by_the_router_and_its_tokens_are_the_models(fleet: Fleet, model: PreTrainedModel) -> None:
    before = fleet.event_log.metrics.requests[BY_ROUTER]
    made = await fleet.generate(greedy("one"), deadline=20)
    assert made.request_id == "one"
    assert made.output_ids == expected(model)
    assert len(made.logprobs) == 12
    assert [span.version for span in made.version_spans] == [0]
    assert fleet.event_log.metrics.requests[BY_ROUTER] == before + 1


async def test_a_dead_proxy_of_the_environment_is_never_used(fleet: Fleet) -> None:
    assert "no_proxy" not in os.environ
    assert os.environ["http_proxy"] == "http://127.0.0.1:9"
    assert len(await router_of(fleet).workers()) == 2
    before = fleet.event_log.metrics.requests[BY_ROUTER]
    await asyncio.gather(*(fleet.generate(greedy(f"proxy{number}"), deadline=20) for number in range(4)))
    assert fleet.event_log.metrics.requests[BY_ROUTER] == before + 4


async def test_sessions_stay_where_they_are_and_are_spread(fleet: Fleet) -> None:
    await slow_down(fleet, 0.05)

    async def ask(routing: RoutingContext, count: int, name: str) -> list[asyncio.Task[object]]:
        tasks: list[asyncio.Task[object]] = []
        for i in range(count):
            tasks.append(asyncio.create_task(fleet.generate(greedy(f"{name}{i}", 200), deadline=60, routing=routing)))
            async with asyncio.timeout(10):
                while sum(await running(fleet)) < len(tasks):
                    await asyncio.sleep(0.01)
        return tasks

    tasks = await ask(RoutingContext(session="s"), 4, "same")
    assert sorted(await running(fleet)) == [0, 4]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(fleet)
    tasks = [
        asyncio.create_task(fleet.generate(greedy(f"other{i}", 200), deadline=60, routing=RoutingContext(group=str(i))))
        for i in range(6)
    ]
    async with asyncio.timeout(10):
        while sum(await running(fleet)) < 6:
            await asyncio.sleep(0.01)
    assert min(await running(fleet)) >= 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_cancelled_request_is_aborted_on_the_engine(fleet: Fleet) -> None:
    await slow_down(fleet, 0.05)
    asked = asyncio.create_task(fleet.generate(greedy("given-up", 200), deadline=60))
    await busy(fleet)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await idle(fleet)


async def test_a_sleeping_engine_is_in_no_list_of_the_router(fleet: Fleet, model: PreTrainedModel) -> None:
    version = following(fleet)
    await fleet.sleep()
    async with asyncio.timeout(10):
        while await router_of(fleet).workers():
            await asyncio.sleep(0.01)
    asked = asyncio.create_task(fleet.generate(greedy("waits"), deadline=30))
    await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
    await fleet.publish(tensors(model), version)
    await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
    assert [span.version for span in (await asked).version_spans] == [version]
    await until_listed(fleet, 2)


async def test_a_publish_ends_no_request_of_the_router(fleet: Fleet, model: PreTrainedModel) -> None:
    version = following(fleet)
    await slow_down(fleet, 0.05)
    asked = asyncio.create_task(fleet.generate(greedy("across", 40), deadline=60))
    await busy(fleet)
    await fleet.publish(tensors(model), version)
    made = await asked
    assert made.finish_reason is FinishReason.LENGTH
    assert [span.version for span in made.version_spans] == [version - 1, version]


async def test_a_request_that_not_every_engine_may_serve_goes_straight(fleet: Fleet) -> None:
    served, first = following(fleet) - 1, embedded(fleet)[0].name
    replica_set = fleet.replicas
    assert isinstance(replica_set, OwnedReplicaSet)
    await replica_set.apply(first, Attested(served + 1))
    try:
        for routing, straight in (
            (RoutingContext(exact_version=served + 1), True),
            (RoutingContext(min_version=served), False),
        ):
            before = fleet.event_log.metrics.requests[first, Outcome.FINISHED]
            await fleet.generate(greedy("exact"), deadline=20, routing=routing)
            assert (fleet.event_log.metrics.requests[first, Outcome.FINISHED] > before) is straight
    finally:
        await replica_set.apply(first, Attested(served))


@pytest.mark.parametrize(
    ("extra", "field"),
    [({"return_routed_experts": True}, "return_routed_experts"),
     ({"sampling_params": {"logit_bias": {"1": 1.0}}}, "sampling_params.logit_bias")],
)  # fmt: skip
async def test_a_field_that_the_router_would_drop_is_refused(
    fleet: Fleet, extra: dict[str, object], field: str
) -> None:
    request = GenerateRequest((5, 6), SamplingParams(2), request_id="lost", extra=extra)
    with pytest.raises(EngineRefused, match=f"would drop extra.{field} silently"):
        await fleet.generate(request, deadline=20)


async def test_an_engine_that_dies_is_taken_off_and_comes_back(fleet: Fleet) -> None:
    first = embedded(fleet)[0]
    with pytest.raises(EngineUnreachable):
        await first.inject_fault("crash")
    async with asyncio.timeout(10):
        while first.url in await router_of(fleet).workers():
            await asyncio.sleep(0.01)
    assert (await fleet.generate(greedy("after"), deadline=20)).finish_reason is FinishReason.LENGTH
    await fleet.replicas.until(lambda: len(fleet.snapshot.routable) == 2, 60)
    await until_listed(fleet, 2)
    assert first.url not in await router_of(fleet).workers()


async def test_requests_go_straight_while_the_router_is_dead(fleet: Fleet, model: PreTrainedModel) -> None:
    await slow_down(fleet, 0.05)
    url = router_of(fleet).url
    asked = asyncio.create_task(fleet.generate(greedy("cut-off", 200), deadline=60))
    await busy(fleet)
    # The router gives its process this name.
    [pid] = [pid for pid in below(os.getpid()) if "sglang::router" in command_lines({pid})]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineUnreachable, match="sglang-router"):
        await asked
    await idle(fleet)
    await slow_down(fleet, 0.0)
    before = fleet.event_log.metrics.requests[BY_ROUTER]
    assert (await fleet.generate(greedy("straight"), deadline=20)).output_ids == expected(model)
    assert fleet.event_log.metrics.requests[BY_ROUTER] == before
    await until_listed(fleet, 2)
    assert router_of(fleet).url != url
    assert (await fleet.generate(greedy("again"), deadline=20)).output_ids == expected(model)
    assert fleet.event_log.metrics.requests[BY_ROUTER] == before + 1
    kinds = [entry.kind for entry in fleet.event_log.newest if entry.engine == "sglang-router"]
    assert kinds[kinds.index("router_down") :].count("router_up") == 1


@pytest_asyncio.fixture(loop_scope="module")
async def other_router(tmp_path: Path) -> AsyncIterator[StartedRouter]:
    started = await start_router(ROUTER, log_dir=tmp_path)
    yield started
    await started.end()


@pytest_asyncio.fixture(loop_scope="module")
async def stranger() -> AsyncIterator[str]:
    """The URL of a worker that is none of the fleet's engines."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port("127.0.0.1")
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://127.0.0.1:{port}"
    await runner.cleanup()


async def test_a_router_that_millrace_did_not_start(
    other_router: StartedRouter, stranger: str, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = other_router.router
    assert other_router.process is not None
    monkeypatch.setenv(ROUTER_KEY, router.key or "")
    await router.register(EmbeddedEngine("stranger", stranger), deadline=20)
    config = SGLangRouterConfig(kind="sglang", url=router.url, fallback="none")
    attach = partial(start_router, config, log_dir=tmp_path)

    async def straight(request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        raise AssertionError(f"{request.request_id} went straight, {routing}, {deadline}")

    with EventLog() as event_log:
        async with ExternalRouter.open(
            fleet.replicas, event_log, attach, fallback=False, restarts=0
        ) as external_router:
            await external_router.generate(greedy("alone"), ANYWHERE, deadline=20, direct=straight)
            assert event_log.metrics.requests[BY_ROUTER] == 1
            async with asyncio.timeout(10):
                while len(listed := await router.workers()) < 2:
                    await asyncio.sleep(0.02)
            assert listed.keys() == {engine.url for engine in embedded(fleet)}
        assert not await router.workers()
        async with ExternalRouter.open(
            fleet.replicas, event_log, attach, fallback=False, restarts=0
        ) as external_router:
            await other_router.process.end()
            with pytest.raises(NoEngineError, match="sglang-router can't be used: .*router.fallback: direct"):
                await external_router.generate(greedy("nowhere"), ANYWHERE, deadline=1, direct=straight)


async def test_a_router_that_can_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="unrecognized arguments: --no-such-thing"):
        await start_router(SGLangRouterConfig(kind="sglang", args={"no_such_thing": True}), log_dir=tmp_path)
    with pytest.raises(LaunchError, match="no sglang-router answers at http://127.0.0.1:9"):
        await start_router(SGLangRouterConfig(kind="sglang", url="http://127.0.0.1:9"), log_dir=tmp_path)


async def test_engines_whose_requests_it_would_cut_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router vllm drops parts of the requests to embedded engines; use sglang"):
        async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path, router=VLLMRouterConfig(kind="vllm")):
            pass
