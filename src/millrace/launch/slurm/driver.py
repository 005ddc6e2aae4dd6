"""The process that speaks to Slurm for the fleet's process, its parent. It ends when its standard input closes.

    python -m millrace.launch.slurm.driver JOB

It answers the calls of `millrace.launch.driven`. The steps belong to this process: each has an srun below it, and ends
when this process ends.
"""

import asyncio
import os
import sys
import time
from contextlib import suppress
from typing import Any, BinaryIO

from millrace.errors import LaunchError
from millrace.launch.base import Need
from millrace.launch.calls import Answerer
from millrace.launch.process import END_DEADLINE
from millrace.launch.slurm.job import (
    Job,
    JobNode,
    address_of,
    draining,
    movable,
    possible,
    ranked,
    read_job,
    seconds_of,
    with_step,
)
from millrace.launch.slurm.step import NoRoom, Step

NOTE_SECONDS = 10.0  # until a reservation that waits is mentioned
RETRY_SECONDS = 3.0  # between two attempts to get a place
CALL_DEADLINE = 120.0
LOOK_SECONDS = 10.0  # between two looks at the nodes that drain
DRAIN_SECONDS = 30.0  # for an engine on such a node, which Slurm drains without a deadline


class Driver(Answerer):
    """Answers the calls. Each public coroutine is one call, and its arguments are the fields of the call."""

    def __init__(self, out: BinaryIO, job: str) -> None:
        super().__init__(out, f"Slurm job {job}")
        self._job = job
        self._groups: dict[int, list[Step]] = {}
        self._asked: list[tuple[JobNode, Need]] = []  # of the steps that run or are about to
        self._count = 0
        self._signals: dict[str, float] = {}  # when a step on the node got SIGTERM
        self._gone: dict[str, float] = {}  # the nodes that are avoided, and when each is gone
        self._look_now = asyncio.Event()

    async def reserve(self, name: str, gpus: int, cpus: int, nodes: int, need: str, deadline: float) -> dict[str, Any]:
        """Get a step for each node."""
        asked = f"{name} asks Slurm for {nodes} x ({need})"
        begun, noted = time.monotonic(), False
        until = begun + deadline
        while True:
            job = await read_job(self._job)
            if not possible(job, Need(gpus, cpus), nodes):
                raise LaunchError(f"{asked}, and the job has too little; {job}")
            leaving = {*await self._leaving(job), *await self._avoided()}
            steps, reason = await self._steps(job.without(leaving), Need(gpus, cpus), nodes, name, until)
            if steps and self._gone.keys().isdisjoint(step.node.name for step in steps):
                break
            await self._close(steps)  # while they started, it was said that their node goes away
            away = "".join(f"; {node} goes away" for node in sorted(leaving))
            has = f"{job}; {self._taken(job)}{away}{reason}"
            waited = time.monotonic() - begun
            if waited >= deadline:
                raise LaunchError(f"{asked}, and did not get it within {deadline:.0f} s; {has}")
            if waited >= NOTE_SECONDS and not noted:
                self.say(note=f"{asked}, and waits; {has}")
                noted = True
            await asyncio.sleep(min(RETRY_SECONDS, deadline - waited))
        self._count += 1
        number = self._count
        self._groups[number] = steps
        try:
            hosts = [await address_of(step.node.name) for step in steps]
        except BaseException:
            await self.release(number)
            raise
        places = [
            {"host": host, "gpus": step.gpus, "python": step.python} for host, step in zip(hosts, steps, strict=True)
        ]
        return {"group": number, "places": places}

    async def free_ports(self, group: int, index: int, host: str, count: int) -> object:
        """Return the first of some consecutive ports that are free at a place."""
        return await self._step(group, index).call("free_ports", CALL_DEADLINE, host=host, count=count)

    async def start(self, group: int, index: int, **server: object) -> None:
        """Start a server at a place, and say from now on how it stands."""
        step = self._step(group, index)
        step.stands = lambda running, end, tail: self.say(group=group, index=index, running=running, end=end, tail=tail)
        await step.call("start", CALL_DEADLINE, **server)

    async def avoid(self, group: int, index: int, seconds: float) -> None:
        """Start nothing more on the node of a place, which goes away in so many seconds."""
        if group in self._groups:
            self._gone[self._groups[group][index].node.name] = time.monotonic() + seconds

    async def end(self, group: int, index: int) -> None:
        """End the server at a place."""
        if group in self._groups:  # otherwise it is released, and has ended
            await self._step(group, index).call("end", END_DEADLINE + CALL_DEADLINE)

    async def release(self, group: int) -> None:
        """End the steps of an engine."""
        await self._close(self._groups.pop(group, []))

    async def close(self) -> None:
        """End all steps."""
        await asyncio.gather(*map(self.release, list(self._groups)), return_exceptions=True)

    async def _look(self) -> None:
        """Say again and again which servers are on nodes that go away.

        A server is left alone if the job has no other place for its engine: Slurm lets it run on a node that drains,
        and if the whole job ends, the engine would only end earlier.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._look_now.wait()
            self._look_now.clear()
            if not self._groups:
                continue
            try:
                job = await read_job(self._job)
                leaving = await self._leaving(job)
                stays = job.without(await self._avoided())
            except LaunchError:
                continue  # the job has ended, and its steps with it, or Slurm does not answer at the moment
            engines = {number: [(step.node, step.need) for step in steps] for number, steps in self._groups.items()}
            for number in movable(stays, leaving, engines):
                for index, step in enumerate(self._groups[number]):
                    if (seconds := leaving.get(step.node.name)) is not None:
                        self.say(group=number, index=index, leaves=seconds)

    def _signalled(self, node: JobNode) -> None:
        self._signals[node.name] = time.monotonic()
        self._look_now.set()

    async def _leaving(self, job: Job) -> dict[str, float]:
        """Return the nodes that go away, and in how many seconds. A signal counts until its step must have ended."""
        leaving = dict.fromkeys(await draining(job), DRAIN_SECONDS)
        if self._signals:
            wait, now = await seconds_of("KillWait"), time.monotonic()
            self._signals = {name: at for name, at in self._signals.items() if at + wait > now}
            leaving |= {name: at + wait - now for name, at in self._signals.items()}
        return leaving

    async def _avoided(self) -> set[str]:
        """Return the nodes that go away, as a preemption by hand has said, until Slurm itself must know of it."""
        if self._gone:
            unknown, now = await seconds_of("SlurmdTimeout"), time.monotonic()
            self._gone = {name: gone for name, gone in self._gone.items() if gone + unknown > now}
        return set(self._gone)

    def _step(self, group: int, index: int) -> Step:
        if group not in self._groups:
            raise LaunchError("its place in the Slurm job is given back")
        return self._groups[group][index]

    async def _steps(self, job: Job, need: Need, nodes: int, name: str, until: float) -> tuple[list[Step], str]:
        """Return a step for each node, or none and what Slurm says. Tries no further node after `until`."""
        steps: list[Step] = []
        reason = ""
        for _ in range(nodes):
            near = [step.node.name for step in steps]
            for node in ranked(job, need, self._used(), near):
                self._asked.append((node, need))  # before the wait, so that engines beside this one go elsewhere
                try:
                    steps.append(await Step.open(job, node, need, name, self._signalled))
                    break
                except BaseException as error:
                    self._asked.remove((node, need))
                    if not isinstance(error, NoRoom):
                        await self._close(steps)
                        raise
                    reason = f"; Slurm says of {node.name}: {error}"
                    if time.monotonic() >= until:
                        break
            if len(steps) == len(near):
                await self._close(steps)
                return [], reason
        return steps, reason

    async def _close(self, steps: list[Step]) -> None:
        ends = await asyncio.gather(*(step.close() for step in steps), return_exceptions=True)
        for step in steps:
            self._asked.remove((step.node, step.need))
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    def _used(self) -> dict[str, Need]:
        used: dict[str, Need] = {}
        for node, need in self._asked:
            used = with_step(used, node, need)
        return used

    def _taken(self, job: Job) -> str:
        used = self._used()
        taken = [f"{used[node.name]} of {node.name}" for node in job.nodes if node.name in used]
        return f"this fleet's engines have {' and '.join(taken) or 'nothing'}"


async def serve(out: BinaryIO, job: str) -> None:
    """Answer calls until the input ends, and end all steps."""
    driver = Driver(out, job)
    driver.say(joined=driver.who)
    try:
        await driver.serve(driver._look())
    finally:
        await driver.close()


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asyncio.run(serve(out, sys.argv[1]))


if __name__ == "__main__":
    main()
