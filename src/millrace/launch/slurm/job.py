"""What a Slurm job has, by `scontrol`, and which of its nodes take an engine."""

import asyncio
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from millrace.errors import LaunchError
from millrace.launch.base import Need

COMMAND_DEADLINE = 60.0  # seconds; Slurm's commands repeat calls to a controller that is busy
ALLOCATED = re.compile(r"\bNodes=(\S+) CPU_IDs=(\S+) Mem=\S* GRES=(\S*)")
DRAINING = re.compile(r"^NodeName=(\S+) .*\bState=\S*\b(?:DRAIN|FAIL)", re.MULTILINE)
GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:(\d+)")


@dataclass(frozen=True, slots=True)
class JobNode:
    """One node of a job, with the CPUs and GPUs that the job has there. group: its part of a heterogeneous job."""

    name: str
    cpus: int
    gpus: int
    group: int | None = None

    def __str__(self) -> str:
        return f"{self.name} with {Need(self.gpus, self.cpus)}"

    def step_of(self, need: Need) -> Need:
        """Return what the step of a node of an engine takes here.

        A step can't use other CPUs than its own. So it gets as large a share of the node's CPUs as of its GPUs.
        """
        share = self.cpus * need.gpus // self.gpus if need.gpus and self.gpus else 0
        return Need(need.gpus, max(need.cpus, share))


@dataclass(frozen=True, slots=True)
class Job:
    """A running job. number: its id, the leader's if it is heterogeneous."""

    number: int
    nodes: tuple[JobNode, ...]

    def without(self, names: Collection[str]) -> "Job":
        """Return the job without some of its nodes."""
        return Job(self.number, tuple(node for node in self.nodes if node.name not in names))

    def __str__(self) -> str:
        return f"Slurm job {self.number} has {', '.join(map(str, self.nodes))}"


Used = Mapping[str, Need]  # what the steps of engines take, by the node


def room(node: JobNode, need: Need, used: Used) -> bool:
    """Return whether a step for `need` fits on the node."""
    taken, step = used.get(node.name, Need(0, 0)), node.step_of(need)
    return taken.gpus + step.gpus <= node.gpus and taken.cpus + step.cpus <= node.cpus


def ranked(job: Job, need: Need, used: Used, near: Sequence[str]) -> list[JobNode]:
    """Return the nodes where a step for `need` fits, the best first.

    These are the nodes with most of the same engine (`near` names its nodes so far), then those with most free GPUs,
    then CPUs, so that engines are spread.
    """
    counts, nothing = Counter(near), Need(0, 0)

    def rank(node: JobNode) -> tuple[int, int, int]:
        taken = used.get(node.name, nothing)
        return -counts[node.name], taken.gpus - node.gpus, taken.cpus - node.cpus

    return sorted((node for node in job.nodes if room(node, need, used)), key=rank)


def with_step(used: Used, node: JobNode, need: Need) -> dict[str, Need]:
    """Return what is taken when a step for `need` runs on the node too."""
    taken, step = used.get(node.name, Need(0, 0)), node.step_of(need)
    return {**used, node.name: Need(taken.gpus + step.gpus, taken.cpus + step.cpus)}


def possible(job: Job, need: Need, nodes: int) -> bool:
    """Return whether the job has room for so many steps if nothing else runs in it."""
    used: Used = {}
    for _ in range(nodes):
        if not (fitting := ranked(job, need, used, ())):
            return False
        used = with_step(used, fitting[0], need)
    return True


def parse(text: str) -> tuple[dict[str, str], list[tuple[str, int, int]]]:
    """Return the fields of a job, and its lists of nodes, each with CPUs and GPUs per node.

    text: one line of `scontrol --details --oneliner show job`.
    """
    fields = dict(word.partition("=")[::2] for word in text.split() if "=" in word)
    found = [
        (names, _count(cpu_ids), sum(int(count) for count in GPUS.findall(gres)))
        for names, cpu_ids, gres in ALLOCATED.findall(text)
    ]
    return fields, found


def _count(ids: str) -> int:
    """Return how many ids a list such as `0-3,8` has."""
    ends = [part.partition("-") for part in ids.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


Steps = Sequence[tuple[JobNode, Need]]  # of one engine


def movable(job: Job, leaving: Collection[str], engines: Mapping[int, Steps]) -> list[int]:
    """Return the engines on nodes that leave which have room on the other nodes, all of them together.

    leaving: the names of these nodes. engines: the engines in the job, by number. An engine over several nodes has room
    also where its own steps are.
    """
    stays, placed, found = job.without(leaving), dict(engines), []
    for number, steps in engines.items():
        if all(node.name not in leaving for node, _ in steps):
            continue
        used: Used = {}
        for node, need in (step for other in placed if other != number for step in placed[other]):
            used = with_step(used, node, need)
        moved = []
        for _, need in steps:
            for node in ranked(stays, need, used, ())[:1]:
                used = with_step(used, node, need)
                moved.append((node, need))
        if len(moved) == len(steps):
            placed[number] = moved
            found.append(number)
    return found


async def read_job(number: str) -> Job:
    """Return what a job has. Raises LaunchError if there is no such job, or if it does not run."""
    output = await slurm("scontrol", "--details", "--oneliner", "show", "job", number)
    parts = [parse(line) for line in output.splitlines() if line.strip()]
    leader = next((fields.get("HetJobId", number) for fields, _ in parts if fields["JobId"] == number), number)
    if leader != number:
        return await read_job(leader)
    nodes: list[JobNode] = []
    for fields, found in parts:
        if number not in (fields["JobId"], fields.get("HetJobId")):
            continue  # another task of the array whose id is that of one of its tasks
        if fields["JobState"] != "RUNNING":
            raise LaunchError(f"Slurm job {fields['JobId']} is not running: {fields['JobState']}")
        group = int(fields["HetJobOffset"]) if "HetJobOffset" in fields else None
        for names, cpus, gpus in found:
            nodes += [JobNode(name, cpus, gpus, group) for name in await _hostnames(names)]
    if not nodes:
        raise LaunchError(f"scontrol does not say which nodes Slurm job {number} has")
    return Job(int(number), tuple(nodes))


async def address_of(node: str) -> str:
    """Return the address at which Slurm reaches a node. Raises LaunchError."""
    output = await slurm("scontrol", "--oneliner", "show", "node", node)
    found = re.search(r"\bNodeAddr=(\S+)", output)
    return node if found is None else found[1]


async def draining(job: Job) -> set[str]:
    """Return the nodes of a job that Slurm drains, or expects to fail. Raises LaunchError."""
    names = ",".join(node.name for node in job.nodes)
    output = await slurm("scontrol", "--oneliner", "show", "node", names)
    return set(DRAINING.findall(output))


async def seconds_of(setting: str) -> float:
    """Return a time of Slurm's configuration.

    `KillWait` is that between SIGTERM and SIGKILL at the end of a step, and `SlurmdTimeout` that until Slurm knows that
    a node which does not answer is gone. Raises LaunchError.
    """
    config = await slurm("scontrol", "show", "config")
    found = re.search(rf"^{setting}\s*=\s*(\d+)", config, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


async def slurm(*words: str) -> str:
    """Return the output of one of Slurm's commands. Raises LaunchError with what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMMAND_DEADLINE):
            output, errors = await process.communicate()
    except TimeoutError:
        raise LaunchError(f"`{' '.join(words)}` did not answer within {COMMAND_DEADLINE:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = (errors or output).decode(errors="replace").strip().splitlines()
        raise LaunchError(f"`{' '.join(words)}` failed: {said[-1] if said else f'status {process.returncode}'}")
    return output.decode(errors="replace")


async def _hostnames(names: str) -> list[str]:
    return (await slurm("scontrol", "show", "hostnames", names)).split() if "[" in names or "," in names else [names]
