"""Proxies that the environment names (`http_proxy` and the like), and what must not go by one."""

from collections.abc import Mapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reaching_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with loopback added to `no_proxy`: engines, routers and sidecars of one host reach each other
    directly. What the user wrote there stays. Programs read one of both spellings, so both say the same."""
    said = [name for spelling in ("no_proxy", "NO_PROXY") for name in environment.get(spelling, "").split(",")]
    names = list(dict.fromkeys(name.strip() for name in said if name.strip()))
    names += [name for name in LOOPBACK if name not in names]
    return {**environment, "no_proxy": ",".join(names), "NO_PROXY": ",".join(names)}
