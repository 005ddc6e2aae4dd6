"""The arguments of a launch, beside the engine's settings, and its result."""

from dataclasses import dataclass, field
from pathlib import Path

from millrace.launch.base import Launcher
from millrace.launch.local import LOCAL
from millrace.launch.process import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One replica to start.

    model_path: the folder of the model, which the replica serves as weight version `version`. replica: its number; its
    name is `PREFIX-REPLICA`, with the engine's kind as the default prefix. api_key: the key for data calls; None makes
    a new one. launcher: what starts its processes; the default is this host.
    """

    model_path: Path
    log_dir: Path
    replica: int = 0
    version: int = 0
    seed: int = 0
    prefix: str | None = None
    api_key: str | None = field(default=None, repr=False)
    launcher: Launcher = LOCAL

    def name(self, kind: str, replica: int | None = None) -> str:
        """Return the name of this replica, or of another one."""
        return f"{self.prefix or kind}-{self.replica if replica is None else replica}"


@dataclass(frozen=True, slots=True)
class Launched:
    """A healthy server that this process started.

    url: None if node 0, which answers HTTP, is on another host. kv_events: the endpoint at which the server publishes
    the contents of its KV cache. gpus: of each rank (`EngineInfo.gpus`).
    """

    name: str
    url: str | None
    api_key: str = field(repr=False)
    admin_key: str = field(repr=False)
    process: Server
    kv_events: str | None = None
    gpus: tuple[str, ...] = ()
