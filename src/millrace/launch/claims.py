"""Claims of this process on servers and files, which no other process of this host can have at the same time.

A claim is a Unix socket with a name in the kernel's abstract namespace (unix(7)). The kernel removes it when the
process ends, even by SIGKILL. Processes in another network namespace (a container) or on another host do not see it.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from millrace.errors import LaunchError
from millrace.launch.ports import host_of, joined

_held: set[socket.socket] = set()


@contextmanager
def claimed(name: str, refusal: Callable[[str], str]) -> Iterator[None]:
    """Hold the claim of this name while the block runs.

    Raises LaunchError if a process of this host holds it. `refusal` returns the message, for that process in words.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0{name}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LaunchError(f"the claim {name} can't be made: {error.strerror}") from error
            raise LaunchError(refusal(_holder(name))) from error
        claim.listen()
        _held.add(claim)
        try:
            yield
        finally:
            _held.discard(claim)


@contextmanager
def claimed_servers(urls: Iterable[str]) -> Iterator[None]:
    """Hold the claims on the servers at these URLs while the block runs.

    Raises LaunchError if a process of this host has claimed one of them.
    """

    def claim(url: str) -> str:
        return f"millrace-owner-of-{joined(host_of(url), urlsplit(url).port or 80)}"

    def refusal(url: str, holder: str) -> str:
        return (
            f"{holder} owns the engine at {url}, and a second owner would mix its weights; follow the fleet of that "
            "process (Fleet.share, millrace.follow_fleet), or end it first"
        )

    with ExitStack() as claims:
        for url in urls:
            claims.enter_context(claimed(claim(url), lambda holder, url=url: refusal(url, holder)))  # type: ignore[misc]
        yield


def _holder(name: str) -> str:
    """Return the process that holds the claim, in words."""
    credentials = struct.Struct("3i")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # the holder accepts no connections, so a full queue would block
            probe.connect(f"\0{name}")
            pid, _, _ = credentials.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    except OSError:  # it has just ended, or was asked too often
        return "another process"
    return "this process already" if pid == os.getpid() else f"process {pid}"


def _forget() -> None:
    """Close the claims in a forked child, which would otherwise keep them when its parent ends."""
    for claim in _held:
        claim.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
