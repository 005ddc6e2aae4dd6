"""The rewards and advantages of a group, by TRL's rules, as the samples that `AsyncGRPOTrainer` takes."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from millrace.errors import ConfigError, RolloutError
from millrace.integrations.trl.conversation import PlayedConversation
from millrace.rollout.calls import Calls, CallTimeout

Row = Mapping[str, Any]
OWN = ("prompt", "completion", "completion_ids")  # columns that reward functions do not get


class Scorer:
    """Calls reward functions for whole groups. deadline: seconds for one call."""

    def __init__(self, functions: Sequence[Callable[..., Any]], deadline: float) -> None:
        if not functions or not all(callable(function) for function in functions):
            raise ConfigError("reward_funcs must be one function or more")
        self._functions = {_name(function): function for function in functions}
        if len(self._functions) < len(functions):
            raise ConfigError(f"two reward functions have the same name: {', '.join(map(_name, functions))}")
        self._calls, self._deadline = Calls(), deadline

    async def score(
        self, row: Row, number: int, played: Sequence[PlayedConversation], model_version: Callable[[int | None], int]
    ) -> list[RolloutSample]:
        """Return the samples of a group. number: of the group. model_version: the trainer's number of a version."""
        completion_ids = [list(one.episode.token_ids[one.prompt_tokens :]) for one in played]
        given = {
            "prompts": [row["prompt"]] * len(played),
            "completions": [one.messages for one in played],
            "completion_ids": completion_ids,
            **{name: [value] * len(played) for name, value in row.items() if name not in OWN},
        }
        columns = await asyncio.gather(*(self._column(name, given) for name in self._functions))
        values = np.array(columns, np.float64)  # [functions, samples]; NaN where a function gave None
        unscored = np.isnan(values).all(axis=0)
        rewards = np.where(unscored, np.nan, np.nansum(values, axis=0))
        advantages, std = np.zeros(len(played)), float("nan")
        if not unscored.all():
            scored = rewards[~unscored]
            std = float(scored.std())
            advantages[~unscored] = (scored - scored.mean()) / (std + 1e-8)
        return [
            RolloutSample(
                prompt=row["prompt"],
                completion=one.messages,
                input_ids=np.array(one.episode.token_ids, np.int64),
                completion_mask=one.episode.loss_mask.astype(np.int64),
                old_log_probs=one.episode.logprobs,
                advantage=float(advantages[index]),
                model_version=min(model_version(span.version) for span in one.episode.version_spans),
                group_id=number,
                metrics={
                    "reward": float(rewards[index]),
                    "reward_std": std,
                    **{f"rewards/{name}": float(values[i, index]) for i, name in enumerate(self._functions)},
                },
            )
            for index, one in enumerate(played)
        ]

    async def _column(self, name: str, given: Mapping[str, Any]) -> list[float]:
        """Return one function's values, NaN for None."""
        try:
            values = await self._calls.run(partial(self._functions[name], **given), deadline=self._deadline)
        except CallTimeout as error:
            raise RolloutError(f"the reward function {name} hangs: {error}") from error
        if len(values) != len(given["prompts"]):
            wanted = len(given["prompts"])
            raise RolloutError(f"the reward function {name} gave {len(values)} values for {wanted} samples")
        return [float("nan") if value is None else float(value) for value in values]


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
