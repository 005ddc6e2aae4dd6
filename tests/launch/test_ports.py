"""Ports: a free one is held for its server, and one in use is refused."""

import socket
import subprocess
import sys

import pytest

from millrace.errors import LaunchError
from millrace.launch.ports import MOST_HELD, bound, free_block, free_port, free_ports, require_free


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1 can't be used"):
            require_free("127.0.0.1", port)
        assert free_port("127.0.0.1") != port
    require_free("127.0.0.1", port)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_free_port_is_held_until_its_server_listens(host: str, family: socket.AddressFamily) -> None:
    """A server needs seconds until it listens. Nothing else may take its port before."""
    found = {*free_ports(host, 3), *range(first := free_block(host, 3), first + 3)}
    assert len(found) == 6
    for port in found:
        with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))
        with bound(host, port) as server, socket.create_connection(server.getsockname()[:2]):
            pass


def test_a_port_is_held_for_other_processes_too() -> None:
    code = "from millrace.launch.ports import free_block; print(free_block('127.0.0.1', 3), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        first = int(holder.stdout.readline())
        for port in range(first, first + 3):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            bound("127.0.0.1", port).close()


def test_only_the_latest_ports_are_held() -> None:
    port = free_port("127.0.0.1")
    free_ports("127.0.0.1", MOST_HELD)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
