"""A channel of the sender, from which a rank takes one order after the other."""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

SILENCE_SECONDS = 600.0  # after which the sender counts as stopped; its end is noticed at once
KEPT = 2  # orders whose memory stays open, because the sender uses the same memory again


def serve(path: str, rank: int, order: str, do: Callable[[str], object]) -> None:
    """Do an order, and those that come by the Unix socket `path`, until the sender closes it.

    An order is a payload as SGLang's own route would get it; a further one comes after its length. do: does one, and
    returns its memory. Raises OSError if there is no such socket.
    """
    kept: deque[object] = deque(maxlen=KEPT)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SILENCE_SECONDS)
        connection.connect(path)
        connection.sendall(rank.to_bytes(4, "big"))
        while order:
            kept.append(do(order))
            with suppress(ConnectionError):  # the sender may no longer wait for it
                connection.sendall(b"\1")
            order = received(connection, int.from_bytes(received(connection, 8), "big")).decode()


def received(connection: socket.socket, size: int) -> bytes:
    """Receive so many bytes; none if the sender closes the connection before, or is silent for too long."""
    content = bytearray()
    while len(content) < size:
        try:
            some = connection.recv(min(size - len(content), 2**20))
        except (TimeoutError, ConnectionError):
            some = b""
        if not some:
            return b""
        content += some
    return bytes(content)
