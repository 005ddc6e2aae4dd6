"""The hosts that settings and arguments name."""

import asyncio
from collections.abc import Iterable

from millrace.errors import ConfigError
from millrace.http.client import RESOLVE_PATIENCE, server_url


async def require_known(setting: str, urls: Iterable[str]) -> None:
    """Resolves the host of each URL, so that an unknown one ends a start before it has cost anything.

    Raises ConfigError, which names the setting, for what is not a server's URL and for a host that the name service
    does not know or gives no answer for.
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
            said = getattr(error, "strerror", None) or str(error)  # a timeout says nothing
            reason = said or f"the name service did not answer within {RESOLVE_PATIENCE:g} s"
            raise ConfigError(f"{setting}: the host {parsed.host} of {url} can't be resolved: {reason}") from error
