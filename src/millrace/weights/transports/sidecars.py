"""The assignment of engines to sidecars, for the transports that use them."""

from collections.abc import Mapping, Sequence

from millrace.errors import EngineError, PublishError
from millrace.launch.ports import host_of


def assign(engines: Mapping[str, str], sidecars: Sequence[str]) -> dict[str, str | None]:
    """Return the URL of each engine's sidecar, by the engine's name.

    engines: the URL of each engine by its name. An engine uses the sidecar on its host. It is None for an engine on
    this host if this host has no sidecar.

    Raises PublishError if a host has two sidecars, another host with engines has none, or a sidecar has no engine.

        >>> assign({"a": "http://10.0.0.5:30000"}, ["http://10.0.0.5:7000"])
        {'a': 'http://10.0.0.5:7000'}
    """
    here = host_of("http://127.0.0.1")
    at: dict[str, str] = {}
    for url in sidecars:
        host = _host_of(url)
        if host in at:
            raise PublishError(f"publish.sidecars: {at[host]} and {url} are on one host, which needs only one of them")
        at[host] = url
    hosts = {name: _host_of(url) for name, url in engines.items()}
    if lacking := [name for name, host in hosts.items() if host not in at and host != here]:
        raise PublishError(
            f"publish.sidecars has no sidecar on the host of {', '.join(lacking)}; start `millrace sidecar` there, and "
            "add its URL"
        )
    if idle := [url for host, url in at.items() if host not in hosts.values()]:
        raise PublishError(f"publish.sidecars: there is no engine on the host of {', '.join(idle)}")
    return {name: at.get(host) for name, host in hosts.items()}


def _host_of(url: str) -> str:
    try:
        return host_of(url)
    except OSError as error:
        raise PublishError(f"the host of {url} can't be resolved: {error}") from error


def reason_of(error: EngineError) -> str:
    """Return the error's message without the prefix that calls the sidecar an engine."""
    return str(error).removeprefix(f"engine {error.engine}: ")
