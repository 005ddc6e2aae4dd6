"""The process that speaks to Ray for the fleet's process, its parent. It ends when its standard input closes.

    python -m millrace.launch.ray_cluster.driver [ADDRESS]

It answers the calls of `millrace.launch.driven`. The actors belong to this process: Ray ends them when it ends.
"""

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from millrace.errors import LaunchError
from millrace.launch import guard
from millrace.launch.calls import Answerer
from millrace.launch.process import END_DEADLINE
from millrace.launch.ray_cluster.actor import NodeActor

NOTE_SECONDS = 10.0  # until a reservation that waits is mentioned
ACTOR_DEADLINE = 120.0  # seconds until an actor runs: its process imports Millrace, perhaps from a slow disk
LOOK_SECONDS = 2.0  # between two looks at the nodes that drain
LOOK_DEADLINE = 10.0
DRAIN_SECONDS = 30.0  # for engines on a node that drains without a deadline
GONE_SECONDS = 65.0  # until Ray knows that a node is gone: five checks without an answer, of 10 s, and 3 s between them
UNAVAILABLE_SECONDS = 15.0  # an actor that does not answer for so long is gone
# Ray would kill the guard together with the actor, and the guard is to end the server's process tree in order.
ACTOR_ENVIRONMENT = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}


@dataclass(slots=True)
class Group:
    """The places of an engine. nodes: the ids of Ray's nodes that they are on, once their actors run."""

    placed: PlacementGroup
    actors: list[Any] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)


class Driver(Answerer):
    """Answers the calls. Each public coroutine is one call, and its arguments are the fields of the call."""

    def __init__(self, out: BinaryIO, address: str) -> None:
        super().__init__(out, f"the Ray cluster at {address}")
        self._groups: dict[int, Group] = {}
        self._watches: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._count = 0
        self._gone: dict[str, float] = {}  # the nodes that are avoided, and when each is gone

    def said(self, error: BaseException) -> str:
        """Return what an error of Ray says."""
        return said(error)

    async def reserve(self, name: str, gpus: int, cpus: int, nodes: int, need: str, deadline: float) -> dict[str, Any]:
        """Get a placement group with an actor for each node."""
        bundles = [{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})] * nodes
        asked, ends = f"{name} asks Ray for {nodes} x ({need})", time.monotonic() + deadline
        while True:
            placed = await self._placed(bundles, asked, deadline, ends)
            self._count += 1
            number = self._count
            group = self._groups[number] = Group(placed)
            try:
                places = await self._start_actors(group, nodes, cpus, gpus)
            except RayError as error:
                await self.release(number)
                raise LaunchError(
                    f"{name}: Ray's actor can't start: {said(error)}; Millrace must be installed in Ray's interpreter "
                    "on all hosts"
                ) from error
            except BaseException:
                await self.release(number)
                raise
            if self._avoided().isdisjoint(group.nodes):
                return {"group": number, "places": places}
            await self.release(number)  # while the actors started, it was said that their host goes away

    async def free_ports(self, group: int, index: int, host: str, count: int) -> int:
        """Return the first of some consecutive ports that are free at a place."""
        first = await self._actor(group, index).free_ports.remote(host, count)
        if isinstance(first, str):
            raise LaunchError(first)
        return int(first)

    async def start(
        self,
        group: int,
        index: int,
        name: str,
        command: list[str],
        log_path: str,
        env: dict[str, str],
        leftovers: list[str],
    ) -> None:
        """Start a server at a place, and say from now on how it stands."""
        actor = self._actor(group, index)
        if wrong := await actor.start.remote(name, command, log_path, env, leftovers):
            raise LaunchError(wrong)
        self._watches[group, index] = asyncio.create_task(self._watch(group, index, actor, name))

    async def avoid(self, group: int, index: int, seconds: float) -> None:
        """Place nothing more on the node of a place, which goes away in so many seconds."""
        if group in self._groups:
            self._gone[self._groups[group].nodes[index]] = time.monotonic() + seconds

    async def end(self, group: int, index: int) -> None:
        """End the server at a place."""
        if group not in self._groups or (watch := self._watches.get((group, index))) is None or watch.done():
            return  # it is released, or has ended
        async with asyncio.timeout(END_DEADLINE + UNAVAILABLE_SECONDS):
            wrong = await self._actor(group, index).end.remote()
            if wrong is not None:
                raise LaunchError(wrong)
            await watch

    async def release(self, group: int) -> None:
        """End the actors of a placement group, and give its resources back."""
        if group not in self._groups:
            return
        given_back = self._groups.pop(group)
        for index, actor in enumerate(given_back.actors):
            if (watch := self._watches.pop((group, index), None)) is not None:
                watch.cancel()
            await asyncio.to_thread(ray.kill, actor)
        await asyncio.to_thread(remove_placement_group, given_back.placed)

    async def _look(self) -> None:
        """Say again and again which servers are on nodes that drain."""
        head, told = internal_kv_get_gcs_client(), False  # the public list of nodes comes from the dashboard only
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:  # ms since 1970; 0 for no deadline
                ends = await asyncio.to_thread(head.get_draining_nodes, timeout=LOOK_DEADLINE)
            except Exception as error:  # it is no public call; if the cluster is gone, Ray ends this process
                if not told:
                    self.say(note=f"{self.who} does not say which nodes drain, and is asked again: {said(error)}")
                told = True
                continue
            told = False
            for number, group in self._groups.items():
                for index, node in enumerate(group.nodes):
                    if (end := ends.get(node)) is not None:
                        self.say(group=number, index=index, leaves=end / 1000 - time.time() if end else DRAIN_SECONDS)

    def _actor(self, group: int, index: int) -> Any:
        if group not in self._groups:
            raise LaunchError("its place on the Ray cluster is given back")
        return self._groups[group].actors[index]

    async def _start_actors(self, group: Group, nodes: int, cpus: int, gpus: int) -> list[dict[str, Any]]:
        """Start the actor of each node, and return where they are."""
        actor = ray.remote(NodeActor)
        for index in range(nodes):
            at = PlacementGroupSchedulingStrategy(group.placed, placement_group_bundle_index=index)
            options = actor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=at, runtime_env=ACTOR_ENVIRONMENT)
            group.actors.append(options.remote())
        async with asyncio.timeout(ACTOR_DEADLINE):
            places = await asyncio.gather(*(one.where.remote() for one in group.actors))
        group.nodes = [place["node"] for place in places]
        return list(places)

    def _avoided(self) -> set[str]:
        """Return the ids of the nodes that go away, as a preemption by hand has said."""
        now = time.monotonic()
        self._gone = {node: gone for node, gone in self._gone.items() if gone + GONE_SECONDS > now}
        return set(self._gone)

    async def _placed(
        self, bundles: list[dict[str, float]], asked: str, deadline: float, ends: float
    ) -> PlacementGroup:
        """Return a placement group that has its resources, away from the nodes that are avoided."""
        strategy, noted = "PACK" if len(bundles) > 1 else "SPREAD", False
        while True:
            avoided = self._avoided()
            elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}] * len(bundles) if avoided else None
            group = await asyncio.to_thread(placement_group, bundles, strategy, bundle_label_selector=elsewhere)
            try:
                while self._avoided() == avoided:
                    if await asyncio.to_thread(group.wait, 1.0):
                        return group
                    left = ends - time.monotonic()
                    if left <= 0:
                        has = await asyncio.to_thread(self._has)
                        raise LaunchError(f"{asked}, and did not get it within {deadline:.0f} s; {has}")
                    if deadline - left >= NOTE_SECONDS and not noted:
                        self.say(note=f"{asked}, and waits; {await asyncio.to_thread(self._has)}")
                        noted = True
            except BaseException:
                await asyncio.to_thread(remove_placement_group, group)
                raise
            await asyncio.to_thread(remove_placement_group, group)

    def _has(self) -> str:
        """Return what the cluster has and what of it is free, in words."""
        total, free = ray.cluster_resources(), ray.available_resources()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        counts = [f"{total.get(one, 0):g} {one}s, {free.get(one, 0):g} of them free" for one in ("GPU", "CPU")]
        hosts = sorted(node["NodeManagerAddress"] for node in nodes if node["NodeID"] in self._gone)
        away = "".join(f"; {host} goes away" for host in hosts)
        return f"{self.who} has {len(nodes)} hosts with {' and '.join(counts)}{away}"

    async def _watch(self, group: int, index: int, actor: Any, name: str) -> None:
        """Say how a server stands, until it has ended."""
        told, answered = "", time.monotonic()
        while True:
            try:
                running, end, tail = await actor.watch.remote()
                answered = time.monotonic()
            except ActorUnavailableError as error:
                if time.monotonic() - answered < UNAVAILABLE_SECONDS:
                    await asyncio.sleep(1.0)
                    continue
                running, end, tail = (
                    False,
                    f"{name} ended with its Ray actor, which does not answer: {said(error)}",
                    told,
                )
            except RayError as error:
                running, end, tail = False, f"{name} ended with its Ray actor: {said(error)}", told
            if tail != told or not running:
                self.say(group=group, index=index, running=running, end=end, tail=tail)
            told = tail
            if not running:
                return


def said(error: BaseException) -> str:
    """Return what an error of Ray says, in one line: the last line that is neither a traceback nor an id."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [
        line for line in lines if line.startswith(("The actor is dead", "The actor died", "ModuleNotFoundError"))
    ]
    return (reasons or lines or [type(error).__name__])[-1][:300]


async def serve(out: BinaryIO, address: str | None) -> None:
    """Join the cluster, or start one, and answer calls until the input ends."""
    guard.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL)  # the input is not read while Ray looks for its cluster
    context = ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
    guard.prctl(guard.PR_SET_PDEATHSIG, 0)
    driver = Driver(out, context.address_info["gcs_address"])
    driver.say(joined=driver.who)
    await driver.serve(driver._look())


def main() -> None:
    # Ray writes to the standard output, which is for answers here.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        asyncio.run(serve(out, sys.argv[1] if len(sys.argv) > 1 else None))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
