"""verl's checkpoint engine `millrace`: the actor's rank 0 publishes to the fleet of the standalone replicas.

Every process that imports verl imports this module, so the rest of the integration is imported where it is used.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from verl.checkpoint_engine.base import CheckpointEngine

if TYPE_CHECKING:
    from millrace.integrations.verl.owned import OwnedFleet
    from millrace.integrations.verl.rollout import Place, Plan


@dataclass(frozen=True, slots=True)
class Member:
    """A worker of a standalone replica. `plan` is that of the fleet as far as this worker knows it."""

    replica_rank: int
    place: "Place"
    plan: "Plan"


class MillraceCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # verl comes without types
    """Sends weights by Millrace's transports, from the actor to the engines. The replicas' workers get none.

    bucket_size: not used; `rollout.custom.publish.bucket_bytes` is. is_master: whether this is the actor's rank 0.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:  # noqa: ARG002  # verl passes it
        self._is_master = is_master
        self._owned: OwnedFleet | None = None
        self._served: set[int] = set()

    def prepare(self) -> Member | None:
        """Return this worker's part of the fleet, in a worker of a standalone replica; None in one of the actor."""
        from millrace.integrations.verl.rollout import MillraceRollout, Place

        rollout = MillraceRollout.here
        if rollout is None or not rollout.standalone:
            return None
        place = Place.here()
        return Member(rollout.replica_rank, place, rollout.plan("standalone", 1, [place]))

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: Sequence[Member | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return the arguments of `init_process_group`: rank 0 of the actor gets all members."""
        members = list(metadata[actor_wg_world_size:])
        actor: list[Any] = [members, *[None] * (actor_wg_world_size - 1)]
        return {"members": actor}, {"members": [None] * rollout_world_size}

    def init_process_group(self, members: Sequence[Member] | None) -> None:
        """Open the fleet, if it is not open, and let the servers of all members follow it."""
        if members is None:
            return
        from millrace.integrations.verl.rollout import SERVER

        ranks = sorted({member.replica_rank for member in members})
        if self._owned is None:
            places = tuple(member.place for member in members)
            self._owned = replace(members[0].plan, replicas=len(ranks), places=places).open()
        shared = self._owned.shared
        new = [rank for rank in ranks if rank not in self._served]
        ray.get([ray.get_actor(SERVER.format(rank)).follow.remote(shared.url, shared.key) for rank in new])
        self._served.update(new)

    async def send_weights(self, weights: Iterable[Any], global_steps: int | None = None) -> None:
        """Publish the weights, on rank 0 of the actor. The other ranks help to gather them."""
        if not self._is_master:
            for _ in weights:
                pass
            return
        from millrace.integrations.verl.owned import with_this_gpu

        assert self._owned is not None, "verl builds the process group before it sends weights"
        await asyncio.to_thread(self._owned.publish, with_this_gpu(weights), global_steps)

    def receive_weights(self, global_steps: int | None = None) -> Iterator[Any]:  # noqa: ARG002  # verl passes it
        """Return no weights: the engines have them already."""
        return iter(())

    def finalize(self) -> None:
        """Do nothing: the fleet stays open for the next publish."""
