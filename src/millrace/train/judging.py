"""The judge of a run: its model and its engines, which may share the memory of the policy's engines."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from millrace.config.models import JudgeConfig, RolloutConfig
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.rollout.chat import ChatFormat, load_prompt_format
from millrace.rollout.judge import Judge
from millrace.rollout.sample import Problem
from millrace.train.start import model_folder

PREFIX = "judge"  # of its engines' names and of its model's folder


@dataclass(frozen=True, slots=True)
class JudgeModel:
    """The model of a judge, checked before any engine starts."""

    config: JudgeConfig
    path: Path
    chat: ChatFormat


def judge_model(config: JudgeConfig | None, run: Path, *, fresh: bool) -> JudgeModel | None:
    """Return the judge's model, or None without a judge. Raises DataError if the model's folder can't be used.

    fresh: as in `model_folder`.
    """
    if config is None:
        return None
    path = model_folder(config.model, run / PREFIX, seed=config.seed, fresh=fresh, setting="judges.model.path")
    return JudgeModel(config, path, load_prompt_format(str(path)))


@asynccontextmanager
async def open_judge(
    model: JudgeModel | None,
    policy: Fleet,
    rollout: RolloutConfig,
    problems: Sequence[Problem],
    *,
    log_dir: Path,
    event_log: EventLog,
) -> AsyncIterator[Judge | None]:
    """Start the judge's engines and yield the judge, or None without a judge model.

    A colocated judge uses the memory of the policy's engines: these sleep from here on, and the judge sleeps until it
    is needed. Raises DataError if a problem leaves no room in the judge's context.
    """
    if model is None:
        yield None
        return
    config, colocated = model.config, model.config.mode == "colocated"
    if colocated:
        await policy.sleep()
    async with open_fleet(
        config.engine,
        model.path,
        log_dir=log_dir,
        seed=config.seed,
        restarts=config.restarts,
        event_log=event_log,
        frozen=True,
        prefix=PREFIX,
    ) as fleet:
        judge = Judge(fleet, model.chat, config, rollout.sample_retries)
        judge.require_room(problems)
        if colocated:
            await fleet.sleep()
        yield judge
