"""TCP ports: the kernel's or the config's, never base + rank."""

import socket

from millrace.errors import LaunchError


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
