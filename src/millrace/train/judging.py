"""The judge of a run: its model, its engines, and who has the memory when."""

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
    """What can be looked at before any engine is started."""

    config: JudgeConfig
    path: Path
    chat: ChatFormat


def judge_model(config: JudgeConfig | None, run: Path, *, anew: bool) -> JudgeModel | None:
    """Raises DataError where the model's folder can't be used."""
    if config is None:
        return None
    path = model_folder(config.model, run / PREFIX, seed=config.seed, anew=anew, setting="judges.model.path")
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
    """Starts the judge's engines. One that is colocated starts in the memory of the policy's, which sleep from here on,
    and sleeps until its first turn."""
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
