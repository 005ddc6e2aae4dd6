"""One step of a job, which runs the agent of one node of an engine: the srun, and calls to the agent."""

import asyncio
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from millrace.errors import LaunchError
from millrace.launch.base import Need
from millrace.launch.calls import MOST_BYTES, Caller, ends_within
from millrace.launch.process import END_DEADLINE
from millrace.launch.slurm.agent import BEAT_SECONDS
from millrace.launch.slurm.job import Job, JobNode, slurm

IMMEDIATE_SECONDS = 2  # in which Slurm makes the step, or says that there is no room
AGENT_DEADLINE = 120.0  # seconds until the agent answers: it imports Millrace, perhaps from a slow disk
END_SECONDS = END_DEADLINE + 15.0  # until a step has ended: its server, its agent, and Slurm's epilogue
NO_STEP = re.compile(r"Unable to (?:create step|confirm allocation|allocate resources)[^:]*: (.+)")
OF_SRUN = re.compile(r"^(srun: |slurmstepd[\w.-]*: )(error: )?")


class NoRoom(Exception):
    """Slurm has made no step. The text is its reason."""


def command(job: Job, node: JobNode, need: Need, name: str) -> list[str]:
    """Return the srun of a step. Slurm counts its CPUs and GPUs (`--exact`), but not its memory (`--mem=0`)."""
    step = node.step_of(need)
    group = [] if node.group is None else [f"--het-group={node.group}"]
    return [
        *("srun", f"--jobid={job.number}", *group, "--nodes=1", "--ntasks=1", "--exact", f"--nodelist={node.name}"),
        *(f"--cpus-per-task={step.cpus}", f"--gres=gpu:{step.gpus}" if step.gpus else "--gres=none", "--mem=0"),
        *("--mpi=none", f"--immediate={IMMEDIATE_SECONDS}", f"--job-name={name}"),
        *(sys.executable, "-m", "millrace.launch.slurm.agent"),
    ]


def environment() -> dict[str, str]:
    """Return srun's environment: without the options of the job, which srun would take as options of the step."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


class Step:
    """A step whose agent answers. Create it with `open`, and call `close` at the end.

    stands: called with how the server stands: whether it runs, how it ended, and the end of its log. signalled: called
    with the node when the step gets SIGTERM, by which Slurm announces its end.
    """

    def __init__(
        self,
        name: str,
        node: JobNode,
        need: Need,
        process: asyncio.subprocess.Process,
        signalled: Callable[[JobNode], None],
    ) -> None:
        assert process.stdin is not None
        self.name, self.node, self.need = name, node, need
        self.id = "its Slurm step"
        self.gpus: str | None = None
        self.python = sys.executable
        self.stands: Callable[[bool, str, str], None] = lambda *_: None
        self._process, self._signalled = process, signalled
        self._agent = Caller(f"{name} on {node.name}", process.stdin)
        self._here = asyncio.Event()
        self._words: deque[str] = deque(maxlen=40)
        self._tasks = [asyncio.create_task(work) for work in (self._read(), self._listen(), self._beat())]

    @classmethod
    async def open(cls, job: Job, node: JobNode, need: Need, name: str, signalled: Callable[[JobNode], None]) -> "Step":
        """Start a step, and wait until its agent answers.

        Raises NoRoom if Slurm does not make the step, and LaunchError if the agent can't run.
        """
        process = await asyncio.create_subprocess_exec(
            *command(job, node, need, name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
            limit=MOST_BYTES,
        )
        step = cls(name, node, need, process, signalled)
        try:
            async with asyncio.timeout(AGENT_DEADLINE):
                await step._here.wait()
        except TimeoutError:
            await step.close()
            raise LaunchError(f"{name}: its step on {node.name} did not answer within {AGENT_DEADLINE:.0f} s") from None
        except BaseException:
            await step.close()
            raise
        if step._agent.gone is not None:
            await step.close()
            if (refused := NO_STEP.search("\n".join(step._words))) is not None:
                raise NoRoom(refused[1])
            raise LaunchError(
                f"{name}: its step on {node.name} ended at once: {step._said()}; Millrace must be installed in "
                f"{sys.executable} on all nodes of the job"
            )
        return step

    async def call(self, call: str, within: float, **arguments: object) -> object:
        """Return the agent's answer to a call. Raises LaunchError."""
        return await self._agent.call(call, within, **arguments)

    async def close(self) -> None:
        """End the step. Raises LaunchError if it does not end in time."""
        try:
            if await ends_within(self._process, END_SECONDS):
                return
            with suppress(LaunchError):  # what matters is that it did not end
                await slurm("scancel", self.id)
            self._process.kill()
            await self._process.wait()
            raise LaunchError(f"{self.name}: its step on {self.node.name} did not end within {END_SECONDS:.0f} s")
        finally:
            self._tasks[2].cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        told = ""
        while line := await self._process.stdout.readline():
            if not line.startswith(b"{"):  # a site's prolog may write too
                self._words.append(line.decode(errors="replace").strip())
                continue
            match json.loads(line):
                case {"step": str(number), "gpus": gpus, "python": str(python)}:
                    self.id, self.gpus, self.python = number, gpus, python
                    self._here.set()
                case {"running": bool(running), "end": str(end), "tail": str(tail)}:
                    told = tail
                    self.stands(running, end, tail)
                case {"signalled": True}:
                    self._signalled(self.node)
                case {"id": int()} as answer:
                    self._agent.answered(answer)
        await self._tasks[1]
        gone = f"{self.name} ended with its Slurm step {self.id}: {self._said()}"
        self._agent.lose(gone)
        self._here.set()
        self.stands(False, gone, told)

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._words.append(line.decode(errors="replace").strip())

    async def _beat(self) -> None:
        assert self._process.stdin is not None
        while not self._process.stdin.is_closing():
            self._process.stdin.write(b"\n")
            await asyncio.sleep(BEAT_SECONDS)

    def _said(self) -> str:
        """Return the line that says best why the step ended: one of its program or of slurmstepd, or else of srun."""
        lines = [line for line in self._words if line]
        better = [line for line in lines if not line.startswith("srun: ")]
        return OF_SRUN.sub("", (better or lines or ["Slurm gives no reason"])[-1])[:300]
