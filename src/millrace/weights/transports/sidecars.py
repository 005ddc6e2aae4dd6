"""The assignment of engines to sidecars, for the transports that use them."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from millrace.errors import EngineError, EngineFailed, PublishError
from millrace.launch.ports import host_of
from millrace.weights.transports.base import PublishTarget

S = TypeVar("S")


class EngineSidecars(Generic[S]):
    """The sidecar of each engine. An engine that joins, or starts on another host, uses the one on its host.

    sidecar_of: of the first engines, by name. by_url: all sidecars, by URL; that of this process has none.
    """

    def __init__(self, sidecar_of: Mapping[str, S], by_url: Mapping[str | None, S]) -> None:
        self._of, self._urls = dict(sidecar_of), dict[str, str]()
        self._by_url = by_url
        self._at: dict[str, S] | None = None  # by host

    def __getitem__(self, engine: str) -> S:
        return self._of[engine]

    async def place(self, targets: Sequence[PublishTarget]) -> dict[str, EngineError]:
        """Find the sidecars of engines that are new. Return an error for each engine whose host has none."""
        lacking: dict[str, EngineError] = {}
        for target in targets:
            name, url = target.engine.name, target.engine.url
            if name in self._of and self._urls.setdefault(name, url) == url:
                continue
            self._of.pop(name, None)
            found = await asyncio.to_thread(self._on_host_of, url)
            if found is None:
                lacking[name] = EngineFailed(
                    name,
                    f"publish.sidecars has no sidecar on its host ({url}); start `millrace sidecar` there, and add it",
                )
            else:
                self._of[name], self._urls[name] = found, url
        return lacking

    def _on_host_of(self, url: str) -> S | None:
        if self._at is None:
            self._at = {_host_of(one or "http://127.0.0.1"): found for one, found in self._by_url.items()}
        return self._at.get(_host_of(url))


def assign(engines: Mapping[str, str], sidecars: Sequence[str], *, spare: bool = False) -> dict[str, str | None]:
    """Return the URL of each engine's sidecar, by the engine's name.

    engines: the URL of each engine by its name. An engine uses the sidecar on its host. It is None for an engine on
    this host if this host has no sidecar. spare: whether a sidecar may have no engine yet.

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
    if not spare and (idle := [url for host, url in at.items() if host not in hosts.values()]):
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
