"""A real Slurm on this machine, in a folder of its own: munge, slurmctld, and a slurmd for each node.

The nodes have addresses of their own (127.0.0.2 and so on), and GPUs by name only. `make test-slurm` installs Slurm.
"""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from millrace.launch.ports import free_ports

DEADLINE = 120.0
GRACE_SECONDS = 100  # between the preemption of a job and its end, in the partitions `grace` and `cancelled`
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
NODES = {"n1": "127.0.0.2", "n2": "127.0.0.3", "n3": "127.0.0.5", "bare": "127.0.0.4"}
# The options of a job with a whole node, of one with two, and of one with three.
ONE_NODE = ("--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--gpus-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=2")
THREE_NODES = ("--partition=wide", "--nodes=3", *TWO_NODES[1:])
CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmdTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE PriorityTier=2 State=UP
PartitionName=grace Nodes=n1,n2 MaxTime=INFINITE PriorityTier=1 GraceTime={grace} State=UP
PartitionName=cancelled Nodes=n1,n2 MaxTime=INFINITE PriorityTier=1 GraceTime={grace} PreemptMode=CANCEL State=UP
PartitionName=wide Nodes=n1,n2,n3 MaxTime=INFINITE State=UP
PartitionName=bare Nodes=bare MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2"
GRES = "NodeName=n1,n2,n3,bare Name=gpu File=/dev/null\nNodeName=n1,n2,n3,bare Name=gpu File=/dev/zero\n"


def config(job: str, **settings: object) -> dict[str, object]:
    """The settings of engines in a job."""
    return {"kind": "embedded", "launch": "slurm", "cluster": job, "threads": 1, **settings}


def why_no_slurm() -> str | None:
    """Return why Slurm is not run here; None if it is to be."""
    if os.environ.get("MILLRACE_SLURM") != "1":
        return "make test-slurm runs it"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{missing[0]} is not installed" if missing else None


class SlurmCluster:
    """A Slurm that runs. Its commands find it by the variable SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str, **variables: str) -> str:
        """Return the output of one of Slurm's commands."""
        environment = {**os.environ, **variables}
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=DEADLINE, env=environment, cwd=self.folder
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def job(self, *options: str) -> Iterator[str]:
        """Allocate nodes, and yield the job's id."""
        words = self.run("salloc", "--no-shell", *options).split()
        number = words[words.index("allocation") + 1]
        try:
            yield number
        finally:
            self.run("scancel", number)
            until(lambda: not self.state(number), f"job {number} ends")

    def drain(self, address: str) -> None:
        """Let Slurm drain the node at an address, until the node is resumed."""
        (name,) = (name for name, its in NODES.items() if its == address)
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")

    def resume(self) -> None:
        """Resume the nodes that are drained."""
        for name in set(self.run("sinfo", "--noheader", "--Node", "--states=drain", "--format=%N").split()):
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def signal(self, step: str) -> None:
        """Send SIGTERM to a step, as Slurm does before it ends one."""
        words = ["scancel", "--signal=TERM", step]  # Slurm 22.05 sends it, and says that the job's id is invalid
        subprocess.run(words, check=False, capture_output=True, timeout=DEADLINE)

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING; nothing if it has ended."""
        with suppress(AssertionError):  # Slurm has forgotten it
            state = self.run("squeue", "--noheader", "--format=%T", f"--jobs={job}").split()
            return state[0] if state else ""
        return ""

    def steps(self, job: str) -> list[str]:
        """Return the ids of the steps of a job, without that of its script."""
        found = self.run("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job}").split()
        return [step for step in found if step.rpartition(".")[2].isdigit()]


def until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"{what} within {deadline:.0f} s"
        time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path, hidden: Sequence[Path]) -> Iterator[SlurmCluster]:
    """Run a Slurm in a folder. On the node `bare`, the folders `hidden` are empty, if this is root."""
    ports = dict(zip(("ctl", *NODES), free_ports("127.0.0.1", 1 + len(NODES)), strict=True))
    nodes = "\n".join(NODE.format(name=name, address=address, port=ports[name]) for name, address in NODES.items())
    (folder / "slurm.conf").write_text(
        CONF.format(folder=folder, port=ports["ctl"], user=getpass.getuser(), nodes=nodes, grace=GRACE_SECONDS)
    )
    (folder / "gres.conf").write_text(GRES)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    folder.chmod(0o755)  # munge's socket must be reachable
    own = [f"--{name}={folder}/munge.{ending}" for name, ending in (("key-file", "key"), ("log-file", "log"))]
    own += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--socket={folder}/munge.sock"]
    conf = str(folder / "slurm.conf")
    os.environ["SLURM_CONF"] = conf
    cluster = SlurmCluster(folder)
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.out").open("wb") as output:
            processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output))

    try:
        start("munged", "munged", "--foreground", "--force", *own)
        until(lambda: (folder / "munge.sock").exists(), "munge answers")
        (folder / "state").mkdir()
        start("slurmctld", "slurmctld", "-D", "-f", conf)
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            start(name, *_on(name, hidden), "slurmd", "-D", "-f", conf, "-N", name)
        until(lambda: _idle(cluster), "all nodes are up")
        yield cluster
    finally:
        with suppress(AssertionError):
            cluster.run("scancel", "--user", getpass.getuser())
            until(lambda: not cluster.run("squeue", "--noheader"), "all jobs end")
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            process.wait(DEADLINE)
        del os.environ["SLURM_CONF"]


def _idle(cluster: SlurmCluster) -> bool:
    with suppress(AssertionError):  # the controller does not answer yet
        return set(cluster.run("sinfo", "--noheader", "--Node", "--format=%t").split()) == {"idle"}
    return False


def _on(name: str, hidden: Sequence[Path]) -> Sequence[str]:
    if name != "bare" or os.getuid() != 0:
        return ()
    mounts = " && ".join(f'mount -t tmpfs none "{folder}"' for folder in hidden)
    return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
