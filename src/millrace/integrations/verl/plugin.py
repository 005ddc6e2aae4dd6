"""The entry point: registers the rollout `millrace` and the checkpoint engine `millrace` when verl is imported.

verl hides the errors of entry points. So an error is logged here, and a verl that was not tested is refused when a run
asks for `rollout.name=millrace`.
"""

import logging
from typing import Any

from millrace.integrations.verl.tested import NAME, require_tested, untested

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the rollout and the checkpoint engine."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from millrace.integrations.verl.checkpoint_engine import MillraceCheckpointEngine

    RolloutReplicaRegistry.register(NAME, replica_class)
    base._ROLLOUT_REGISTRY[(NAME, "async")] = "millrace.integrations.verl.rollout.MillraceRollout"
    CheckpointEngineRegistry.register(NAME)(MillraceCheckpointEngine)


def replica_class() -> Any:
    """Return the class of the replicas. Raises ImportError if this version of verl was not tested."""
    require_tested()
    from millrace.integrations.verl.replica import MillraceReplica

    return MillraceReplica


try:
    register()
except Exception as error:
    logger.error("rollout.name=millrace is not available: %s", untested() or error, exc_info=not untested())
    raise
