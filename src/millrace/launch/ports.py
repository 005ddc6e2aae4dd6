"""TCP ports and server addresses. A port comes from the kernel or the config, and is never base + rank."""

import asyncio
import errno
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

from millrace.errors import LaunchError
from millrace.http.local import lacking

CONNECT_SECONDS = 1.0


def free_port(host: str, setting: str = "") -> int:
    """Return a port that is free at this moment. The kernel cycles through its range before it reuses a port.

    Raises the same errors as `free_ports`.
    """
    return free_ports(host, 1, setting)[0]


def free_ports(host: str, count: int, setting: str = "") -> list[int]:
    """Return `count` different ports that are free at this moment.

    Raises LaunchError, which names `setting`, if `host` is not an address of this host or no port is free.
    """
    try:
        with ExitStack() as held:
            return [held.enter_context(bound(host, 0)).getsockname()[1] for _ in range(count)]
    except OSError as error:
        where = f"{setting} {host}" if setting else host
        raise LaunchError(f"no port of {where} is available: {why_not_bound(host, error)}") from error


def require_free(host: str, port: int) -> None:
    """Raise LaunchError if the port can't be used, for example because another server listens on it."""
    try:
        bound(host, port).close()
    except OSError as error:
        reason = why_not_bound(host, error)
        raise LaunchError(
            f"port {port} of {host} can't be used ({reason}); set another in engine.ports, or leave engine.ports out "
            "to use a free one"
        ) from error


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket at an address or name of this host, IPv4 or IPv6. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family)


def why_not_bound(host: str, error: OSError) -> str:
    """Return the reason why `bound` failed, in words."""
    if isinstance(error, socket.gaierror):
        return f"the host {host} can't be resolved: {error.strerror}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this host"
    return lacking(error) or error.strerror or str(error)


def url_of(host: str, port: int | str) -> str:
    """Return the URL of a server that listens at `host`. A wildcard address becomes the loopback address."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bare := unbracketed(host), bare)  # noqa: S104
    return f"http://{joined(reached, port)}"


def joined(host: str, port: int | str) -> str:
    """Return `host:port`. An IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parted(address: str) -> tuple[str, int]:
    """Return the host and the port of `host:port`. An IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return unbracketed(host), int(port)


def unbracketed(host: str) -> str:
    """Return an IPv6 address without its brackets, or another host unchanged."""
    return host.removeprefix("[").removesuffix("]")


async def listens(host: str, port: int) -> bool:
    """Return whether a server accepts connections on the port, within a second.

    Raises LaunchError if this process could not try, because it lacks a local resource.
    """
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:  # TimeoutError is one
        if (lack := lacking(error)) is not None:
            raise LaunchError(f"could not connect to {host}:{port}: {lack}") from error
        return False
    writer.close()
    return True


def own_address(url: str) -> str:
    """Return this host's address as the host of `url` sees it. Raises OSError if the host is not known."""
    return _ends(url)[0]


def is_here(url: str) -> bool:
    """Return whether `url` is on this host. A URL that leads through a tunnel looks local."""
    here, there = _ends(url)
    return here == there


def host_of(url: str) -> str:
    """Return an address that identifies the host of `url`. Raises OSError if the host is not known.

    All URLs of this host give the same address. URLs of another host give the same address if they use the same name
    or address for it.
    """
    here, there = _ends(url)
    return "127.0.0.1" if here == there else there


def _ends(url: str) -> tuple[str, str]:
    """Return the local and the remote address of a route to `url`. Connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname or "127.0.0.1", parts.port or 80, type=socket.SOCK_DGRAM)
    found.sort(key=lambda one: one[0] != socket.AF_INET)  # IPv4 if a name has both
    family, _, _, _, address = found[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0], probe.getpeername()[0]
