"""TRL's trainers on a Millrace fleet (`pip install 'millrace[trl]'`, docs/trl.md).

`use_fleet` makes a `GRPOTrainer` generate on a fleet. `FleetRollout` is a `rollout_func` that plays whole conversations
with tools. `fleet_of_ranks` opens one fleet for all ranks. `FleetRolloutWorker` and its `FleetWeights` are the two
parts of an `AsyncGRPOTrainer`.

Importing this raises ConfigError if TRL is not installed, or is a version that this was not tested with.
"""

from millrace.integrations.trl.version import require_trl

require_trl()

from millrace.integrations.trl.generation import FleetGeneration, use_fleet  # noqa: E402
from millrace.integrations.trl.ranks import fleet_of_ranks  # noqa: E402
from millrace.integrations.trl.rollout import FleetRollout  # noqa: E402
from millrace.integrations.trl.transfer import FleetWeights  # noqa: E402
from millrace.integrations.trl.worker import FleetRolloutWorker  # noqa: E402

__all__ = ["FleetGeneration", "FleetRollout", "FleetRolloutWorker", "FleetWeights", "fleet_of_ranks", "use_fleet"]
