"""How an engine gives its weights to another one, which has a ticket: the tensors' descriptions as a line of JSON, then
their bytes."""

import http.client
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

import orjson
import torch

from millrace.buckets import TensorSpec
from millrace.engines.embedded.protocol import PeerBody, TensorBody
from millrace.engines.embedded.weights import UpdateRefused, WeightStore, byte_view, dtype_name
from millrace.http.auth import has_key

OFFERED = "/offered_weights"
TICKET_SECONDS = 600.0  # for which a ticket can be used, once, and for which the tensors are then sent
CHUNK_BYTES = 4 << 20
LONGEST_HEADER = 64 << 20  # bytes


class Tickets:
    """The tickets with which other engines may read tensors once, with the names of these."""

    def __init__(self) -> None:
        self._offers: dict[str, tuple[float, Sequence[str]]] = {}

    def new(self, names: Sequence[str]) -> str:
        """Return a new ticket for these tensors."""
        now, ticket = time.monotonic(), secrets.token_urlsafe(24)
        self._offers = {known: offer for known, offer in self._offers.items() if offer[0] > now}
        self._offers[ticket] = now + TICKET_SECONDS, names
        return ticket

    def take(self, authorization: str | None) -> Sequence[str] | None:
        """Use up the ticket in a header, and return the names of its tensors; None if it is no ticket."""
        for ticket, (until, names) in self._offers.items():
            if has_key(authorization, [ticket]):
                del self._offers[ticket]
                return names if until > time.monotonic() else None
        return None


def header_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the line that describes the tensors."""
    rows = [
        {"name": name, "dtype": dtype_name(one.dtype), "shape": list(one.shape), "offset": 0, "nbytes": one.nbytes}
        for name, one in tensors.items()
    ]
    return orjson.dumps(rows, option=orjson.OPT_APPEND_NEWLINE)


def chunks_of(tensor: torch.Tensor) -> Sequence[memoryview]:
    """Return the bytes of a tensor, in chunks."""
    view = byte_view(tensor.cpu())
    return [view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES)]


def load_from_peer(weights: WeightStore, body: PeerBody) -> int:
    """Load the weights that another engine offers into the open update, and return the number of tensors. Blocks.

    Raises UpdateRefused if they can't be read within `body.timeout` seconds, or are not the model's.
    """
    ends, place = time.monotonic() + body.timeout, urlsplit(body.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=body.timeout)
    try:
        connection.request("GET", OFFERED, headers={"Authorization": f"Bearer {body.ticket}"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise UpdateRefused(f"{body.url} does not give its weights: HTTP {answer.status} {answer.read(500)!r}")
        rows = [TensorBody.model_validate(row) for row in orjson.loads(answer.readline(LONGEST_HEADER))]
        specs = [TensorSpec(one.name, one.dtype, tuple(one.shape), 0, one.nbytes) for one in rows]
        weights.load_stream(specs, _until(ends, body, answer.readinto))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UpdateRefused(f"the weights of {body.url} can't be read: {error!r}") from error
    finally:
        connection.close()
    return len(specs)


def _until(ends: float, body: PeerBody, read: Callable[[memoryview], int]) -> Callable[[memoryview], int]:
    def checked(chunk: memoryview) -> int:
        if time.monotonic() > ends:
            raise UpdateRefused(f"{body.url} did not give its weights within {body.timeout:.0f} s")
        return read(chunk)

    return checked
