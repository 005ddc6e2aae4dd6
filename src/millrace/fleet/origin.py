"""The weights with which the engines of a fleet start."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from millrace.engines.base import Engine
from millrace.engines.start import Replica
from millrace.errors import EngineFailed
from millrace.types import Capability
from millrace.weights.cast import Dtypes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """The weights in `folder`, with which the engines start as `version`.

    checksums: the checksum of each tensor in the engines' `dtypes`, by name.
    own: the checksums that engines had in their own layouts after their start, by the engine's name.
    """

    checksums: Mapping[str, str]
    version: int
    folder: Path
    dtypes: Dtypes
    own: dict[str, Mapping[str, str]] = field(default_factory=dict)

    async def holds(self, replica: Replica, *, remember: bool) -> bool:
        """Return whether an engine that has started holds these weights. False if nothing proves it.

        remember: keep the checksums that it has in its own layout, for `require_unchanged`.

        Raises EngineFailed if its checksums differ.
        """
        engine = replica.engine
        if Capability.CHECKSUMS not in replica.info.capabilities:
            trusted = replica.process is not None and Path(replica.info.model_path) == self.folder
            if trusted and remember and Capability.OWN_CHECKSUMS in replica.info.capabilities:
                self.own[engine.name] = await engine.checksums()
            return trusted
        held = await engine.checksums()
        known = held.keys() & self.checksums.keys()
        if wrong := sorted(name for name in known if held[name] != self.checksums[name]):
            raise EngineFailed(engine.name, f"its weights differ from the model's folder: {', '.join(wrong[:3])}")
        if unknown := sorted(held.keys() - known):
            logger.warning("%s: not compared, since the folder has no %s", engine.name, ", ".join(unknown[:3]))
        return True

    async def require_unchanged(self, engine: Engine) -> None:
        """Raise EngineFailed if an engine that has read the folder again has other weights than after its start."""
        first = self.own.get(engine.name)
        if first is not None and await engine.checksums() != first:
            raise EngineFailed(engine.name, "its weights differ from those after its start")
