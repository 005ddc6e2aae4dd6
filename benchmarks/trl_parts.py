"""The parts of a step of TRL's GRPOTrainer, in seconds, and the positions that its model computes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
from transformers import TrainerCallback
from trl import GRPOTrainer

from benchmarks.trl_steps import Step


class Parts(TrainerCallback):  # type: ignore[misc] # untyped
    """Measures the steps of a trainer: `generate` with its tools, `publish`, `score` and `train`.

    `score` is what follows in TRL before the loss: the engine's samples are computed again for the importance ratios,
    and rewarded. `train` is the rest of the step. `positions` are those of the padded batch. `cpu` are the seconds
    that this process and its engines computed: other programs on the machine prolong the step, but not these.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.steps: list[Step] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._began, self._cpu = time.perf_counter(), cpu_seconds()
        self._batch: Step = {}
        trainer.add_callback(self)
        trainer._generate = self._timed("generation", trainer._generate)
        trainer._generate_and_score_completions = self._counted(
            self._timed("prepared", trainer._generate_and_score_completions)
        )
        if getattr(trainer, "vllm_generation", None) is not None:
            trainer.vllm_generation.sync_weights = self._timed("publish", trainer.vllm_generation.sync_weights)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Add the step to `steps`."""
        now, cpu, spent = time.perf_counter(), cpu_seconds(), self._spent
        step = now - self._began
        self.steps.append({
            "step": step,
            "generate": spent["generation"] - spent["publish"],
            "publish": spent["publish"],
            "score": spent["prepared"] - spent["generation"],
            "train": step - spent["prepared"],
            "cpu": cpu - self._cpu,
            **self._batch,
        })  # fmt: skip
        spent.clear()
        self._began, self._cpu = now, cpu

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._spent[name] += time.perf_counter() - began

        return call

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            batch = function(*args, **options)
            masks = (batch["prompt_mask"], batch["completion_mask"])
            self._batch = {
                "tokens": float(sum(mask.sum().item() for mask in masks)),
                "positions": float(sum(mask.numel() for mask in masks)),
            }
            return batch

        return call


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it has started, so far."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(float(each.user + each.system) for each in times)
