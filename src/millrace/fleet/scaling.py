"""How many engines a fleet needs for its load. No I/O.

As Kubernetes' horizontal autoscaler does, the number grows in proportion to the load as soon as requests have waited
for a moment (the scale-up delay). It shrinks to the largest number that was needed in the last `idle_seconds` (the
stabilisation window), so it does not go up and down with the load.
"""

import math
from collections import deque
from dataclasses import dataclass

from millrace.config.engines import ReplicaRange

SCALE_UP_DELAY = 3.0  # seconds for which requests must have waited: a burst that has room in a moment needs no engine
TARGET = 0.7  # the share of the engines' room that may be used after one has left; Knative's default


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a fleet at one moment.

    waiting: the requests that wait for room on an engine, or for the first engine. waited: the seconds for which some
    have waited without a break. running: the requests on the engines. room: how many the serving engines may run at
    once; None if they do not say. headroom: the share of the serving engines' KV caches that stays free, from 0 to 1.
    serving, starting: the numbers of engines that serve, and that are being started or get their weights. wanted: the
    engines that something besides requests needs now, such as a publish.
    """

    waiting: int = 0
    waited: float = 0.0
    running: int = 0
    room: int | None = None
    headroom: float = 1.0
    serving: int = 0
    starting: int = 0
    wanted: int = 0


def needed(load: Load) -> int:
    """Return the number of engines that the load needs now."""
    engines = load.serving + load.starting
    if not load.serving:  # how many requests an engine takes is not known yet
        return max(engines, 1) if load.waiting else load.wanted
    if load.waiting:
        if load.waited < SCALE_UP_DELAY:
            return engines
        each = max(load.running / load.serving, 1.0)
        return max(engines, math.ceil((load.waiting + load.running) / each))
    if not load.running:
        return load.wanted
    used = max(1.0 - load.headroom, load.running / load.room if load.room else 0.0, 0.0)
    return max(min(math.ceil(load.serving * used / TARGET), load.serving), load.wanted, 1)


class Scaling:
    """The number of engines that a fleet should have, from one look at its load to the next.

    `limits`: its bounds.
    """

    def __init__(self, limits: ReplicaRange) -> None:
        self.limits = limits
        self._needs: deque[tuple[float, int]] = deque()  # when, and how many were needed; those that may still count

    def engines(self, load: Load, now: float) -> int:
        """Return how many engines there should be at `now` (time.monotonic)."""
        need = needed(load)
        if not self._needs:
            self._needs.append((now, load.serving + load.starting))
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        while self._needs[0][0] <= now - self.limits.idle_seconds:
            self._needs.popleft()
        return min(max(self._needs[0][1], self.limits.min), self.limits.max)
