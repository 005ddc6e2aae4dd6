"""The engine without threads or HTTP: model, KV cache, scheduler and weights, one step at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.engines.embedded.cache import Prefix, SlotCache
from millrace.engines.embedded.faults import StepFaults
from millrace.engines.embedded.lora import Linears, LoadedLora, Lora
from millrace.engines.embedded.runner import ModelInfo, Runner
from millrace.engines.embedded.sampling import LANE, sample
from millrace.engines.embedded.scheduler import Finish, Output, Prefill, Request, Scheduler, cut_wave, group
from millrace.engines.embedded.weights import WeightStore
from millrace.errors import MillraceError
from millrace.types import FinishReason, MemoryTag, PauseMode

PREFILL_TOKENS = 4096  # per forward pass, with padding; bounds the memory of a pass
SCORED_TOKENS = 256  # per forward pass that returns the logits of every token
UNKNOWN = "unknown"  # the version of weights without content
RATE_WINDOW = 1.0  # seconds over which tokens per second are counted


class Refused(MillraceError):
    """The engine refused a call, and nothing has changed. status: the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the engine between two steps, as a value that other threads may read."""

    version: str
    paused: bool
    asleep: frozenset[MemoryTag]
    weights_ready: bool
    running: int
    waiting: int
    used_tokens: int
    max_tokens: int
    tokens_per_second: float
    cache_hit_rate: float


class Core:
    """The engine. Used by one thread only.

    outbox: the outputs that were not delivered yet, as pairs of request id and output.
    """

    def __init__(
        self, info: ModelInfo, runner: Runner, cache: SlotCache, weights: WeightStore, *, max_running: int, version: str
    ) -> None:
        self.info, self.cache, self.weights = info, cache, weights
        self.faults = StepFaults()
        self.outbox: list[tuple[str, Output]] = []
        self._runner = runner
        self._scheduler = Scheduler(max_running)
        self._lanes = np.zeros(max_running, LANE)
        self._version = version
        self._epoch = self._last_epoch = 0
        self._loras: dict[str, LoadedLora] = {}
        self._detached: frozenset[str] = frozenset()  # the LoRA adapters that the last commit detached
        self._asleep: frozenset[MemoryTag] = frozenset()
        self._weights_ready = True
        self._prompt_tokens = self._cached_tokens = 0
        self._rate, self._drawn, self._rate_since = 0.0, 0, time.monotonic()

    @property
    def linears(self) -> Linears:
        return self._runner.hooks.linears

    @property
    def has_work(self) -> bool:
        awake = self._weights_ready and not self._asleep
        return awake and not self._scheduler.paused and not self._scheduler.idle

    def status(self) -> Status:
        scheduler = self._scheduler
        return Status(
            version=self._version,
            paused=scheduler.paused,
            asleep=self._asleep,
            weights_ready=self._weights_ready,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_tokens=self.cache.used_tokens(len(scheduler.running)),
            max_tokens=scheduler.max_running * self.info.context_length,
            tokens_per_second=self._rate if self.has_work else 0.0,
            cache_hit_rate=self._cached_tokens / max(self._prompt_tokens, 1),
        )

    # Requests

    def submit(self, requests: list[Request]) -> None:
        """Queue requests. Raises Refused (503) while the weights are allocated again but have no content."""
        if not self._weights_ready and MemoryTag.WEIGHTS not in self._asleep:
            raise Refused("the weights were released and have no content yet; update them, then generate", status=503)
        for request in requests:
            if request.lora_path is not None and request.lora_path not in self._detached:
                request.lora = self._lora(request.lora_path)
        self._scheduler.waiting.extend(requests)

    def abort(self, matches: Callable[[Request], bool], reason: str) -> int:
        """End the requests that match; each returns the tokens it has. Return how many there were."""
        finish = Finish(FinishReason.ABORT, reason)
        dropped = self._scheduler.drop_waiting(matches)
        for request in dropped:
            self.outbox.append((request.id, request.snapshot(self._version, finish)))
        ended = [(slot, finish) for slot, request in enumerate(self._scheduler.running) if matches(request)]
        self._end(ended)
        return len(dropped) + len(ended)

    def pause(self, mode: PauseMode) -> None:
        self._scheduler.paused = True
        if mode is PauseMode.ABORT:
            self.abort(lambda _: True, "generation was paused in mode abort")
        elif mode is PauseMode.RETRACT:
            self._scheduler.retract()

    def resume(self) -> None:
        self._scheduler.paused = False

    def flush_cache(self) -> None:
        if not self._scheduler.idle:
            raise Refused("requests are running or waiting; the cache can be flushed only if there are none")
        self.cache.forget()

    # Memory

    def sleep(self, tags: frozenset[MemoryTag]) -> None:
        """Release memory. Memory that is released stays so. Raises Refused while a request is running."""
        tags -= self._asleep
        if tags and self._scheduler.running:
            raise Refused(
                f"{len(self._scheduler.running)} requests are running; wait, abort them or pause in mode retract"
            )
        if MemoryTag.WEIGHTS in tags:
            self.weights.release()  # raises while an update is open, before anything is released
            self._weights_ready = False
            self._changed(UNKNOWN)
        if MemoryTag.KV_CACHE in tags:
            self.cache.release()
        self._asleep |= tags
        self._runner.trim()

    def wake(self, tags: frozenset[MemoryTag]) -> None:
        """Allocate released memory. The weights have no content until an update brings it."""
        tags &= self._asleep
        if MemoryTag.KV_CACHE in tags:
            self.cache.allocate()
        if MemoryTag.WEIGHTS in tags:
            self.weights.resume()
        self._asleep -= tags

    # Weights

    def commit(self, version: str) -> None:
        """Make the staged weights the served ones, called `version`.

        Running requests keep their KV cache. They lose their LoRA adapter, which belongs to the old weights.
        """
        self.weights.swap()
        self._weights_ready = True
        self._changed(version)
        for request in self._scheduler.live():
            request.lora = None
        self._detached = frozenset(self._loras)
        self._loras.clear()
        self._runner.hooks.clear()

    def rename(self, version: str) -> None:
        """Rename the version of the weights. Prefixes that were cached under the old name are not reused."""
        if not self._weights_ready:
            raise Refused("the weights have no content, so they can't have a version")
        self._changed(version)

    def _changed(self, version: str) -> None:
        for request in self._scheduler.live():
            request.close_span(self._version)
        self._version = version
        self._epoch = self._next_epoch()
        self.cache.taint()

    def _next_epoch(self) -> int:
        self._last_epoch += 1
        return self._last_epoch

    # LoRA adapters

    def load_lora(self, name: str, lora: Lora) -> None:
        if name in self._loras:
            raise Refused(f"a LoRA adapter {name} is already loaded")
        if not self._weights_ready:
            raise Refused("the weights have no content; update them before loading a LoRA adapter")
        self._loras[name] = LoadedLora(lora, self._next_epoch())
        self._detached -= {name}
        self._runner.hooks.add(lora)

    def unload_lora(self, name: str) -> None:
        if name in self._detached:
            return
        self._lora(name)
        del self._loras[name]
        if not self._loras and not any(request.lora for request in self._scheduler.live()):
            self._runner.hooks.clear()

    def lora_checksums(self, name: str) -> dict[str, str]:
        return dict(self._lora(name).lora.checksums)

    def _lora(self, name: str) -> LoadedLora:
        if name not in self._loras:
            raise Refused(f"no LoRA adapter {name} is loaded")
        return self._loras[name]

    def _epoch_of(self, request: Request) -> int:
        return self._epoch if request.lora is None else request.lora.epoch

    def _loras_of(self, requests: list[Request]) -> list[Lora | None]:
        """Return the LoRA adapter of each row of a pass, or an empty list if no row has one."""
        if not any(request.lora for request in requests):
            return []
        return [None if request.lora is None else request.lora.lora for request in requests]

    # One step

    def step(self) -> None:
        """Prefill the requests that get a slot now, then sample one token for every running request."""
        self.faults.before_step()
        fresh = self._scheduler.admit()
        if fresh:
            self._prefill(fresh)
        running = len(self._scheduler.running)
        if running:
            tokens_B = self._lanes["token"][:running].copy()
            logits_BV = self._runner.forward(
                tokens_B[:, None],
                self.cache.lengths[:running, None].copy(),
                0,
                loras_B=self._loras_of(self._scheduler.running),
            )
            self.cache.extend(running, tokens_B)
            self._accept(0, *self._sample(0, logits_BV))
        self._measure()

    def _prefill(self, fresh: list[Request]) -> None:
        for request in fresh:
            self.faults.at_prompt(request.prompt)
        unscored = [request for request in fresh if request.unscored]
        pending = group([request for request in fresh if not request.unscored])
        for request in unscored:  # alone, and without a cached prefix, since they need the logits of every token
            self._run_wave([Prefill([request], request.known())])
        while pending:
            found = []
            for prefill in pending:
                # The last token is always computed: sampling the first output token needs its logits.
                epoch = self._epoch_of(prefill.requests[0])
                prefix = self.cache.find(prefill.tokens[:-1], epoch, len(self._scheduler.running))
                found.append(replace(prefill, source=prefix.slot, reused=prefix.length))
            wave, pending = cut_wave(found, PREFILL_TOKENS)
            self._run_wave(wave)

    def _run_wave(self, wave: list[Prefill]) -> None:
        first = len(self._scheduler.running)
        for slot, prefill in enumerate(wave, first):
            if prefill.reused:
                self.cache.copy(Prefix(prefill.source, prefill.reused), slot)
            else:
                self.cache.clean(slot)
        logits = self._forward_new(wave, first)
        owners: list[int] = []
        for i, prefill in enumerate(wave):
            self.cache.write(first + i, prefill.tokens, self._epoch_of(prefill.requests[0]))
            owners.append(i)
            self._start(prefill.requests[0], prefill.reused)
        for i, prefill in enumerate(wave):
            for request in prefill.requests[1:]:
                self.cache.copy(Prefix(first + i, len(prefill.tokens)), first + len(owners))
                owners.append(i)
                self._start(request, len(prefill.tokens) - 1)  # the last token counts as computed, as for every request
        logits_BV = logits if len(owners) == len(wave) else logits[owners]
        self._accept(first, *self._sample(first, logits_BV))

    def _sample(self, first: int, logits_BV: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample a token for each of the B requests in the slots from `first` on."""
        end = first + len(logits_BV)
        for row, request in enumerate(self._scheduler.running[first:end]):
            if request.changes is not None:
                request.changes.apply(logits_BV[row], len(request.output))
        return sample(logits_BV, self._lanes[first:end])

    def _start(self, request: Request, cached: int) -> None:
        """Give the request the next slot and fill in its lane."""
        sampling = request.sampling
        lane = (
            0,
            request.stream_key,
            len(request.output),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
        )
        self._lanes[len(self._scheduler.running)] = lane
        self._scheduler.running.append(request)
        if not request.output:
            request.cached_tokens = cached
            self._prompt_tokens += len(request.prompt)
            self._cached_tokens += cached

    def _forward_new(self, wave: list[Prefill], first: int) -> torch.Tensor:
        """Return the logits [B, V] after each prefill's last token."""
        loras = self._loras_of([prefill.requests[0] for prefill in wave])
        if wave[0].requests[0].unscored:
            return self._forward_scored(wave[0].requests[0], first, loras)
        if len(wave) == 1:
            tokens = wave[0].tokens
            for start in range(wave[0].reused, len(tokens), PREFILL_TOKENS):
                positions = np.arange(start, min(start + PREFILL_TOKENS, len(tokens)))
                logits_1V = self._runner.forward(tokens[None, positions], positions[None], first, loras_B=loras)
            return logits_1V
        width = max(len(p.tokens) - p.reused for p in wave)
        tokens_BQ = np.zeros((len(wave), width), np.int64)
        positions_BQ = np.zeros((len(wave), width), np.int64)
        real_BQ = np.zeros((len(wave), width), np.bool_)
        for row, prefill in enumerate(wave):
            own = slice(width - (len(prefill.tokens) - prefill.reused), width)
            tokens_BQ[row, own] = prefill.tokens[prefill.reused :]
            positions_BQ[row, own] = np.arange(prefill.reused, len(prefill.tokens))
            real_BQ[row, own] = True
        return self._runner.forward(tokens_BQ, positions_BQ, first, None if real_BQ.all() else real_BQ, loras)

    def _forward_scored(self, request: Request, slot: int, loras: list[Lora | None]) -> torch.Tensor:
        """Return the logits [1, V] after the last token of a request without output, and note its prompt's logprobs."""
        tokens, found = request.prompt, [float("nan")]
        for start in range(0, len(tokens), SCORED_TOKENS):
            positions = np.arange(start, min(start + SCORED_TOKENS, len(tokens)))
            following = tokens[start + 1 : start + 1 + len(positions)]
            logits_1V, logprobs = self._runner.logprobs(tokens[positions], positions, slot, following, loras)
            found += logprobs
        request.prompt_logprobs = found
        return logits_1V

    def _accept(self, first: int, tokens_B: NDArray[np.int64], logprobs_B: NDArray[np.float32]) -> None:
        """Append the sampled tokens to the requests in the slots from `first` on, and end those that are done."""
        lanes = self._lanes[first : first + len(tokens_B)]
        lanes["token"] = tokens_B
        lanes["drawn"] += np.uint64(1)
        self.cache.spoiled[first : first + len(tokens_B)] |= ~np.isfinite(logprobs_B)
        ended = []
        for slot, (token, logprob) in enumerate(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True), first):
            request = self._scheduler.running[slot]
            finish = request.add(token, logprob)
            if finish is not None:
                ended.append((slot, finish))
            elif request.streams:
                self.outbox.append((request.id, request.snapshot(self._version)))
        self._drawn += len(tokens_B)
        self.faults.after_tokens(len(tokens_B))
        self._end(ended)

    def _end(self, ended: list[tuple[int, Finish]]) -> None:
        """Remove requests, from the last slot down, so that the request that fills a gap is not itself ending."""
        running = self._scheduler.running
        for slot, finish in reversed(ended):
            request = running[slot]
            self.outbox.append((request.id, request.snapshot(self._version, finish)))
            self.cache.store(slot)
            last = len(running) - 1
            if slot != last:
                self.cache.copy(Prefix(last, int(self.cache.lengths[last])), slot)
                self._lanes[slot] = self._lanes[last]
                running[slot] = running[last]
            running.pop()

    def _measure(self) -> None:
        now = time.monotonic()
        if now - self._rate_since >= RATE_WINDOW:
            self._rate = self._drawn / (now - self._rate_since)
            self._drawn, self._rate_since = 0, now
