"""Faults on demand, for tests of an engine's clients. They need the option --faults."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def crash() -> None:
    """Kill this process with SIGKILL, as the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(slots=True)
class StepFaults:
    """The faults in the model thread."""

    seconds_per_step: float = 0.0
    crash_after_tokens: int | None = None
    poison: list[int] = field(default_factory=list)  # a prompt with these consecutive tokens kills the engine
    hang: bool = False

    def before_step(self) -> None:
        if self.hang:
            threading.Event().wait()
        if self.seconds_per_step > 0:
            time.sleep(self.seconds_per_step)

    def at_prompt(self, tokens: NDArray[np.int64]) -> None:
        if self.poison and len(self.poison) <= len(tokens):
            rows = np.lib.stride_tricks.sliding_window_view(tokens, len(self.poison))
            if (rows == self.poison).all(axis=1).any():
                crash()

    def after_tokens(self, count: int) -> None:
        if self.crash_after_tokens is not None:
            self.crash_after_tokens -= count
            if self.crash_after_tokens <= 0:
                crash()


@dataclass(slots=True)
class HttpFaults:
    """The faults between the engine and its callers. refuse_load: the number, from 1, of the load that fails."""

    drop_answers: int = 0
    refuse_load: int | None = None
    loads: int = field(default=0)

    def drops_answer(self) -> bool:
        if self.drop_answers == 0:
            return False
        self.drop_answers -= 1
        return True

    def begin_session(self) -> None:
        self.loads = 0

    def refuses_load(self) -> bool:
        """Count a load of this session. Return whether to refuse it, which happens once."""
        self.loads += 1
        if self.loads != self.refuse_load:
            return False
        self.refuse_load = None
        return True
