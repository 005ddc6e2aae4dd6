"""Requests, and the decisions on which wait, which run and when they end. No tensors, no threads."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from millrace.engines.embedded.lora import LoadedLora
from millrace.engines.embedded.penalties import LogitChanges
from millrace.engines.embedded.text import StopTexts
from millrace.types import FinishReason, SamplingParams

# A request waits for another's prefill if that saves at least this many tokens, about the cost of a second, smaller
# forward pass.
WORTH_WAITING_FOR = 32


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended. detail: the stop token or text, the length limit, or the reason of the abort."""

    reason: FinishReason
    detail: int | str


@dataclass(frozen=True, slots=True)
class Span:
    """The output tokens `start:end`, which the weights of `version` generated."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Output:
    """The cumulative output of a request, as a value that other threads may read. finish: None while it runs."""

    output_ids: list[int]
    logprobs: list[float]
    finish: Finish | None
    spans: tuple[Span, ...]
    version: str
    prompt_tokens: int
    cached_tokens: int
    retractions: int
    text: str
    prompt_logprobs: list[float] | None  # None before the end


@dataclass(slots=True, eq=False)
class Request:
    """One sample that waits or runs.

    stop: the token ids that end it. limit: the number of output tokens that ends it. lora_path: the name of the
    requested LoRA adapter. lora: the adapter that it uses now. scored: whether the logprobs of its prompt are wanted.
    prompt_logprobs: [P], computed with the prompt; the first is NaN. changes: to its logits. texts: its stop texts.
    """

    id: str
    prompt: NDArray[np.int64]
    sampling: SamplingParams
    stream_key: int
    stop: frozenset[int]
    limit: int
    streams: bool
    lora_path: str | None = None
    lora: LoadedLora | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0
    scored: bool = False
    prompt_logprobs: list[float] | None = None
    changes: LogitChanges | None = None
    texts: StopTexts | None = None

    @property
    def unscored(self) -> bool:
        """Whether the logprobs of its prompt are wanted and were not computed yet."""
        return self.scored and self.prompt_logprobs is None

    def add(self, token: int, logprob: float) -> Finish | None:
        """Append a sampled token. Return how the request ended, or None if it continues."""
        self.output.append(token)
        self.logprobs.append(logprob)
        if self.changes is not None:
            self.changes.count(token)
        if token in self.stop:
            return Finish(FinishReason.STOP, token)
        if self.texts is not None and (found := self.texts.add(token)) is not None:
            return Finish(FinishReason.STOP, found)
        if len(self.output) >= self.limit:
            return Finish(FinishReason.LENGTH, self.limit)
        return None

    def known(self) -> NDArray[np.int64]:
        """Return prompt and output so far."""
        return np.concatenate((self.prompt, np.asarray(self.output, np.int64))) if self.output else self.prompt

    def close_span(self, version: str) -> None:
        """Assign every token since the last span to `version`."""
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
            text="" if self.texts is None else self.texts.text,
            prompt_logprobs=None if finish is None else self.prompt_logprobs,
        )

    def _spans(self, version: str) -> list[Span]:
        start = self.spans[-1].end if self.spans else 0
        if start == len(self.output):
            return self.spans
        if self.spans and self.spans[-1].version == version:
            return [*self.spans[:-1], Span(version, self.spans[-1].start, len(self.output))]
        return [*self.spans, Span(version, start, len(self.output))]


class Scheduler:
    """The waiting and running requests. A running request's index in `running` is its KV slot."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.paused = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def live(self) -> Iterable[Request]:
        """Yield every request that has not ended."""
        yield from self.running
        yield from self.waiting

    def admit(self) -> list[Request]:
        """Remove from the front of the queue as many requests as there are slots. The caller adds them to `running`."""
        count = min(len(self.waiting), self.max_running - len(self.running))
        return [self.waiting.popleft() for _ in range(count)]

    def drop_waiting(self, matches: Callable[[Request], bool]) -> list[Request]:
        dropped = [request for request in self.waiting if matches(request)]
        self.waiting = deque(request for request in self.waiting if not matches(request))
        return dropped

    def retract(self) -> None:
        """Move the running requests back to the front of the queue, in order. Their KV cache is lost."""
        for request in self.running:
            request.retractions += 1
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()


def common_prefixes(
    table_RN: NDArray[np.int64], lengths_R: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many leading tokens each row of the table shares with `tokens`, as [R].

    lengths_R: the number of valid tokens of each row.
    """
    width = min(table_RN.shape[1], len(tokens))
    if width == 0:
        return np.zeros(len(table_RN), np.int64)
    same_RN = table_RN[:, :width] == tokens[:width]
    lengths: NDArray[np.int64] = np.where(same_RN.all(axis=1), width, same_RN.argmin(axis=1))
    return np.minimum(lengths, lengths_R, out=lengths)


@dataclass(frozen=True, slots=True)
class Prefill:
    """The shared prefill of requests with the same tokens and LoRA adapter.

    The first `reused` tokens are copied from slot `source`.
    """

    requests: list[Request]
    tokens: NDArray[np.int64]
    source: int = 0
    reused: int = 0


def group(requests: list[Request]) -> list[Prefill]:
    """Group requests with the same tokens and LoRA adapter. A group has the position of its first request."""
    groups: dict[tuple[LoadedLora | None, bytes], Prefill] = {}
    for request in requests:
        tokens = request.known()
        groups.setdefault((request.lora, tokens.tobytes()), Prefill([], tokens)).requests.append(request)
    return list(groups.values())


def cut_wave(prefills: list[Prefill], token_limit: int) -> tuple[list[Prefill], list[Prefill]]:
    """Choose which prefills go into the next forward pass (the wave) and which wait for a later one.

    A prefill that shares a long prefix with one in the wave waits, so that it can copy the prefix. The rows of a pass
    are padded to the longest, and the padded size stays within `token_limit`. A single longer row is allowed, because
    it runs in chunks. Returns the wave, which is not empty, and the rest, both in order.
    """
    table = np.full((len(prefills), max(len(p.tokens) for p in prefills)), -1, np.int64)
    for row, prefill in enumerate(prefills):
        table[row, : len(prefill.tokens)] = prefill.tokens
    # The last token of each is always computed: sampling the first output token needs its logits.
    lengths = np.array([len(p.tokens) - 1 for p in prefills])
    shared = np.zeros(len(prefills), np.int64)
    wave: list[Prefill] = []
    later: list[Prefill] = []
    longest = 0
    for i, prefill in enumerate(prefills):
        fresh = len(prefill.tokens) - prefill.reused
        fits = max(longest, fresh) * (len(wave) + 1) <= token_limit
        if wave and (not fits or shared[i] - prefill.reused >= WORTH_WAITING_FOR):
            later.append(prefill)
            continue
        wave.append(prefill)
        longest = max(longest, fresh)
        shared = np.maximum(shared, common_prefixes(table, lengths, prefill.tokens))
    return wave, later
