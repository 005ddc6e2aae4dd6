"""Bearer keys of HTTP servers."""

import hmac
from collections.abc import Sequence


def has_key(authorization: str | None, keys: Sequence[str]) -> bool:
    """Return whether an Authorization header is `Bearer KEY` with one of these keys."""
    scheme, _, given = (authorization or "").partition(" ")
    matches = [
        hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode()) for key in keys
    ]  # all of them, in constant time
    return scheme.lower() == "bearer" and any(matches)
