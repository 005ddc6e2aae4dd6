"""What the tests of all launchers for clusters do with a fleet."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace import Fleet, open_fleet
from millrace.errors import LaunchError
from millrace.launch.base import Need
from millrace.launch.driven import DrivenLauncher
from millrace.serve.preempting import preempt
from millrace.types import GenerateRequest, Generation, SamplingParams
from tests.fleet.test_fleet import expected, greedy, slow_down
from tests.launch.processes import alive, processes_with

REQUEST = GenerateRequest((5, 6, 7), SamplingParams(max_new_tokens=4, temperature=0.0))
OWNER = """
    import asyncio, signal, sys
    from millrace import open_fleet

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it

    async def main():
        config = {"kind": "embedded", "launch": sys.argv[1], "cluster": sys.argv[2], "replicas": 2, "threads": 1}
        async with open_fleet(config, sys.argv[3], log_dir=sys.argv[4]):
            print("up", flush=True)
            await asyncio.sleep(600)

    asyncio.run(main())
"""


def engine_hosts(fleet: Fleet) -> list[str]:
    return sorted(one.engine.url.split("/")[2].rpartition(":")[0] for one in fleet.replicas.by_name.values())


def served(model: Path) -> str:
    """What the command line of an engine with this model has, and that of its guard."""
    return f"millrace.engines.embedded --model {model}"


async def require_takes_weights(fleet: Fleet, model_path: Path) -> Generation:
    """Requires that a fleet which has published nothing generates, takes a version, and generates by it.

    Returns what it generates then.
    """
    before = await fleet.generate(REQUEST, deadline=60)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    report = await fleet.publish(lambda: list(model.named_parameters()))
    after = await fleet.generate(REQUEST, deadline=60)
    assert len(after.output_ids) == 4
    assert before.version_spans[-1].version == 0
    assert after.version_spans[-1].version == report.version
    return after


async def require_leaves_its_host_in_time(
    fleet: Fleet, model_path: Path, announce: Callable[[str], None], seconds: float
) -> None:
    """Requires that an engine leaves a host which is said to go away, and that another one starts on the other host.

    The fleet has an engine on each of two hosts with room for two. announce: says it of the host at an address, which
    goes away in so many seconds.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path)
    leaving, staying = engine_hosts(fleet)
    (victim,) = (name for name, one in fleet.engines.items() if f"//{leaving}:" in one.url)
    await slow_down(fleet, 0.1)
    asked = [asyncio.create_task(fleet.generate(greedy(f"r{i}", 60), deadline=90)) for i in range(8)]
    for engine in fleet.engines.values():
        while not (await engine.loads()).running_requests:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(seconds):
        await asyncio.to_thread(announce, leaving)
        async with fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(lambda: victim not in fleet.engines)
    await slow_down(fleet, 0.0)
    for made in await asyncio.gather(*asked):
        assert made.output_ids == expected(model, 60)
        assert (len(made.logprobs), made.version_spans[-1].end) == (60, 60)
    assert not any(fleet.event_log.metrics.retries.values())
    async with asyncio.timeout(90), fleet.replicas.changed:
        await fleet.replicas.changed.wait_for(lambda: len(fleet.snapshot.routable) == 2)
    assert engine_hosts(fleet) == [staying, staying]


def by_hand(fleet: Fleet, deadline: float) -> Callable[[str], None]:
    """How `POST /preempt` says of the host at an address that it goes away, for another thread."""
    loop = asyncio.get_running_loop()

    def announce(host: str) -> None:
        asyncio.run_coroutine_threadsafe(preempt(fleet, None, host, deadline), loop).result(deadline)

    return announce


async def require_avoids_a_host(launcher: DrivenLauncher, log_path: Path) -> None:
    """Requires that nothing more starts on a host which goes away, as a preemption by hand says.

    The cluster has two CPUs on each of its two hosts. Also what waits for a place does not start there.
    """
    (place,) = await launcher.reserve("leaves", Need(0, 1), 1, deadline=60)
    others = await launcher.reserve("others", Need(0, 2), 1, deadline=60)
    assert others[0].host != place.host
    command = [place.python, "-c", "import time; time.sleep(600)"]
    server = await place.start("leaves", command, log_path, env={}, leftovers=())
    waiting = asyncio.create_task(launcher.reserve("waiting", Need(0, 2), 1, deadline=60))
    with pytest.raises(TimeoutError):  # there is no room
        await asyncio.wait_for(asyncio.shield(waiting), 3.0)
    await server.avoid(place.host, 300.0)
    await launcher.release([place])  # so that there is room on its host
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 6.0)
    with pytest.raises(LaunchError, match=r"and did not get it within 3 s; .* goes away"):
        await launcher.reserve("one", Need(0, 1), 1, deadline=3)
    await launcher.release(others)
    (placed,) = await waiting
    assert placed.host == others[0].host


async def require_uses_a_host_again(launcher: DrivenLauncher, log_path: Path) -> None:
    """Requires that a host which was said to go away is used again after its time, since it has not gone away.

    The cluster has two CPUs on each of its two hosts, and must know a minute after the end of a host that it is gone.
    """
    places = [(await launcher.reserve(name, Need(0, 2), 1, deadline=60))[0] for name in ("first", "second")]
    command = [places[0].python, "-c", "import time; time.sleep(600)"]
    server = await places[0].start("first", command, log_path, env={}, leftovers=())
    await server.avoid(places[0].host, 1.0)
    begun = time.monotonic()
    await launcher.release(places[:1])
    (again,) = await launcher.reserve("again", Need(0, 2), 1, deadline=120)
    assert again.host == places[0].host
    assert time.monotonic() - begun > 50


def ranks(model: Path) -> dict[int, int]:
    """The process of each rank of an engine over two nodes with this model."""
    own = set(processes_with(str(model), without="guard.py"))
    return {rank: pid for rank in (0, 1) for pid in own.intersection(processes_with(f"--node-rank={rank}"))}


def over_two_nodes(config: dict[str, object]) -> dict[str, object]:
    """The settings of a stock engine over two nodes with two CPUs each. config: the launcher, and the engine's kind."""
    return {
        **config,
        "device": "cpu",
        "nnodes": 2,
        "tp_size": 2,
        "threads": 2,
        "start_timeout": 300.0,
        "env": {f"{str(config['kind']).upper()}_CPU_OMP_THREADS_BIND": "0|1"},
    }


async def require_runs_over_two_hosts(
    config: dict[str, object], hosts: Sequence[str], model: Path, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Requires that an engine over two nodes runs on two hosts, takes weights, restarts as a whole, and leaves nothing.

    config: the launcher, and the kind of the engine. Each host has two CPUs.
    """
    async with open_fleet(over_two_nodes(config), model, log_dir=logs, restarts=2, transport="gloo") as fleet:
        placed = sorted(hosts, key=lambda host: host not in engine_hosts(fleet))  # the host of node 0 is the first
        before = await require_takes_weights(fleet, model)
        (name,) = fleet.engines
        old, first = ranks(model), fleet.replicas.by_name[name]
        for rank in old:
            assert re.search(rf"TP{rank}\b", (logs / f"{name}-node{rank}.log").read_text())
        os.kill(old[1], signal.SIGKILL)
        async with asyncio.timeout(400), fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(
                lambda: fleet.replicas.by_name[name] is not first and bool(fleet.snapshot.routable)
            )
        ended = [record.message for record in caplog.records if f"{name}-node" in record.message]
        assert ended[0].startswith(f"{name}-node1 was killed by SIGKILL (on {placed[1]})\nlast lines of {logs}")
        assert set(old.values()).isdisjoint(ranks(model).values())
        assert not any(alive(pid) for pid in old.values())
        after = await fleet.generate(REQUEST, deadline=120)
        assert (after.output_ids, after.version_spans) == (before.output_ids, before.version_spans)
    assert not processes_with(str(model))


async def require_leaves_as_a_whole(
    config: dict[str, object],
    hosts: Sequence[str],
    host_of: Callable[[int], str],
    announce: Callable[[str], None] | None,
    model: Path,
    logs: Path,
) -> None:
    """Requires that an engine over two nodes leaves if the host of its second node is said to go away, and that its
    replacement runs on the hosts that stay, with the version that it had.

    config: the launcher, and the kind of the engine. hosts: three, with two CPUs each. host_of: the host of a process.
    announce: says of a host that it goes away, in 120 s or later; None for `POST /preempt`.
    """
    async with open_fleet(over_two_nodes(config), model, log_dir=logs, transport="gloo") as fleet:
        before = await require_takes_weights(fleet, model)
        (first,) = fleet.replicas.by_name.values()
        old = ranks(model)
        leaving = host_of(old[1])
        assert leaving != host_of(old[0])
        await asyncio.to_thread(announce or by_hand(fleet, 120.0), leaving)
        async with asyncio.timeout(120), fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(lambda: first not in fleet.replicas.by_name.values())
        assert not any(alive(pid) for pid in old.values())
        async with asyncio.timeout(300), fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(lambda: bool(fleet.snapshot.routable))
        assert {host_of(pid) for pid in ranks(model).values()} == set(hosts).difference([leaving])
        after = await fleet.generate(REQUEST, deadline=120)
        assert (after.output_ids, after.version_spans) == (before.output_ids, before.version_spans)
    assert not processes_with(str(model))


async def require_gives_back_what_comes_too_late(launcher: DrivenLauncher) -> None:
    """Requires that a place is free again which came when nobody waited for it any more.

    The cluster has two GPUs on each of its two hosts.
    """
    taken = [await launcher.reserve(name, Need(2, 1), 1, deadline=60) for name in ("first", "second")]
    waiting = asyncio.create_task(launcher.reserve("waiting", Need(2, 1), 1, deadline=60))
    with pytest.raises(TimeoutError):  # there is no room
        await asyncio.wait_for(asyncio.shield(waiting), 1.0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for places in taken:
        await launcher.release(places)
    async with asyncio.timeout(60):
        await asyncio.gather(*launcher.unwanted)  # the cluster has given the place, and got it back
    for name in ("third", "fourth"):
        await launcher.reserve(name, Need(2, 1), 1, deadline=10)


@asynccontextmanager
async def owner(launch: str, cluster: str, model: Path, logs: Path) -> AsyncIterator["subprocess.Popen[str]"]:
    """A process that has opened a fleet of two engines. It is killed when the block ends."""
    command = [sys.executable, "-c", textwrap.dedent(OWNER), launch, cluster, str(model), str(logs)]
    with (logs / "owner").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)  # noqa: ASYNC220 # it returns at once
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "up\n", (logs / "owner").read_text()
        yield process
    finally:
        process.kill()
        process.communicate()
