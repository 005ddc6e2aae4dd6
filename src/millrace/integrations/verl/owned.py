"""The fleets that this process owns: the actor's rank 0 opens them, and publishes to them.

A fleet lives in a thread of its own (`millrace.sync`), because verl's training blocks the worker's event loop.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from millrace import sync
from millrace.config.engines import EngineConfig
from millrace.fleet.owner import SharedFleet
from millrace.integrations.verl.settings import RolloutSettings
from millrace.types import ALL_MEMORY, MemoryTag
from millrace.weights.report import PublishReport

NamedTensor = tuple[str, torch.Tensor]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OwnedFleet:
    """A fleet, from its opening until this process ends. A guard ends its engines when the process ends.

    `name`: `hybrid` or `standalone`. `shared`: the URL and the key with which verl's servers follow it. `step`: the
    trainer's step of the last publish.
    """

    name: str
    fleet: sync.Fleet
    shared: SharedFleet
    settings: RolloutSettings
    step: int | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(
        cls, name: str, settings: RolloutSettings, engine: EngineConfig, model: Path, logs: Path, host: str
    ) -> "OwnedFleet":
        """Start the engines. This takes as long as they need.

        model: the folder of the model. logs: the folder of the logs. host: the address for verl's servers.
        """
        with ExitStack() as stack:
            opened = sync.open_fleet(
                engine,
                model,
                log_dir=logs / name,
                transport=settings.publish.transport,
                sidecars=settings.publish.sidecars,
                restarts=settings.restarts,
            )
            fleet = stack.enter_context(opened)
            shared = stack.enter_context(fleet.share(host))
            return cls(name, fleet, shared, settings, _open=stack.pop_all())

    def publish(self, weights: Iterable[NamedTensor], step: int | None) -> PublishReport:
        """Publish a version. `weights` is read to its end even after an error, because reading it is collective.

        weights: from `with_this_gpu`, since other threads read them. step: the trainer's step. None keeps the last one,
        as in verl's own servers.
        """
        self.step = self.step if step is None else step
        publish, source = self.settings.publish, iter(weights)
        try:
            report = self.fleet.publish(
                source,
                label=self.step,
                bucket_bytes=publish.bucket_bytes,
                deadline=publish.timeout,
                require_finite=publish.require_finite,
            )
        finally:
            drain(source)
        taken = len(report.engines) - len(report.failed)
        logger.info(
            "%s version %d has the weights of step %s, on %d engines", self.name, report.version, self.step, taken
        )
        for name, error in report.failed.items():
            logger.warning("%s did not take version %d: %s", name, report.version, error)
        return report

    def sleep(self) -> None:
        """Release the engines' memory. Running requests complete first."""
        if not self.fleet.asleep:
            self.fleet.sleep(ALL_MEMORY)

    def wake(self, tags: Iterable[str]) -> None:
        """Give back memory: `weights`, `kv_cache`, or both."""
        self.fleet.wake(frozenset(MemoryTag(tag) for tag in tags))


def drain(weights: Iterable[Any]) -> None:
    """Read the weights to their end. Every rank must, since verl gathers each tensor from all ranks."""
    for _ in weights:
        pass


def with_this_gpu(weights: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Return the tensors, which any thread may ask for: it gets this thread's GPU as its current one."""
    return _on_gpu(iter(weights), torch.cuda.current_device() if torch.cuda.is_available() else None)


def _on_gpu(source: Iterator[NamedTensor], device: int | None) -> Iterator[NamedTensor]:
    while True:
        if device is not None:
            torch.cuda.set_device(device)
        try:
            named = next(source)
        except StopIteration:
            return
        yield named
