"""The rollouts of TRL's `AsyncGRPOTrainer` on a fleet: groups that are generated while the trainer trains."""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.experimental.async_grpo import AsyncGRPOConfig

from millrace.errors import ArgumentError, DataError, EngineError, MillraceError, RolloutError
from millrace.fleet.client import FleetClient
from millrace.integrations.trl.conversation import Conversations, PlayedConversation, ToolCode
from millrace.integrations.trl.requests import Sender, sampling_params
from millrace.integrations.trl.scoring import Row, Scorer
from millrace.integrations.trl.transfer import FleetWeights
from millrace.rollout.agent import AbortedGeneration
from millrace.sync import Fleet
from millrace.types import RoutingContext

logger = logging.getLogger(__name__)

DROPPED = (EngineError, DataError, AbortedGeneration)  # what fails one group, and not all of them
ROOM_SECONDS = 0.05  # between looks at the trainer's queue, which has no event for a free place
DROPPED_SECONDS = 1.0  # between groups while groups are dropped, so that failures do not come in thousands
STOP_DEADLINE = 30.0  # seconds for the rollouts to end


class FleetRolloutWorker:
    """A `rollout_worker` for `AsyncGRPOTrainer` that generates on a fleet. Its `weights` are the `weight_transfer`.

    Groups run side by side, and each goes to the trainer when its last sample has its reward. Generated samples and
    those that the trainer has not taken yet are together at most `max_inflight_tasks` of the config, so few become too
    stale. A sample's `model_version` is that of its oldest token.

    A request whose engine fails continues on another one. If it fails for good, its group is dropped, logged, and
    counted (`rollout/dropped_groups_total`). A reward function that raises ends the run.

    `rollout_buffer`, `metrics_queue`: the queues that the trainer reads. `weights`: publishes to the fleet.

    Args:
        fleet: The fleet. It must stay open while the trainer trains.
        config: The trainer's. If its `token_budget` is None, it becomes the engines' context length, because the
            trainer would ask a vLLM server for it.
        dataset: Rows with a `prompt` of chat messages. It begins again at its end. Other columns go to the reward
            functions.
        tokenizer: The model's tokenizer, with its chat template.
        reward_funcs: Functions as for TRL's trainers, async or not: they take `prompts`, `completions`,
            `completion_ids` and the columns, each with one item per sample of a group, and return a list of numbers.
            None leaves a sample without a reward.
        tools, max_turns, max_turn_tokens, tool_timeout: As for `FleetRollout`.
        deadline: Seconds for one request, retries included, and for one call of a reward function.
        retries: How many engine failures one request survives.

    Raises:
        ConfigError: A setting of the config can't be honoured on a fleet.
        DataError: Turns can't be appended in the chat template.
        ArgumentError: An argument has the wrong type.

    Example:

        worker = FleetRolloutWorker(fleet, config, dataset, tokenizer, reward_funcs=[correct])
        trainer = AsyncGRPOTrainer(
            model=MODEL, args=config, train_dataset=dataset, processing_class=tokenizer,
            rollout_worker=worker, weight_transfer=worker.weights,
        )
        trainer.train()
    """

    def __init__(
        self,
        fleet: Fleet,
        config: AsyncGRPOConfig,
        dataset: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Sequence[Callable[..., Any]] | Callable[..., Any],
        tools: Sequence[ToolCode] = (),
        *,
        max_turns: int = 8,
        max_turn_tokens: int | None = None,
        tool_timeout: float | None = None,
        deadline: float = 600.0,
        retries: int = 3,
    ) -> None:
        if not isinstance(config, AsyncGRPOConfig):
            raise ArgumentError(f"config must be TRL's AsyncGRPOConfig, and is a {type(config).__name__}")
        self.weights = FleetWeights(fleet)
        sampling_params(config, 1, ())
        if config.token_budget is None:
            config.token_budget = fleet.context_length
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self._fleet, self._config, self._dataset = fleet, config, dataset
        self._conversations = Conversations.of(tokenizer, tools, max_turns, max_turn_tokens, tool_timeout)
        self._scorer = Scorer(functions, deadline)
        self._sender = Sender(deadline, retries)
        self._thread: threading.Thread | None = None
        self._end: Callable[[], object] | None = None
        self._stopping = False
        self._error: BaseException | None = None  # what ended the rollouts
        self._dropped: MillraceError | None = None  # why the last group was dropped, if none was delivered since
        self._delivered = self._progress = 0.0  # time.monotonic()
        self._unfinished = 0  # samples

    def start(self) -> None:
        """Begin to generate, in the fleet's event loop. Called by the trainer after its first publish."""
        self._stopping, self._error, self._dropped = False, None, None
        self._delivered = self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="millrace-trl-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort the running requests, and wait for the rollouts to end. Called by the trainer when it ends."""
        self._stopping = True
        if self._thread is None:
            return
        if self._end is not None:
            with suppress(RuntimeError):  # the fleet's loop has ended, and with it the rollouts
                self._end()
        self._thread.join(STOP_DEADLINE)
        if self._thread.is_alive():
            logger.error("the rollouts did not end within %g s", STOP_DEADLINE)
        self._thread = None

    def update_model_version(self, model_version: int) -> None:
        """Do nothing: samples have the versions that their engines report."""

    def check_health(self, stale_after_s: float) -> None:
        """Raise RolloutError if the rollouts have ended, hang, or give no samples.

        They hang if for `stale_after_s` seconds no turn was generated, no tool answered and no group ended. They give
        no samples if all groups of the last `stale_after_s` seconds were dropped.
        """
        now, state = time.monotonic(), f"{self._unfinished} samples are unfinished"
        if self._error is not None:
            raise RolloutError(f"the rollouts have ended: {self._error}") from self._error
        if self._dropped is not None and now - self._delivered > stale_after_s:
            raise RolloutError(
                f"all groups of the last {stale_after_s:g} s failed ({state}): {self._dropped}"
            ) from self._dropped
        if now - self._progress > stale_after_s:
            raise RolloutError(
                f"nothing was generated and no reward function returned for {stale_after_s:g} s ({state}): "
                f"{self._fleet.snapshot.describe()}"
            )

    def _run(self) -> None:
        try:
            self._fleet.run(self._produce)
        except (CancelledError, asyncio.CancelledError) as error:
            self._error = None if self._stopping else error
        except BaseException as error:  # the trainer's thread raises it in check_health
            self._error = error

    async def _produce(self, fleet: FleetClient) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._end = lambda: loop.call_soon_threadsafe(task.cancel)
        if self._stopping:
            return
        try:
            async with asyncio.TaskGroup() as groups:
                async for number, row in self._rows():
                    await self._room()
                    self._unfinished += self._config.num_generations
                    groups.create_task(self._group(fleet, number, row))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        finally:
            self._unfinished = 0

    async def _rows(self) -> AsyncIterator[tuple[int, Row]]:
        """Yield the rows of the data set again and again, with numbers from 0."""
        numbers, end = itertools.count(), object()
        while True:
            rows, first = iter(self._dataset), True
            while (row := await asyncio.to_thread(next, rows, end)) is not end:
                assert isinstance(row, Mapping)
                yield next(numbers), row
                first = False
            if first:
                raise DataError("the data set has no rows")

    async def _room(self) -> None:
        """Wait until one more group would not be too much for the trainer, and longer if the last one was dropped."""
        if self._dropped is not None:
            await asyncio.sleep(DROPPED_SECONDS)
        most = max(self._config.max_inflight_tasks, self._config.num_generations)
        while self._unfinished + self.rollout_buffer.qsize() + self._config.num_generations > most:
            if not self._unfinished:
                self._progress = self._delivered = time.monotonic()  # the trainer is what we wait for
            await asyncio.sleep(ROOM_SECONDS)

    async def _group(self, fleet: FleetClient, number: int, row: Row) -> None:
        """Generate the samples of one row, score them, and hand them to the trainer."""
        began = time.monotonic()
        try:
            played = await self._play(fleet, number, row)
            samples = await self._scorer.score(row, number, played, self.weights.model_version)
        except DROPPED as error:
            logger.warning("group %d was dropped: %s", number, error)
            self._dropped = error
            self.metrics_queue.put_nowait({"rollout/dropped_groups_total": 1.0})
        else:
            self._deliver(samples, played, time.monotonic() - began)
        finally:
            self._progress = time.monotonic()
            self._unfinished -= self._config.num_generations

    async def _play(self, fleet: FleetClient, number: int, row: Row) -> list[PlayedConversation]:
        async def play(sample: int) -> PlayedConversation:
            name = f"trl-{number}-{sample}"
            routing = RoutingContext(session=name, group=f"trl-{number}")
            return await self._conversations.play(
                fleet, self._sender, name, row["prompt"], routing, self._config, self._progressed
            )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(play(sample)) for sample in range(self._config.num_generations)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [task.result() for task in tasks]

    def _progressed(self) -> None:
        self._progress = time.monotonic()

    def _deliver(self, samples: Sequence[Any], played: Sequence[PlayedConversation], seconds: float) -> None:
        for sample in samples:
            sample.enqueued_at = time.time()
            self.rollout_buffer.put_nowait(sample)
        self._delivered, self._dropped = time.monotonic(), None
        lengths = [int(one.episode.loss_mask.sum()) for one in played]
        self.metrics_queue.put_nowait(
            {
                "completions/mean_length": (float(sum(lengths)), float(len(lengths))),
                "completions/max_length": float(max(lengths)),
                "completions/min_length": float(min(lengths)),
                "rollout/turns_mean": (float(sum(one.episode.turns for one in played)), float(len(played))),
                "rollout/duration_s": seconds,
                "rollout/inflight": float(self._unfinished),
            }
        )
