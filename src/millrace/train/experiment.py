"""From settings to a finished run: what is made, in which order, and who ends it."""

import re
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from millrace.config.models import (
    MetricsConfig,
    OptimizerConfig,
    PretrainedModelConfig,
    RunConfig,
    TinyModelConfig,
    TrainConfig,
    WarmupConfig,
)
from millrace.errors import CheckpointError, ConfigError, DataError
from millrace.fleet.fleet import Fleet
from millrace.fleet.journal import Journal
from millrace.fleet.local import open_fleet
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.chat import ChatFormat, load_chat_format
from millrace.rollout.data import load_problems
from millrace.rollout.runner import SampleRunner, sampling_params
from millrace.rollout.sample import Problem
from millrace.rollout.tools import Tool, make_tools
from millrace.serve.server import serve
from millrace.serve.view import Observer
from millrace.train import checkpoint
from millrace.train.batch import supervised_sample
from millrace.train.curves import draw_curves
from millrace.train.display import Display
from millrace.train.loop import Progress, TrainingLoop
from millrace.train.policy import load_policy
from millrace.train.record import RunFolder
from millrace.train.summary import Summary
from millrace.train.tiny import make_tiny_model
from millrace.train.trainer import Trainer
from millrace.train.warmup_data import warmup_conversations
from millrace.train.world import World, join_world
from millrace.types import MemoryTag

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Content:
    """What the rollouts are made of."""

    chat: ChatFormat
    tools: dict[str, Tool]
    problems: Sequence[Problem]
    held_out: Sequence[Problem]


async def train(config: RunConfig, *, resume: bool, display: Display) -> Summary:
    """Runs a whole training run and leaves its folder behind. Raises MillraceError with what went wrong; whatever was
    started is ended then."""
    started = time.monotonic()
    last = _last_checkpoint(config)
    folder = RunFolder(config, resume=resume)
    tools = make_tools(config.rollout.tools)
    problems = load_problems(config.data)
    held_out = load_problems(config.evaluation.data, held_out=True)[: config.evaluation.problems]
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    with (
        folder.create(),
        Journal(folder.events_path) as journal,
        join_world(config.train.device) as world,
        ThreadPoolExecutor(1, "trainer") as thread,
    ):
        if world.size > 1:
            raise ConfigError("millrace train runs one trainer process; start it without torchrun")
        model_path = starting_model(config, folder.path, anew=not resume)
        content = Content(load_chat_format(str(model_path)), tools, problems, held_out)
        display.say(f"starting {config.engine.replicas} engine(s), whose logs are in {folder.logs}")
        async with (
            shown(config.metrics, journal, display) as observer,
            open_fleet(
                config.engine,
                model_path,
                log_dir=folder.logs,
                version=0,
                seed=config.seed,
                transport=config.publish.transport,
                folder=config.publish.folder,
                keep=config.publish.keep,
                couriers=config.publish.couriers,
                restarts=config.restarts,
                journal=journal,
            ) as fleet,
        ):
            observer.fleet = fleet
            runner = _runner(config, fleet, content)
            _require_room(runner, [*problems, *held_out], config)
            loop = _assemble(config, model_path, world, thread, runner, content, folder, display)
            loop.watch.seconds["set-up"] = time.monotonic() - started
            # The engines have nothing to do yet, and the trainer can use their memory.
            await fleet.sleep()
            await _bring_to_start(loop, config, content, last if resume else None)
            await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
            with loop.watch("publish"):
                await loop.publish()
            await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
            await loop.run()
            display.phase("ending the engines")
        metrics = folder.read_metrics()
        draw_curves(metrics, config.name, folder.path / "curves.png")
        return Summary(metrics, folder.path, loop.watch.seconds, time.monotonic() - started, loop.ledger)


@asynccontextmanager
async def shown(metrics: MetricsConfig | None, journal: Journal, display: Display) -> AsyncIterator[Observer]:
    """Who looks at the engines for everybody that asks, at a port if the config names one."""
    observer = Observer(journal)
    if metrics is None:
        yield observer
        return
    async with serve(observer, metrics.host, metrics.port) as url:
        display.say(f"millrace status {url} shows the engines; metrics are at {url}/metrics")
        yield observer


def _last_checkpoint(config: RunConfig) -> Path | None:
    """Where the run can be resumed; None where it has not begun. Raises CheckpointError where it has begun and can't be
    resumed, which is better said before any engine is started."""
    run = config.output_dir / config.name
    last = checkpoint.latest(run)
    if last is None and (run / "metrics.jsonl").exists():
        raise CheckpointError(f"{run} holds a run that has no checkpoint to resume from; give another name=...")
    return last


def how_to_go_on(config: RunConfig) -> str:
    """After an interruption, in words."""
    try:
        last = _last_checkpoint(config)
    except CheckpointError as error:
        return str(error)
    return f"--resume goes on from {last}" if last else "the run had not begun, and the same command starts it anew"


def starting_model(config: RunConfig, run: Path, *, anew: bool) -> Path:
    """The folder that the engines start from. A model that the run makes is made `anew` where the run begins: a start
    that failed may have left half of one, or one by other settings."""
    match config.model:
        case PretrainedModelConfig(path=path):
            folder_or_download = Path(path)
            if not folder_or_download.exists() and HUB_NAME.fullmatch(path):
                folder_or_download = _download(path)
            if not (folder_or_download / "config.json").is_file():
                raise DataError(f"model.path: {path} is no model's folder, it has no config.json")
            return folder_or_download
        case TinyModelConfig() as tiny:
            made = run / "model"
            if anew and made.exists():
                shutil.rmtree(made)
            if not made.exists():
                make_tiny_model(tiny, config.seed, made)
            return made


def _download(name: str) -> Path:
    """A model of the Hugging Face Hub, from the local cache where it is there already."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:  # the Hub's own errors are kinds of these
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"model.path: {name} is no folder here and can't be had from the Hub: {reason}") from error


def _runner(config: RunConfig, fleet: Fleet, content: Content) -> SampleRunner:
    rollout = config.rollout
    return SampleRunner(
        fleet=fleet,
        chat=content.chat,
        tools=content.tools,
        limits=EpisodeLimits(
            rollout.max_turns, rollout.max_turn_tokens, rollout.max_sample_tokens, fleet.context_length
        ),
        sampling=sampling_params(rollout),
        timeout=rollout.sample_timeout,
        retries=rollout.sample_retries,
        partial=rollout.partial_rollouts,
    )


def _require_room(runner: SampleRunner, problems: Sequence[Problem], config: RunConfig) -> None:
    """Every prompt must leave room for an answer: better said before the first step than in the middle of a night."""
    limits = runner.limits
    for problem in problems:
        length = len(runner.prompt(problem))
        if length >= limits.total:
            raise DataError(
                f"the prompt of problem {problem.problem_id} has {length} tokens and leaves no room for an answer: a "
                f"sample has {limits.total} (rollout.max_sample_tokens {config.rollout.max_sample_tokens}, the "
                f"engine's context {limits.context_length}); drop the problem or raise the limit"
            )


def _assemble(
    config: RunConfig,
    model_path: Path,
    world: World,
    thread: ThreadPoolExecutor,
    runner: SampleRunner,
    content: Content,
    folder: RunFolder,
    display: Display,
) -> TrainingLoop:
    trainer = Trainer(load_policy(model_path, config.train, world), config.train)
    return TrainingLoop(
        config,
        trainer=trainer,
        trainer_thread=thread,
        runner=runner,
        problems=content.problems,
        held_out=content.held_out,
        folder=folder,
        display=display,
        progress=Progress(),
        engine_dtype=AutoConfig.from_pretrained(model_path).dtype or torch.float32,
    )


async def _bring_to_start(loop: TrainingLoop, config: RunConfig, content: Content, last: Path | None) -> None:
    """The trainer's state before the first step of this process: from the last checkpoint, or after the warm-up."""
    if last is not None:
        state = await loop.in_trainer(checkpoint.load, last, loop.trainer)
        loop.progress.step = loop.trainer.step
        loop.progress.version, loop.progress.position = int(str(state["version"])) - 1, int(str(state["position"]))
        loop.folder.forget_after(loop.trainer.step)
        loop.display.say(f"resumed after step {loop.trainer.step} from {last}")
    elif config.warmup is not None:
        await _warm_up(loop, config.warmup, config, content)


async def _warm_up(loop: TrainingLoop, warmup: WarmupConfig, config: RunConfig, content: Content) -> None:
    """Supervised steps by the same trainer code, with an optimizer and a schedule of their own."""
    settings: TrainConfig = config.train.model_copy(
        update=warmup.model_dump(include={"steps", *OptimizerConfig.model_fields})
    )
    supervised = Trainer(loop.trainer.policy, settings)
    schemas = [tool.schema for tool in content.tools.values()]

    def step(index: int) -> float:
        batch = warmup_conversations(content.chat, schemas, warmup.seed, index * warmup.batch_size, warmup.batch_size)
        return supervised.supervised_step([supervised_sample(c.token_ids, c.loss_mask.tolist()) for c in batch]).loss

    for index in range(warmup.steps):
        with loop.watch("warm-up"):
            loss = await loop.in_trainer(step, index)
        loop.display.progress("warm-up", index + 1, warmup.steps, f"loss {loss:.3f}")
