"""The weights with which the engines of a fleet start."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from millrace.engines.base import Engine
from millrace.engines.start import Replica
from millrace.errors import EngineFailed
from millrace.types import Capability, EngineInfo
from millrace.weights.cast import Dtypes, dtypes_of, folder_checksums_as

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore

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

    @classmethod
    async def read(cls, infos: Sequence[EngineInfo], checksums: Mapping[str, str], version: int, folder: Path) -> Self:
        """Return the origin of engines that report `infos`. `checksums`: those of the folder's tensors as stored."""
        dtypes = await asyncio.to_thread(dtypes_of, infos[0], folder)
        if any(Capability.CHECKSUMS in info.capabilities for info in infos):
            checksums = await asyncio.to_thread(folder_checksums_as, dtypes, folder, checksums)
        return cls(checksums, version, folder, dtypes)

    async def version_of(self, replica: Replica, store: "VersionStore | None", *, remember: bool) -> int | None:
        """Return the version that an engine holds when the fleet begins. None if it serves after the next publish.

        It is this one if the engine holds these weights. An engine that ran before may hold the version that its
        owner's record says, or the last one in `store`. remember: as in `holds`.

        Raises EngineFailed if an engine that was started here holds other weights.
        """
        if not replica.found:
            return self.version if await self.holds(replica, remember=remember) else None
        name, reported = replica.engine.name, replica.info.weight_version
        knows = Capability.CHECKSUMS in replica.info.capabilities
        known = reported is not None and reported == replica.held
        if knows and not known and store is not None and reported is not None:
            known = store.is_last(reported, await replica.engine.checksums())
        if known:
            return reported
        if not knows:
            logger.info("%s serves after the next publish: it can't say which weights it holds", name)
            return None
        reason = f"it reports version {reported}, and the model's folder has version {self.version}"
        if reported in (None, self.version):
            try:
                return self.version if await self.holds(replica, remember=remember) else None
            except EngineFailed as error:
                reason = str(error)
        logger.warning("%s serves after the next publish: %s", name, reason)
        return None

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
