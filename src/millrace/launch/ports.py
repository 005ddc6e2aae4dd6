"""TCP ports and server addresses. A port comes from the kernel or the config, and is never base + rank.

A server takes up to minutes from its start until it listens. So this process holds the ports that it hands out: each by
a socket that is bound and does not listen. The kernel then gives the port to no other process that asks for a free one
or connects to somewhere. The server itself can listen on it, because servers set SO_REUSEADDR.
"""

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

from millrace.errors import LaunchError
from millrace.http.local import lacking

CONNECT_SECONDS = 1.0


MOST_HELD = 128  # the ports handed out before these are no longer held
BLOCK_ATTEMPTS = 50
_held: deque[int] = deque()  # file descriptors, because Python warns of sockets that are open at its end


def free_port(host: str, setting: str = "") -> int:
    """Return a free port, and hold it. See `free_ports`."""
    return free_ports(host, 1, setting)[0]


def free_ports(host: str, count: int, setting: str = "") -> list[int]:
    """Return `count` different free ports, and hold them.

    Raises LaunchError, which names `setting`, if `host` is not an address of this host or no port is free.
    """
    try:
        return _hold(host, [0] * count)
    except OSError as error:
        where = f"{setting} {host}" if setting else host
        raise LaunchError(f"no port of {where} is available: {why_not_bound(host, error)}") from error


def free_block(host: str, count: int) -> int:
    """Return the first of `count` consecutive free ports, and hold them. Raises LaunchError."""
    for _ in range(BLOCK_ATTEMPTS):
        first = free_port(host)
        try:
            _hold(host, range(first + 1, first + count))
        except (OSError, OverflowError):
            continue  # one is in use, or beyond the last port
        return first
    raise LaunchError(f"{host} has no {count} consecutive free ports; set engine.dist_init_addr to a host:port")


def _hold(host: str, ports: Sequence[int]) -> list[int]:
    """Bind these ports, and keep them bound until MOST_HELD others are held. 0: any free port.

    Raises OSError if one is in use or held, by this process or another.
    """
    family, (address, _) = _address(host, 0)
    with ExitStack() as opened:
        sockets = []
        for port in ports:
            sockets.append(held := opened.enter_context(socket.socket(family, socket.SOCK_STREAM)))
            held.bind((address, port))
            # Only now: a port that another socket has bound with SO_REUSEADDR must not look free.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        numbers: list[int] = [held.getsockname()[1] for held in sockets]
        _held.extend(held.detach() for held in sockets)
    while len(_held) > MOST_HELD:
        os.close(_held.popleft())
    return numbers


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
    family, address = _address(host, port)
    return socket.create_server(address, family=family)


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the family and the address that a server at `host` binds. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, (str(address[0]), port)


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
