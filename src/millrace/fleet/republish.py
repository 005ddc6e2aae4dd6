"""The version that the trainer can provide again between two publishes, for engines that restart or join."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from millrace.errors import MillraceError, WeightsChanged
from millrace.weights.fingerprint import Fingerprint
from millrace.weights.source import WeightSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Republishable:
    """A version whose tensors the trainer's function returns again. `fingerprint` detects that they have changed."""

    source: WeightSource
    version: int
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    async def publish(self, engine: str, bring: Callable[[WeightSource], Awaitable[None]]) -> bool:
        """Call the trainer's function, and `bring` its tensors to an engine. Return False if the trainer can't provide
        them, and log the reason."""
        try:
            await bring(self.source.opened())
        except WeightsChanged as error:
            logger.warning(
                "%s serves after the next publish: the trainer no longer has version %d: %s",
                engine,
                self.version,
                error,
            )
            return False
        except MillraceError:
            raise
        except Exception:  # the trainer's function may raise anything, and no caller would see it
            logger.exception(
                "%s serves after the next publish: the trainer's function failed for version %d", engine, self.version
            )
            return False
        logger.info("%s got version %d again after its restart", engine, self.version)
        return True
