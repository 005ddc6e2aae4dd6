"""The sidecars on the hosts of engines, as the transports know them that need one there."""

from collections.abc import Mapping, Sequence

from millrace.errors import EngineError, PublishError
from millrace.launch.ports import host_of


def assign(engines: Mapping[str, str], sidecars: Sequence[str]) -> dict[str, str | None]:
    """Each engine's sidecar: the one on its host, and None on this host where there is none. `engines` are URLs by
    name. Raises PublishError where that leaves an engine or a sidecar alone."""
    here = host_of("http://127.0.0.1")
    at: dict[str, str] = {}
    for url in sidecars:
        host = _host_of(url)
        if host in at:
            raise PublishError(f"publish.sidecars: {at[host]} and {url} are on one host, which needs only one")
        at[host] = url
    hosts = {name: _host_of(url) for name, url in engines.items()}
    if lacking := [name for name, host in hosts.items() if host not in at and host != here]:
        raise PublishError(
            f"publish.sidecars names none on the host of {', '.join(lacking)}; start `millrace sidecar` there, and add "
            "its URL"
        )
    if idle := [url for host, url in at.items() if host not in hosts.values()]:
        raise PublishError(f"publish.sidecars: there is no engine on the host of {', '.join(idle)}")
    return {name: at.get(host) for name, host in hosts.items()}


def _host_of(url: str) -> str:
    try:
        return host_of(url)
    except OSError as error:
        raise PublishError(f"the host of {url} is not known: {error}") from error


def reason_of(error: EngineError) -> str:
    """What a sidecar's client says, without calling the sidecar an engine."""
    return str(error).removeprefix(f"engine {error.engine}: ")
