"""A rollout's part in verl's workers: the actor's rank 0 owns the fleet, and the others help to gather weights."""

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
from verl.utils.device import get_resource_name
from verl.workers.rollout.base import BaseRollout

from millrace.config.sources import PretrainedModelConfig
from millrace.errors import ConfigError
from millrace.fleet.owner import SharedFleet
from millrace.integrations.verl.owned import OwnedFleet, drain, with_this_gpu
from millrace.integrations.verl.settings import RolloutSettings, engine_of, read_settings
from millrace.integrations.verl.tested import require_tested
from millrace.train.start import model_folder

require_tested()  # verl imports this module when a run asks for it

# The second is verl's own variable for the level of its logs.
logging.getLogger("millrace").setLevel(os.getenv("MILLRACE_LOGGING_LEVEL", os.getenv("VERL_LOGGING_LEVEL", "WARN")))

logger = logging.getLogger(__name__)

SERVER = "millrace_server_{}"  # the name of the Ray actor of a replica


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is. `device`: its GPU, as in CUDA_VISIBLE_DEVICES; None without one."""

    node: str
    device: str | None

    @classmethod
    def here(cls) -> "Place":
        """Return the place of this Ray worker."""
        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get(get_resource_name()) or [None]
        return cls(context.get_node_id(), devices[0])


@dataclass(frozen=True, slots=True)
class Plan:
    """A fleet to open. `config` is verl's RolloutConfig, and `model` the model's folder or name."""

    name: str
    settings: RolloutSettings
    config: Any
    model: str
    replicas: int
    places: tuple[Place, ...]
    sleeps: bool

    def open(self) -> OwnedFleet:
        """Open the fleet in this process. Raises ConfigError for invalid settings, and the errors of `open_fleet`."""
        here = Place.here()
        if self.settings.engine.get("urls") is None and any(place.node != here.node for place in self.places):
            raise ConfigError(
                "Millrace starts engines on the host of the actor's rank 0, and verl placed replicas on other hosts; "
                "start the engines there, and set actor_rollout_ref.rollout.custom.engine.urls"
            )
        devices = [place.device for place in self.places if place.device is not None]
        engine = engine_of(
            self.settings, self.config, replicas=self.replicas, devices=devices or None, sleeps=self.sleeps
        )
        pretrained = PretrainedModelConfig(kind="pretrained", path=self.model)
        folder = model_folder(pretrained, Path(), seed=0, fresh=False, setting="actor_rollout_ref.model.path")
        logs = self.settings.log_dir or Path(tempfile.mkdtemp(prefix="millrace-verl-"))
        logger.info("the engines' logs are below %s", logs)
        host = ray.util.get_node_ip_address().strip("[]")
        return OwnedFleet.open(self.name, self.settings, engine, folder, logs, host)


class MillraceRollout(BaseRollout):  # type: ignore[misc]  # verl comes without types
    """A rollout in a worker of the actor, or in a worker of a standalone replica (without `device_mesh`).

    `here`: that of this process.
    """

    here: "ClassVar[MillraceRollout | None]" = None

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        require_whole_weights(self.model_config)
        self.settings = read_settings(self.config)
        rank, ranks = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % ranks == 0
        self.standalone = device_mesh is None
        self._owns = rank == 0 and not self.standalone
        self._owned: OwnedFleet | None = None
        MillraceRollout.here = self

    def plan(self, name: str, replicas: int, places: Sequence[Place]) -> Plan:
        """Return the plan of the fleet that this rollout is part of."""
        sleeps = self.config.free_cache_engine and not self.standalone
        model = self.model_config.local_path
        return Plan(name, self.settings, self.config, model, replicas, tuple(places), sleeps)

    def open(self, replicas: int, places: Sequence[Place]) -> SharedFleet:
        """Open the fleet, unless it is open, and return what servers need to follow it."""
        if self._owned is None:
            self._owned = self.plan("hybrid", replicas, places).open()
        return self._owned.shared

    async def resume(self, tags: list[str]) -> None:
        """Give the engines their memory back: `weights`, `kv_cache`, or both."""
        if self._owns and self.config.free_cache_engine:
            await asyncio.to_thread(self.owned.wake, tags)

    async def release(self) -> None:
        """Release the engines' memory."""
        if self._owns and self.config.free_cache_engine:
            await asyncio.to_thread(self.owned.sleep)

    async def update_weights(
        self,
        weights: Iterable[Any],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        """Publish the weights. Every rank gets each whole tensor, and those that do not own the fleet drop it.

        Raises PublishError if no engine took the weights.
        """
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name=millrace takes whole tensors, and not {wire_format}")
        if self._owns:
            await asyncio.to_thread(self.owned.publish, with_this_gpu(weights), global_steps)
        else:
            drain(weights)

    @property
    def owned(self) -> OwnedFleet:
        """The fleet that this process owns."""
        assert self._owned is not None, "the replicas are launched before weights are sent"
        return self._owned


def require_whole_weights(model_config: Any) -> None:
    """Raises ConfigError if the actor would send a LoRA adapter instead of whole weights."""
    lora = model_config.lora or {}
    if (model_config.lora_rank > 0 or lora.get("rank", 0) > 0) and not lora.get("merge", False):
        raise ConfigError(
            "rollout.name=millrace publishes whole weights, and verl would send an adapter; set "
            "actor_rollout_ref.model.lora.merge=True"
        )


# What replicas run in a worker. Ray passes the worker first.


def open_here(_: Any, replicas: int, places: Sequence[Place]) -> SharedFleet:
    """Open the fleet in the worker of the actor's rank 0."""
    return _rollout().open(replicas, places)


def sleep_here(_: Any) -> None:
    """Put the engines to sleep, in the worker of the actor's rank 0."""
    _rollout().owned.sleep()


def wake_here(_: Any) -> None:
    """Wake the engines, in the worker of the actor's rank 0."""
    _rollout().owned.wake(["weights", "kv_cache"])


def place_of(_: Any) -> Place:
    """Return the place of a worker."""
    return Place.here()


def _rollout() -> MillraceRollout:
    assert MillraceRollout.here is not None, "the actor's workers are initialised before the replicas"
    return MillraceRollout.here
