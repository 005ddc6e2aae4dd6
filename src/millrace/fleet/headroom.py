"""How many requests fit into an engine's KV cache, by what its requests will still make. No I/O.

Lengths of output are known only afterwards, so the finished requests say how likely an output of some length is to go
on. From that follows how many tokens the running requests will hold at each later moment: the mean, and how much more
that may be. A request is admitted if the largest of these, over all moments, fits with it.
This is the idea of LightLLM's Past-Future scheduler (arXiv:2507.10150) with a variance in place of a drawn length.
SGLang's `new_token_ratio` reserves one share of every limit instead, and vLLM reserves nothing and preempts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace.types import EngineLoad

REMEMBERED = 512  # finished requests whose lengths count
UNKNOWN = 4  # lengths spread evenly up to the limit count as seen, so that few finished requests do not decide alone
CAUTION = 2.0  # standard deviations above the mean that must fit, too
USABLE = 0.97  # of a KV cache: engines keep some tokens for the next step, and count in blocks
MOMENTS = 32  # at which the future is computed; their distances grow, as does what is uncertain
SPARE = 2, 1 / 8  # requests that may wait on an engine so that it never starves: at least so many, or this share

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Held:
    """What a request holds of an engine's KV cache.

    tokens: held now, until its end. made: output tokens so far. most: its limit on output tokens. certain: whether it
    makes all of them. stays: its share of a prompt that other running requests have, too, which may outlast it.
    """

    tokens: float
    made: float
    most: int
    certain: bool = False
    stays: float = 0.0


@dataclass(frozen=True, slots=True)
class Survival:
    """The share of outputs that are longer than each of some lengths, in ascending order; the first is 0."""

    lengths_N: FloatArray
    longer_N: FloatArray

    def beyond(self, lengths: FloatArray) -> FloatArray:
        """Return the share of outputs that are longer than each of the lengths."""
        found: FloatArray = self.longer_N[np.searchsorted(self.lengths_N, lengths, side="right") - 1]
        return found


class OutputLengths:
    """The lengths of the newest outputs."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, bool]] = deque(maxlen=REMEMBERED)

    def add(self, length: int, *, ended: bool) -> None:
        """Record an output. `ended`: it ended by itself, and not by a limit or an abort, which hide its length."""
        self._seen.append((length, ended))

    def survival(self, running: Sequence[Held], most: int) -> Survival:
        """Return the shares of longer outputs, by the estimator of Kaplan and Meier.

        Requests that run count as longer than what they have made. Without them, the outputs that end first would make
        all look short. most: the largest limit on output tokens.
        """
        guessed = [(most * (2 * i + 1) / (2 * UNKNOWN), True) for i in range(UNKNOWN)]
        known = np.array([*self._seen, *guessed, *((one.made, False) for one in running if not one.certain)], float)
        order = np.sort(known[:, 0])
        ends, counts = np.unique(known[known[:, 1] > 0, 0], return_counts=True)
        at_risk = len(order) - np.searchsorted(order, ends, side="left")
        longer = np.cumprod(1.0 - counts / at_risk)
        return Survival(np.concatenate(([0.0], ends)), np.concatenate(([1.0], longer)))


class Forecast:
    """The tokens that the requests of one engine will hold at several later moments.

    capacity: tokens of its KV cache. most: the largest limit on output tokens of all that it is asked about.
    """

    def __init__(self, capacity: int, survival: Survival, most: int, running: Sequence[Held] = ()) -> None:
        self._usable = USABLE * capacity
        self._survival = survival
        self._moments_M = np.unique(np.geomspace(1, max(most, 2), MOMENTS).round()) - 1.0
        self._mean_M = np.zeros(len(self._moments_M))
        self._variance_M = np.zeros(len(self._moments_M))
        if running:
            self._add(*self._of(running))

    def admits(self, request: Held) -> bool:
        """Return whether the request fits beside those that were added."""
        mean_M, variance_M = self._of([request])
        return self._peak(self._mean_M + mean_M, self._variance_M + variance_M) <= self._usable

    def add(self, request: Held) -> None:
        """Count a request that was admitted."""
        self._add(*self._of([request]))

    @property
    def headroom(self) -> float:
        """The tokens that stay free at the fullest moment."""
        return max(self._usable - self._peak(self._mean_M, self._variance_M), 0.0)

    def _add(self, mean_M: FloatArray, variance_M: FloatArray) -> None:
        self._mean_M += mean_M
        self._variance_M += variance_M

    def _of(self, requests: Sequence[Held]) -> tuple[FloatArray, FloatArray]:
        """Return the mean and the variance of what the requests hold at each moment."""
        table = np.array([(one.tokens, one.made, one.most, one.certain, one.stays) for one in requests], float)
        tokens_R1, made_R1, most_R1, certain_R1, stays_R1 = (table[:, i : i + 1] for i in range(5))
        now_R1 = self._survival.beyond(made_R1)
        later_RM = self._survival.beyond(made_R1 + self._moments_M)
        # Nothing is known beyond the longest output: such a request may go on to its limit.
        going_RM = np.where((certain_R1 > 0) | (now_R1 == 0), 1.0, later_RM / np.where(now_R1 == 0, 1.0, now_R1))
        going_RM = np.where(self._moments_M < most_R1 - made_R1, going_RM, 0.0)
        size_RM = tokens_R1 + self._moments_M
        return stays_R1.sum() + (going_RM * size_RM).sum(axis=0), (going_RM * (1 - going_RM) * size_RM**2).sum(axis=0)

    def _peak(self, mean_M: FloatArray, variance_M: FloatArray) -> float:
        return float((mean_M + CAUTION * np.sqrt(variance_M)).max())


@dataclass(frozen=True, slots=True)
class Flight:
    """A request that was sent to an engine.

    prompt: its tokens. key: of its prompt. before: output tokens of earlier calls, at the end of the prompt. most: the
    new tokens that it may make. sent: when (time.monotonic).
    """

    prompt: int
    key: int
    before: int
    most: int
    certain: bool
    sent: float

    @property
    def worst(self) -> int:
        """The tokens that it holds at its end if it makes the most that it may."""
        return self.prompt + self.most

    def held(self, now: float, speed: float, alike: int = 1, less: float = 0.0) -> Held:
        """Return what it holds now.

        speed: its output tokens per second. alike: the running requests with its prompt, which engines keep once. less:
        tokens of its prompt that it does not hold, because engines also share parts of prompts.
        """
        made = min(speed * (now - self.sent), max(self.most - 1.0, 0.0))
        prompt = max(self.prompt / alike - less, 0.0)
        tokens, stays = (made, prompt) if alike > 1 else (made + prompt, 0.0)
        return Held(tokens, made + self.before, self.most + self.before, self.certain, stays)


@dataclass(frozen=True, slots=True)
class Correction:
    """What an engine's report adds to the estimate of this process.

    speed: output tokens per second of one request, if the finished ones show too few. less: tokens of its prompt that
    each does not hold. others: the requests of other clients. tokens: of one of these.
    """

    speed: float | None = None
    less: float = 0.0
    others: int = 0
    tokens: float = 0.0


def compared(
    flights: Sequence[Flight],
    alike: Mapping[int, int],
    load: EngineLoad,
    *,
    asked: float,
    on_engine: int,
    now: float,
    speed: float,
) -> Correction:
    """Compare an engine's report with the requests of this process that are on it, in the order in which they came.

    alike: running requests with the same prompt, by its key. asked: when the report was asked for. on_engine: how many
    requests of this process were there then. What differs in tokens belongs to the other clients' requests if there are
    any, and otherwise to this process's requests that run.
    """
    sent = [one for one in flights if one.sent < asked]
    others = max(load.running_requests + load.waiting_requests - max(len(flights), on_engine), 0)
    running = sent[: load.running_requests]
    held = [one.held(now, speed, alike[one.key]) for one in running]
    rest = load.used_tokens - sum(one.tokens + one.stays for one in held)
    if others:
        return Correction(others=others, tokens=max(rest, 0.0) / others)
    if rest > 0 and (age := sum(now - one.sent for one in running)) > 0:
        return Correction(speed=speed + rest / age)
    return Correction(less=-rest / len(running)) if rest < 0 and running else Correction()


def most_requests(max_running: int | None, load: EngineLoad | None) -> float:
    """Return how many requests may be on an engine, those that wait there included; infinity if nothing limits them.

    max_running: the engine's own limit. If requests wait on it, it has its reasons not to run more. Half of them is not
    replaced, since they may wait only for their prompts to be computed.
    """
    limits = [float("inf")]
    if max_running is not None:
        limits.append(max_running + _spare(max_running))
    if load is not None and load.waiting_requests:
        running = load.running_requests
        limits.append(running + max(_spare(running), load.waiting_requests // 2))
    return min(limits)


def _spare(running: int) -> int:
    least, share = SPARE
    return max(least, int(running * share))
