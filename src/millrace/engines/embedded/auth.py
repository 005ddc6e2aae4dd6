"""Decide whether a caller's key opens a route. Pure."""

from dataclasses import dataclass

from millrace.http.auth import has_key

OPEN_PATHS = frozenset({"/health", "/offered_weights"})  # the second asks for a ticket instead
READ_PATHS = frozenset({"/generate", "/health_generate", "/model_info", "/server_info", "/v1/loads"})


@dataclass(frozen=True, slots=True, repr=False)  # no repr: a key must not get into a log by accident
class Keys:
    """The server's keys. None: the routes of that key need none."""

    api: str | None
    admin: str | None


def allowed(path: str, authorization: str | None, keys: Keys) -> bool:
    """Whether a call is allowed.

    A path that is neither in OPEN_PATHS nor in READ_PATHS is a control route. It needs the admin key, if there is one.
    A read route needs either key, or none if there is no API key.
    """
    if path in OPEN_PATHS:
        return True
    accepted = [keys.admin] if keys.admin is not None and path not in READ_PATHS else [keys.api, keys.admin]
    if path in READ_PATHS and keys.api is None:
        return True
    known = [key for key in accepted if key is not None]
    return not known or has_key(authorization, known)
