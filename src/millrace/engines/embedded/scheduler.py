"""Requests and the decisions about them: who waits, who runs, when one ends. No tensors, no threads."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from millrace.types import FinishReason, SamplingParams

# A request waits for another's prefill when that saves it at least this many tokens of its own: about what a second,
# smaller forward pass costs.
WORTH_WAITING_FOR = 32


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended. detail: the stop token, the length reached, or who aborted it."""

    reason: FinishReason
    detail: int | str


@dataclass(frozen=True, slots=True)
class Span:
    """The output tokens `start:end` were made by the weights called `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Output:
    """What a request has come to so far, as a value that other threads may read. finish None: it goes on."""

    output_ids: list[int]
    logprobs: list[float]
    finish: Finish | None
    spans: tuple[Span, ...]
    version: str
    prompt_tokens: int
    cached_tokens: int
    retractions: int


@dataclass(slots=True, eq=False)
class Request:
    """One sample in the making. stop: the token ids that end it. limit: the number of tokens that ends it."""

    id: str
    prompt: NDArray[np.int64]
    sampling: SamplingParams
    stream_key: int
    stop: frozenset[int]
    limit: int
    streams: bool
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0

    def add(self, token: int, logprob: float) -> Finish | None:
        """Takes a drawn token; tells whether it was the last one."""
        self.output.append(token)
        self.logprobs.append(logprob)
        if token in self.stop:
            return Finish(FinishReason.STOP, token)
        if len(self.output) >= self.limit:
            return Finish(FinishReason.LENGTH, self.limit)
        return None

    def known(self) -> NDArray[np.int64]:
        """Prompt and output so far."""
        return np.concatenate((self.prompt, np.asarray(self.output, np.int64))) if self.output else self.prompt

    def close_span(self, version: str) -> None:
        """Books every token since the last span on `version`."""
        self.spans[:] = self._spans(version)

    def snapshot(self, version: str, finish: Finish | None = None) -> Output:
        return Output(
            output_ids=self.output.copy(),
            logprobs=self.logprobs.copy(),
            finish=finish,
            spans=tuple(self._spans(version)),
            version=version,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            retractions=self.retractions,
        )

    def _spans(self, version: str) -> list[Span]:
        start = self.spans[-1].end if self.spans else 0
        if start == len(self.output):
            return self.spans
        if self.spans and self.spans[-1].version == version:
            return [*self.spans[:-1], Span(version, self.spans[-1].start, len(self.output))]
        return [*self.spans, Span(version, start, len(self.output))]


class Scheduler:
    """The waiting and the running. A running request's place in `running` is its KV slot."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.paused = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def live(self) -> Iterable[Request]:
        """Everybody who has not ended."""
        yield from self.running
        yield from self.waiting

    def admit(self) -> list[Request]:
        """Takes from the front of the queue as many as have a slot. The caller puts them into `running`."""
        count = min(len(self.waiting), self.max_running - len(self.running))
        return [self.waiting.popleft() for _ in range(count)]

    def drop_waiting(self, matches: Callable[[Request], bool]) -> list[Request]:
        dropped = [request for request in self.waiting if matches(request)]
        self.waiting = deque(request for request in self.waiting if not matches(request))
        return dropped

    def retract(self) -> None:
        """Sends everybody who runs back to the front of the queue, in their order. Their KV cache is lost."""
        for request in self.running:
            request.retractions += 1
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()


@dataclass(frozen=True, slots=True)
class Prefill:
    """Requests with the same known tokens: one forward pass serves them all. `reused` tokens are copied from slot `source`."""

    requests: list[Request]
    tokens: NDArray[np.int64]
    source: int = 0
    reused: int = 0


def group(requests: list[Request]) -> list[Prefill]:
    """Puts requests with the same tokens together, in the order of their first."""
    groups: dict[bytes, Prefill] = {}
    for request in requests:
        tokens = request.known()
        groups.setdefault(tokens.tobytes(), Prefill([], tokens)).requests.append(request)
    return list(groups.values())


def cut_wave(
    prefills: list[Prefill], shared: Callable[[int], NDArray[np.int64]], token_limit: int
) -> tuple[list[int], list[int]]:
    """Chooses which prefills go into the next forward pass and which wait for a later one.

    shared(i): for every prefill, how many leading tokens it shares with prefill i. One that shares much with a member of
    this wave waits, to copy it from there. Rows are padded to the longest, and rows times that stay within `token_limit`
    (but for a single row, which is cut by the runner). Returns the indices of both; the wave is never empty.
    """
    best = np.zeros(len(prefills), np.int64)
    wave: list[int] = []
    later: list[int] = []
    longest = 0
    for i, prefill in enumerate(prefills):
        fresh = len(prefill.tokens) - prefill.reused
        fits = max(longest, fresh) * (len(wave) + 1) <= token_limit
        if wave and (not fits or best[i] - prefill.reused >= WORTH_WAITING_FOR):
            later.append(i)
            continue
        wave.append(i)
        longest = max(longest, fresh)
        best = np.maximum(best, shared(i))
    return wave, later
