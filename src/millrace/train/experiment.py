"""A whole training run: creates its parts from the settings, runs the training loop, and ends the parts in order."""

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from millrace.config.models import MetricsConfig, OptimizerConfig, RunConfig, TrainConfig, WarmupConfig
from millrace.errors import CheckpointError, DataError
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.chat import ChatFormat
from millrace.rollout.judge import Judge
from millrace.rollout.player import Player
from millrace.rollout.runner import SampleRunner, sampling_params
from millrace.rollout.sample import Problem
from millrace.serve.view import Observer
from millrace.tracing import open_tracing
from millrace.train import checkpoint
from millrace.train.agents import agent_format, open_player
from millrace.train.batch import supervised_sample
from millrace.train.display import Display
from millrace.train.judging import JudgeModel, judge_model, open_judge
from millrace.train.loop import TrainingLoop
from millrace.train.metrics import Progress
from millrace.train.policy import load_policy
from millrace.train.ranks import Ranks, TrainerThread, require_many_ranks, shared
from millrace.train.record import RunFolder
from millrace.train.resizing import resizable
from millrace.train.start import configured_fleet, model_folder
from millrace.train.stopping import Stop
from millrace.train.summary import Summary
from millrace.train.task import Task, load_task, prompt_length, task_chat_format, with_servers
from millrace.train.threads import trainer_threads
from millrace.train.trackers.recorder import Trackers, open_trackers, require_trackers
from millrace.train.trainer import Trainer
from millrace.train.warmup_data import warmup_conversations
from millrace.train.world import World, join_world
from millrace.types import MemoryTag
from millrace.viewer.server import serve_run


@dataclass(frozen=True, slots=True)
class Content:
    """The inputs of the rollouts. The problems of the task are those of this rank."""

    chat: ChatFormat
    task: Task


async def train(
    config: RunConfig,
    *,
    resume: bool,
    display: Display,
    reload: Callable[[], RunConfig] | None = None,
    stop: Stop | None = None,
) -> Summary | None:
    """Run a whole training run, whose results are in its folder, and return its summary.

    Under torchrun every rank calls it, and only rank 0 gets the summary; the others get None. resume: continue from the
    last checkpoint. reload: if given, SIGHUP resizes the fleet to the `engine.replicas` of the settings that it
    returns. stop: if given, SIGTERM and SIGUSR1 end the run with a checkpoint, and `stop.signal` says so. These two
    need the main thread.

    Raises MillraceError if anything fails. All processes that it started have ended when it returns or raises.
    """
    started = time.monotonic()
    require_trackers(config)
    last = _last_checkpoint(config)
    with nullcontext() if stop is None else stop.on_signals():
        async with (
            open_tracing(config.tracing, config.name, int(os.environ.get("RANK", "0"))),
            with_servers(load_task(config), config) as task,
        ):
            return await _train(config, task, last if resume else None, started, resume, display, reload, stop)


async def _train(
    config: RunConfig,
    task: Task,
    last: Path | None,
    started: float,
    resume: bool,
    display: Display,
    reload: Callable[[], RunConfig] | None,
    stop: Stop | None,
) -> Summary | None:
    if (threads := trainer_threads(config)) is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    with join_world(config.train.device) as world, ThreadPoolExecutor(1, "trainer") as pool:
        if world.size > 1:
            require_many_ranks(config)
        thread, folder = TrainerThread(pool), RunFolder(config, resume=resume, rank=world.rank)
        with folder.create() as changed:
            for setting in changed:
                display.say(f"changed setting {setting}")
            model_path = await _starting_model(config, folder, world, thread, fresh=not resume)
            content = Content(task_chat_format(config, task, str(model_path)), task.share(world.rank, world.size))
            judge_of = judge_model(config.judges, folder.path, fresh=not resume)
            turns = agent_format(config, str(model_path))
            with EventLog(folder.events_path) as event_log:
                observer = Observer(event_log)
                async with (
                    open_trackers(config, folder, resume=resume, display=display)
                    if world.rank == 0
                    else nullcontext(Trackers()) as trackers,
                    _engines(config, model_path, judge_of, content, world, thread, folder, observer, display) as (
                        fleet,
                        judge,
                    ),
                    open_player(config, task.agent, turns, fleet, world.size) as player,
                ):
                    runner = _runner(config, fleet, content, judge, player)
                    if task.environment is None and task.agent is None:  # which make the prompts later
                        _require_room(runner, [*content.task.problems, *content.task.held_out], config)
                    ranks = Ranks(world, thread, fleet)
                    shown = (folder, display, trackers, observer)
                    loop = _assemble(config, model_path, ranks, runner, judge, content, *shown, stop or Stop())
                    loop.watch.seconds["set-up"] = time.monotonic() - started
                    async with (
                        resizable(fleet, config, reload)
                        if reload is not None and isinstance(fleet, Fleet)
                        else nullcontext()
                    ):
                        resumed_after = await _run(loop, config, content, last)
                    counts = await ranks.counts(loop.counts)
                    display.phase("ending the engines")
        if world.rank > 0:
            return None
        total = time.monotonic() - started
        return Summary(folder.read_metrics(), folder.path, loop.watch.seconds, total, counts, resumed_after)


@asynccontextmanager
async def _engines(
    config: RunConfig,
    model_path: Path,
    judge_of: JudgeModel | None,
    content: Content,
    world: World,
    thread: TrainerThread,
    folder: RunFolder,
    observer: Observer,
    display: Display,
) -> AsyncIterator[tuple[FleetClient, Judge | None]]:
    """Start the policy's engines, which all ranks share, and the judge's engines."""
    event_log = observer.event_log

    def start() -> AbstractAsyncContextManager[Fleet]:
        return configured_fleet(config, model_path, log_dir=folder.logs, event_log=event_log)

    engines = config.engine.first_replicas + (config.judges.engine.first_replicas if config.judges is not None else 0)
    display.say(f"starting {engines} engine(s); their logs are in {folder.logs}")
    async with (
        _observed(config.metrics if world.rank == 0 else None, observer, folder, display),
        shared(world, thread, start, event_log=event_log, seed=config.seed) as fleet,
    ):
        if not isinstance(fleet, Fleet):
            yield fleet, None
            return
        observer.fleets = (fleet,)
        problems = content.task.problems
        async with open_judge(
            judge_of, fleet, config.rollout, problems, log_dir=folder.logs, event_log=event_log
        ) as judge:
            if judge is not None:
                observer.fleets += (judge.fleet,)
            yield fleet, judge


async def _starting_model(
    config: RunConfig, folder: RunFolder, world: World, thread: TrainerThread, *, fresh: bool
) -> Path:
    """Return the starting model's folder, which rank 0 creates before the other ranks look for it."""
    path = starting_model(config, folder.path, fresh=fresh) if world.rank == 0 else None
    await thread.run(world.any, False)
    return path if path is not None else starting_model(config, folder.path, fresh=False)


async def _run(loop: TrainingLoop, config: RunConfig, content: Content, last: Path | None) -> int | None:
    """Run all steps. Return the step after which the run was resumed, or None for a new run."""
    # The engines are idle until the first publish, so the trainer can use their memory.
    await loop.ranks.sleep()
    resumed_after = await _bring_to_start(loop, config, content, last)
    await loop.ranks.wake(frozenset({MemoryTag.WEIGHTS}))
    with loop.watch("publish"):
        await loop.update_engines()
    await loop.wake_cache()
    await loop.run()
    return resumed_after


@asynccontextmanager
async def _observed(
    metrics: MetricsConfig | None, observer: Observer, folder: RunFolder, display: Display
) -> AsyncIterator[None]:
    """Serve the observer's view and the run's page in the block, unless the config turns that off."""
    if metrics is None:
        yield
        return
    async with serve_run(observer, metrics.host, metrics.port, folder.path) as url:
        display.say(f"the page of the run is at {url}; metrics are at {url}/metrics")
        yield


def _last_checkpoint(config: RunConfig) -> Path | None:
    """Return the run's last checkpoint; None if the run has not begun.

    Raises CheckpointError, before any engine starts, if the run has begun but has no checkpoint to resume from.
    """
    run = config.output_dir / config.name
    last = checkpoint.latest(run)
    if last is None and (run / "metrics.jsonl").exists():
        raise CheckpointError(
            f"{run} holds a run that has no checkpoint to resume from: checkpoint.every was not reached, and Ctrl-C "
            "saves none, unlike SIGTERM; give another name=..."
        )
    return last


def how_to_go_on(config: RunConfig) -> str:
    """Return a sentence about how to continue after an interruption."""
    try:
        last = _last_checkpoint(config)
    except CheckpointError as error:
        return str(error)
    return f"--resume continues from {last}" if last else "the run had not begun, and the same command starts it again"


def starting_model(config: RunConfig, run: Path, *, fresh: bool) -> Path:
    """Return the folder that the engines start from, as `model_folder` does."""
    return model_folder(config.model, run / "model", seed=config.seed, fresh=fresh, setting="model.path")


def _runner(
    config: RunConfig, fleet: FleetClient, content: Content, judge: Judge | None, player: Player | None
) -> SampleRunner:
    rollout = config.rollout
    at_once = judge is not None and judge.config.mode == "standalone"  # otherwise after all samples have ended
    return SampleRunner(
        fleet=fleet,
        chat=content.chat,
        tools={name: tool.make for name, tool in content.task.tools.items()},
        limits=EpisodeLimits(
            config.max_turns, rollout.max_turn_tokens, rollout.max_sample_tokens, fleet.context_length
        ),
        sampling=sampling_params(rollout),
        timeout=rollout.sample_timeout,
        retries=rollout.sample_retries,
        partial=rollout.partial_rollouts,
        rewards=content.task.rewards,
        environment=content.task.environment,
        player=player,
        judge=judge if at_once else None,
    )


def _require_room(runner: SampleRunner, problems: Sequence[Problem], config: RunConfig) -> None:
    """Raise DataError, before the first step, if a prompt leaves no room for an answer."""
    limits = runner.limits
    for problem in problems:
        length = prompt_length(problem, runner.chat)
        if length >= limits.total:
            raise DataError(
                f"the prompt of problem {problem.problem_id} has {length} tokens and leaves no room for an answer: a "
                f"sample has {limits.total} (rollout.max_sample_tokens {config.rollout.max_sample_tokens}, the "
                f"engine's context {limits.context_length}); drop the problem or raise the limit"
            )


def _assemble(
    config: RunConfig,
    model_path: Path,
    ranks: Ranks,
    runner: SampleRunner,
    judge: Judge | None,
    content: Content,
    folder: RunFolder,
    display: Display,
    trackers: Trackers,
    observer: Observer,
    stop: Stop,
) -> TrainingLoop:
    trainer = Trainer(load_policy(model_path, config.train, ranks.world), config.train)
    return TrainingLoop(
        config,
        trainer=trainer,
        ranks=ranks,
        runner=runner,
        judge=judge,
        problems=content.task.problems,
        held_out=content.task.held_out,
        folder=folder,
        display=display,
        trackers=trackers,
        observer=observer,
        progress=Progress(),
        stop=stop,
    )


async def _bring_to_start(loop: TrainingLoop, config: RunConfig, content: Content, last: Path | None) -> int | None:
    """Prepare the trainer for its first step: load the last checkpoint and return its step, or run the warm-up."""
    if last is not None:
        last, state = await loop.in_trainer(checkpoint.load_latest, loop.folder.path, loop.trainer)
        loop.progress.step = loop.trainer.step
        loop.progress.version = int(str(state["version"])) - 1
        loop.progress.position = int(str(state["position"])) // loop.ranks.world.size
        loop.folder.forget_after(loop.trainer.step or -1)  # step 0, the evaluation, is done again
        loop.trackers.resumed_at(loop.trainer.step or -1)
        loop.display.say(f"resumed after step {loop.trainer.step} from {last}")
        return loop.trainer.step
    if config.warmup is not None:
        await _warm_up(loop, config.warmup, config, content)
    return None


async def _warm_up(loop: TrainingLoop, warmup: WarmupConfig, config: RunConfig, content: Content) -> None:
    """Run the supervised warm-up steps, with their own optimizer and learning-rate schedule."""
    settings: TrainConfig = config.train.model_copy(
        update=warmup.model_dump(include={"steps", *OptimizerConfig.model_fields})
    )
    supervised = Trainer(loop.trainer.policy, settings)

    def step(index: int) -> float:
        batch = warmup_conversations(content.chat, warmup.seed, index * warmup.batch_size, warmup.batch_size)
        share = itertools.islice(batch, loop.ranks.world.rank, None, loop.ranks.world.size)
        return supervised.supervised_step([supervised_sample(c.token_ids, c.loss_mask.tolist()) for c in share]).loss

    for index in range(warmup.steps):
        with loop.watch("warm-up"):
            loss = await loop.in_trainer(step, index)
        loop.display.progress("warm-up", index + 1, warmup.steps, f"loss {loss:.3f}")
