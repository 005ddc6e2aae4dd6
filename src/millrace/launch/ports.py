"""TCP ports: the kernel's or the config's, never base + rank."""

import asyncio
import socket

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
