"""Checks the hosts in settings and arguments."""

import asyncio
import ipaddress
from collections.abc import Iterable

from millrace.errors import ConfigError
from millrace.http.client import RESOLVE_PATIENCE, server_url


async def require_known(setting: str, urls: Iterable[str]) -> None:
    """Resolve the host of each URL, so that an unknown host fails a start early.

    Raises ConfigError, which names `setting`, if a URL is not a server's URL or its host can't be resolved.
    """
    for url in urls:
        try:
            parsed = server_url(url)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from error
        try:
            async with asyncio.timeout(RESOLVE_PATIENCE):
                await asyncio.get_running_loop().getaddrinfo(parsed.host, parsed.port)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            message = getattr(error, "strerror", None) or str(error)  # empty for a timeout
            reason = message or f"the name service did not answer within {RESOLVE_PATIENCE:g} s"
            raise ConfigError(f"{setting}: the host {parsed.host} of {url} can't be resolved: {reason}") from error


def is_loopback(host: str) -> bool:
    """Return whether only this host can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
