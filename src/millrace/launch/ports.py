"""TCP ports: the kernel's or the config's, never base + rank."""

import asyncio
import socket
from urllib.parse import urlsplit

from millrace.errors import LaunchError

CONNECT_SECONDS = 1.0


def free_port(host: str) -> int:
    """A port that was free a moment ago. The kernel goes through its range before it hands one out again."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def require_free(host: str, port: int) -> None:
    """Raises LaunchError when something listens on the port already."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise LaunchError(
            f"port {port} of {host} can't be used ({error.strerror}); name another in engine.ports, or leave it out "
            "and the kernel gives a free one"
        ) from error


async def listens(host: str, port: int) -> bool:
    """Whether something takes connections at the port, within a second."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True


def own_address(url: str) -> str:
    """This host's address as the host of `url` sees it."""
    return _ends(url)[0]


def is_here(url: str) -> bool:
    """Whether `url` is on this host. A tunnel hides that it is not."""
    here, there = _ends(url)
    return here == there


def host_of(url: str) -> str:
    """An address of the host of `url`, the same for all of its URLs where they name this host, or that one by one name
    or address. Raises OSError where the host is not known."""
    here, there = _ends(url)
    return "127.0.0.1" if here == there else there


def _ends(url: str) -> tuple[str, str]:
    """Both ends of a way to `url`. Connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return probe.getsockname()[0], probe.getpeername()[0]
