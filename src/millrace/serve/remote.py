"""A fleet behind the URL of its metrics server."""

from pydantic import TypeAdapter, ValidationError

from millrace.errors import EngineError, EngineTimeout, EngineUnreachable, LocalError, MonitorError
from millrace.http.client import HttpClient, server_url
from millrace.serve.view import FleetView


class Remote:
    """Whoever made it closes it. Raises ConfigError where `url` is not a server's."""

    def __init__(self, url: str) -> None:
        self.url = str(server_url(url).origin())
        self._client = HttpClient("metrics", url)
        self._view = TypeAdapter(FleetView)

    async def fetch(self, *, deadline: float) -> FleetView:
        """Raises MonitorError where nobody answers, where what answers is no fleet's metrics server, and where
        this process could not ask."""
        try:
            return self._view.validate_python(await self._client.control("GET", "/fleet", deadline=deadline))
        except (EngineUnreachable, EngineTimeout) as error:
            reason = str(error).removeprefix(f"engine {error.engine}: ")
            raise MonitorError(f"{reason}; a run answers at its metrics.port while it goes on") from error
        except LocalError as error:
            raise MonitorError(error.reason) from error
        except EngineError as error:
            reason = str(error).removeprefix(f"engine {error.engine}: ")
            raise MonitorError(f"{self.url} is not the metrics server of a run: {reason}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise MonitorError(f"{self.url} is not the metrics server of a run: {where}: {first['msg']}") from error

    async def close(self) -> None:
        await self._client.close()
