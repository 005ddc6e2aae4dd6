"""Excludes loopback addresses from the proxies in the environment (`http_proxy` and similar variables)."""

from collections.abc import Mapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reaching_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the loopback addresses added to `no_proxy`.

    Engines, routers and sidecars on one host then reach each other directly. The user's own entries are kept. Some
    programs read `no_proxy` and others `NO_PROXY`, so both get the same value.
    """
    given = [name for spelling in ("no_proxy", "NO_PROXY") for name in environment.get(spelling, "").split(",")]
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    names += [name for name in LOOPBACK if name not in names]
    return {**environment, "no_proxy": ",".join(names), "NO_PROXY": ",".join(names)}
