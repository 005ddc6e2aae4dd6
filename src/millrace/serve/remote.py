"""A client of a fleet's metrics server."""

from pydantic import TypeAdapter, ValidationError

from millrace.errors import EngineError, EngineTimeout, EngineUnreachable, LocalError, MonitorError
from millrace.http.client import HttpClient, server_url
from millrace.serve.view import FleetView


class Remote:
    """Fetches the view of a fleet from its metrics server. Close it after use.

    Raises ConfigError if `url` is not the URL of a server.
    """

    def __init__(self, url: str) -> None:
        self.url = str(server_url(url).origin())
        self._client = HttpClient("metrics", url)
        self._view = TypeAdapter(FleetView)

    async def fetch(self, *, deadline: float) -> FleetView:
        """Return the fleet's view, within `deadline` seconds.

        Raises MonitorError if there is no answer, if another server answers, or if this process can't send the request.
        """
        try:
            return self._view.validate_python(await self._client.control("GET", "/fleet", deadline=deadline))
        except (EngineUnreachable, EngineTimeout) as error:
            reason = str(error).removeprefix(f"engine {error.engine}: ")
            raise MonitorError(f"{reason}; a run answers at its metrics.port while it is running") from error
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
        """Close the connections."""
        await self._client.close()
