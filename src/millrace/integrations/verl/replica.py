"""verl's handle of a replica, in the process that drives the training."""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.replica import RolloutMode, RolloutReplica

from millrace.integrations.verl.rollout import SERVER, open_here, place_of, sleep_here, wake_here
from millrace.integrations.verl.server import MillraceServer, Serving
from millrace.integrations.verl.settings import read_settings


class MillraceReplica(RolloutReplica):  # type: ignore[misc]  # verl comes without types
    """One of verl's replicas: a server that follows the fleet. All hybrid replicas share one fleet, which has an engine
    for each of them, and all standalone replicas share another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_reward_model or self.is_teacher_model:
            raise NotImplementedError(
                "rollout.name=millrace serves the policy only; choose vllm or sglang for reward models and teachers"
            )
        self._settings = read_settings(self.config)
        self._actor: Sequence[Any] = ()

    async def init_hybrid(self, worker_group: Any) -> None:
        """Launch the server beside the actor's workers, whose GPUs the engines use in turn with them."""
        self._actor = worker_group.workers
        await super().init_hybrid(worker_group)

    async def launch_servers(self) -> None:
        """Start the server. Of a hybrid replica, the actor's rank 0 opens the fleet first. The fleet of standalone
        replicas is opened when weights are sent for the first time (`checkpoint_engine.py`)."""
        place, *_ = await asyncio.gather(*(worker.__ray_call__.remote(place_of) for worker in self.workers))
        server = (
            ray.remote(MillraceServer)
            .options(
                name=SERVER.format(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node, soft=False),
                max_concurrency=self.max_concurrency,
            )
            .remote(self._serving())
        )
        if self.rollout_mode is RolloutMode.HYBRID:
            places = await asyncio.gather(*(worker.__ray_call__.remote(place_of) for worker in self._actor))
            replicas = len(self._actor) // self.world_size
            shared = await self._actor[0].__ray_call__.remote(open_here, replicas, places)
            await server.follow.remote(shared.url, shared.key)
        self.servers, self._server_handle = [server], server
        self._server_address = f"millrace-{self.replica_rank}"

    async def sleep(self) -> None:
        """Put the engines to sleep, if they share their GPUs with the actor."""
        if self._lends:
            await self._actor[0].__ray_call__.remote(sleep_here)

    async def wake_up(self) -> None:
        """Wake the engines, if they share their GPUs with the actor. They serve after the next publish."""
        if self._lends:
            await self._actor[0].__ray_call__.remote(wake_here)

    async def clear_kv_cache(self) -> None:
        """Do nothing: an engine that takes a version forgets what older ones computed."""

    async def release_kv_cache(self) -> None:
        """Do nothing: a publish needs no memory of the KV cache."""

    async def resume_kv_cache(self) -> None:
        """Do nothing, as `release_kv_cache`."""

    async def start_profile(self, **_: Any) -> None:
        """Do nothing: the engines are not profiled."""

    async def stop_profile(self) -> None:
        """Do nothing, as `start_profile`."""

    @property
    def _lends(self) -> bool:
        """Whether this replica puts the fleet to sleep: the first of those that share their GPUs with the actor."""
        hybrid = self.rollout_mode is RolloutMode.HYBRID
        return hybrid and self.replica_rank == 0 and bool(self.config.free_cache_engine)

    def _serving(self) -> Serving:
        config, settings = self.config, self._settings
        return Serving(
            prompt=config.prompt_length,
            response=config.response_length,
            context=config.max_model_len,
            ignore_eos=config.ignore_eos,
            seed=config.seed + self.replica_rank if config.full_determinism else None,
            retries=settings.retries,
            timeout=settings.timeout,
        )
