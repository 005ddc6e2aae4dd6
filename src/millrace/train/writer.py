"""Writes what a training run records, as the run goes."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

from millrace.errors import DataError
from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Sample
from millrace.train.advice import Advisor, Bounds, Seen, Work
from millrace.train.curves import draw_curves
from millrace.train.metrics import StepMetrics
from millrace.train.record import RunFolder
from millrace.train.samples import SampleFormat, Trained

DRAW_SECONDS = 30.0  # between two drawings of the curves
EVALUATED_SECONDS = 5.0  # and if the step was evaluated

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class Writer:
    """Writes metrics and advisories at once, and samples and curves in a thread, one file after the other.

    It is an async context manager. At its end everything is written, and the curves are drawn.

    title: of the curves. leads: whether this is rank 0, which alone writes more than samples.
    """

    def __init__(self, folder: RunFolder, chat: ChatFormat, bounds: Bounds, *, title: str, leads: bool) -> None:
        self._folder, self._title, self._leads = folder, title, leads
        self._form = SampleFormat(chat)
        self._metrics: list[StepMetrics] = []
        self._advisor = Advisor(bounds)
        self._pool = ThreadPoolExecutor(1, "writer")
        self._writing: set[asyncio.Future[None]] = set()
        self._drawing: asyncio.Future[None] | None = None
        self._drawn = -DRAW_SECONDS  # when (time.monotonic)
        self._shown = 0  # steps in the last drawing

    async def __aenter__(self) -> Self:
        if self._leads:
            self._metrics = self._folder.read_metrics()
            self._advisor.steps = [Seen(step) for step in self._metrics if step.reward is not None]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if len(self._metrics) > self._shown:
                self._draw()
            await self.done()
        except DataError as unwritten:
            if error is None:
                raise
            logger.error("%s", unwritten)
        finally:
            self._pool.shutdown()

    async def add_samples(self, step: int, samples: Sequence[Sample], trained: Mapping[str, Trained]) -> None:
        """Begin to write the samples of a step, when those before are written. Raises DataError if these were not."""
        await self.done()
        self._start(self._folder.add_samples, step, samples, trained, self._form)

    def add_step(
        self, metrics: StepMetrics, work: Mapping[str, Work] | None = None, failed: tuple[str, str] | None = None
    ) -> None:
        """Write the metrics of a step and what is new to say about the run. Raises DataError.

        work: of each engine so far. failed: a sample that failed in the step, and why.
        """
        if not self._leads:
            return
        self._folder.add_metrics(metrics)
        self._metrics.append(metrics)
        if metrics.reward is not None:
            advice = self._advisor.see(metrics, work or {}, failed)
            self._folder.add_advice(advice)
            for one in advice:
                logger.warning("%s. %s", one.text, one.do)
        since = time.monotonic() - self._drawn
        due = since >= (DRAW_SECONDS if metrics.accuracy is None else EVALUATED_SECONDS)
        if due and (self._drawing is None or self._drawing.done()):
            self._draw()

    async def done(self) -> None:
        """Wait until everything is written. Raises DataError if something was not."""
        writing, self._writing = self._writing, set()
        results = await asyncio.gather(*writing, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _draw(self) -> None:
        self._drawn, self._shown = time.monotonic(), len(self._metrics)
        metrics, title = tuple(self._metrics), self._title
        self._drawing = self._start(lambda: self._folder.add_curves(draw_curves(metrics, title)))

    def _start(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))
        self._writing.add(future)
        return future
