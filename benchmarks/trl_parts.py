"""The parts of a step of TRL's GRPOTrainer, in seconds, and the positions that its model computes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

PARTS = ("generate", "publish", "score", "train")

Step = dict[str, float]  # the seconds of PARTS and of the `step`; `tokens` and `positions` of its batch


class Parts(TrainerCallback):  # type: ignore[misc] # untyped
    """Measures the steps of a trainer: `generate` with its tools, `publish`, `score` and `train`.

    `score` is what follows in TRL before the loss: the engine's samples are computed again for the importance ratios,
    and rewarded. `train` is the rest of the step. `positions` are those of the padded batch.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.steps: list[Step] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
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
        now, spent = time.perf_counter(), self._spent
        step = now - self._began
        self.steps.append({
            "step": step,
            "generate": spent["generation"] - spent["publish"],
            "publish": spent["publish"],
            "score": spent["prepared"] - spent["generation"],
            "train": step - spent["prepared"],
            **self._batch,
        })  # fmt: skip
        spent.clear()
        self._began = now

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
