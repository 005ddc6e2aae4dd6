"""TCP ports: the kernel's or the config's, never base + rank."""

import asyncio
import errno
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

from millrace.errors import LaunchError
from millrace.http.local import lacking

CONNECT_SECONDS = 1.0


def free_port(host: str, setting: str = "") -> int:
    """A port that was free a moment ago. The kernel goes through its range before it hands one out again.
    Raises what `free_ports` raises."""
    return free_ports(host, 1, setting)[0]


def free_ports(host: str, count: int, setting: str = "") -> list[int]:
    """Different ports that were free a moment ago. Raises LaunchError where `host` is no address of this host, and
    names the setting that it comes from."""
    try:
        with ExitStack() as held:
            return [held.enter_context(bound(host, 0)).getsockname()[1] for _ in range(count)]
    except OSError as error:
        where = f"{setting} {host}" if setting else host
        raise LaunchError(f"no port of {where} can be had: {why_not_bound(host, error)}") from error


def require_free(host: str, port: int) -> None:
    """Raises LaunchError when something listens on the port already."""
    try:
        bound(host, port).close()
    except OSError as error:
        reason = why_not_bound(host, error)
        raise LaunchError(
            f"port {port} of {host} can't be used ({reason}); name another in engine.ports, or leave it out "
            "and the kernel gives a free one"
        ) from error


def bound(host: str, port: int) -> socket.socket:
    """A server's socket at an address or a name of this host, IPv4 or IPv6. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family)


def why_not_bound(host: str, error: OSError) -> str:
    """Why `bound` failed, in words."""
    if isinstance(error, socket.gaierror):
        return f"the host {host} can't be resolved: {error.strerror}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this host"
    return lacking(error) or error.strerror or str(error)


def url_of(host: str, port: int | str) -> str:
    """The URL of a server that listens at `host`. A wildcard address is reached by loopback."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bare := unbracketed(host), bare)  # noqa: S104
    return f"http://{joined(reached, port)}"


def joined(host: str, port: int | str) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parted(address: str) -> tuple[str, int]:
    """Host and port of host:port; an IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return unbracketed(host), int(port)


def unbracketed(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


async def listens(host: str, port: int) -> bool:
    """Whether something takes connections at the port, within a second. Raises LaunchError where this process could
    not ask."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:  # TimeoutError is one
        if (lack := lacking(error)) is not None:
            raise LaunchError(f"{host}:{port} could not be asked: {lack}") from error
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
    found = socket.getaddrinfo(parts.hostname or "127.0.0.1", parts.port or 80, type=socket.SOCK_DGRAM)
    found.sort(key=lambda one: one[0] != socket.AF_INET)  # IPv4 where a name has both
    family, _, _, _, address = found[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0], probe.getpeername()[0]
