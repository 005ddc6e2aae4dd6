"""Hosts on one machine: network namespaces on a bridge. This process is on the bridge too, as the trainer's host.

A host has its own address, loopback, processes, /dev/shm and /sys (where UCX looks for network devices). The rest of
the file system is shared. Its cable can be pulled and put back. It takes root and iproute2.
"""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NUMBERS = itertools.count(os.getpid() % 200)  # of networks, so that runs beside each other have different ones
DEADLINE = 20.0
MOUNTS = "mount -t tmpfs none /dev/shm && mount -t sysfs none /sys"
READY = f"{MOUNTS} && ip link set lo up && echo ready && exec sleep infinity"


@contextmanager
def hosts_or_skip(count: int) -> Iterator[list["Host"]]:
    """Yield so many hosts. Skip the test if this machine can't have them."""
    with ExitStack() as opened:
        try:
            hosts = opened.enter_context(network(count))
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
        yield hosts


def command(*words: str) -> None:
    """Run a program. Raises CalledProcessError with what it wrote if it fails."""
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=DEADLINE)


@dataclass(slots=True, eq=False)
class Host:
    """One host. address: its own. pid: of its first process, with which all others end. cable: this end of its link."""

    address: str
    pid: int
    cable: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on the host. It ends with the network at the latest."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.inside(words),
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def inside(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs a program on the host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--ipc", "--uts", "--pid", "--", *words]

    @property
    def alive(self) -> bool:
        """Whether the host runs."""
        return Path(f"/proc/{self.pid}").exists()

    def end(self) -> None:
        """End the host with all of its processes, as when a spot instance is taken away."""
        os.kill(self.pid, signal.SIGKILL)

    def python(
        self, module: str, *arguments: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a module of Python on the host."""
        return self.start([sys.executable, "-m", module, *arguments], log, environment)

    def end_processes(self) -> None:
        """Kill the programs that were started on the host, as a loss of power does."""
        for process in self.processes:
            if process.poll() is None:
                inside = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in map(int, inside):  # nsenter's child, which is in the host's namespace of processes
                    os.kill(pid, signal.SIGKILL)
                process.wait(DEADLINE)
        self.processes.clear()

    def cut(self) -> None:
        """Pull the cable: packets are lost in both directions, and no connection is closed."""
        command("ip", "link", "set", self.cable, "down")

    def connect(self) -> None:
        """Put the cable back."""
        command("ip", "link", "set", self.cable, "up")


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Yield so many hosts.

    Raises OSError or CalledProcessError if they can't be made.
    """
    number = 16 + next(NUMBERS) % 200
    bridge = f"mr{number}"
    with ExitStack() as stack:
        command("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(command, "ip", "link", "delete", bridge)
        # UCX leaves bridges out, so this host has a cable to it too.
        command("ip", "link", "add", f"{bridge}h", "type", "veth", "peer", "name", f"{bridge}g")
        stack.callback(command, "ip", "link", "delete", f"{bridge}h")
        command("ip", "link", "set", f"{bridge}h", "master", bridge, "up")
        command("ip", "address", "add", f"10.213.{number}.1/24", "dev", f"{bridge}g")
        command("ip", "link", "set", f"{bridge}g", "up")
        command("ip", "link", "set", bridge, "up")
        yield [stack.enter_context(_host(number, index, bridge)) for index in range(count)]


@contextmanager
def _host(number: int, index: int, bridge: str) -> Iterator[Host]:
    own = ["--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    holder = subprocess.Popen(
        ["unshare", *own, "sh", "-c", READY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    host: Host | None = None
    try:
        if holder.stdout.readline() != "ready\n":
            raise OSError(f"unshare: {holder.stderr.read().strip()}")
        first = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
        cable, inside = f"{bridge}h{index}", f"{bridge}g{index}"
        command("ip", "link", "add", cable, "type", "veth", "peer", "name", inside)
        host = Host(f"10.213.{number}.{index + 2}", first, cable)
        command("ip", "link", "set", inside, "netns", str(first))
        command("ip", "link", "set", cable, "master", bridge, "up")
        for words in (("address", "add", f"{host.address}/24", "dev", inside), ("link", "set", inside, "up")):
            command("nsenter", f"--target={first}", "--net", "--", "ip", *words)
        yield host
    finally:
        holder.kill()  # the host's first process dies with it, and so do all others in its namespace of processes
        holder.wait(DEADLINE)
        for process in host.processes if host is not None else ():
            process.wait(DEADLINE)
        holder.stdout.close()
        holder.stderr.close()
        if host is not None and Path(f"/sys/class/net/{host.cable}").exists():
            # The kernel removes it with the namespace, which connections over a pulled cable keep for minutes.
            subprocess.run(["ip", "link", "delete", host.cable], check=False, capture_output=True, timeout=DEADLINE)
