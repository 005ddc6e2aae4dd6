"""The engine itself, without threads or HTTP: model, KV cache, scheduler and weights, one step at a time."""

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

PREFILL_TOKENS = 4096  # in one forward pass, padding included: bounds the memory that a pass takes
UNKNOWN = "unknown"  # the version of weights that nobody has brought
RATE_WINDOW = 1.0  # seconds over which tokens per second are counted


class Refused(MillraceError):
    """The engine will not do this now; nothing has changed. `status` is the HTTP answer that fits."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Status:
    """How the engine stands between two steps, as a value that other threads may read."""

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
    """Owned by one thread. What it has to tell its requests collects in `outbox`, as pairs of request id and output."""

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
        self._detached: frozenset[str] = frozenset()  # the adapters of the base before this one
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

    # What requests ask for

    def submit(self, requests: list[Request]) -> None:
        """Queues requests. Refuses them (503) while the weights are awake again but nobody has brought them."""
        if not self._weights_ready and MemoryTag.WEIGHTS not in self._asleep:
            raise Refused("the weights were released and have no content yet; update them, then generate", status=503)
        for request in requests:
            if request.lora_path is not None and request.lora_path not in self._detached:
                request.lora = self._lora(request.lora_path)
        self._scheduler.waiting.extend(requests)

    def abort(self, matches: Callable[[Request], bool], reason: str) -> int:
        """Ends the requests that match; each comes back with the tokens it has. Returns how many."""
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
            raise Refused("requests run or wait; the cache is flushed only when there are none")
        self.cache.forget()

    # Memory

    def sleep(self, tags: frozenset[MemoryTag]) -> None:
        """Releases memory; what sleeps already stays asleep. Refused while a request has KV cache."""
        tags -= self._asleep
        if tags and self._scheduler.running:
            raise Refused(
                f"{len(self._scheduler.running)} requests run; wait for them, abort them or pause in mode retract"
            )
        if MemoryTag.WEIGHTS in tags:
            self.weights.release()  # refuses while an update is open, and then nothing has been released
            self._weights_ready = False
            self._changed(UNKNOWN)
        if MemoryTag.KV_CACHE in tags:
            self.cache.release()
        self._asleep |= tags
        self._runner.trim()

    def wake(self, tags: frozenset[MemoryTag]) -> None:
        """Takes memory back. Woken weights have no content until an update brings it."""
        tags &= self._asleep
        if MemoryTag.KV_CACHE in tags:
            self.cache.allocate()
        if MemoryTag.WEIGHTS in tags:
            self.weights.resume()
        self._asleep -= tags

    # Weights

    def commit(self, version: str) -> None:
        """Makes the staged weights the served ones, under the name `version`. Requests that run keep their KV cache,
        and lose their adapter, which was made for the weights before."""
        self.weights.swap()
        self._weights_ready = True
        self._changed(version)
        for request in self._scheduler.live():
            request.lora = None
        self._detached = frozenset(self._loras)
        self._loras.clear()
        self._runner.hooks.clear()

    def rename(self, version: str) -> None:
        """Gives the weights another name. No prefix made under the old name is used under the new one."""
        if not self._weights_ready:
            raise Refused("the weights have no content; a version can't be claimed for them")
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

    # Adapters

    def load_lora(self, name: str, lora: Lora) -> None:
        if name in self._loras:
            raise Refused(f"an adapter {name} is loaded already")
        if not self._weights_ready:
            raise Refused("the weights have no content; bring them first, and then an adapter")
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
            raise Refused(f"no adapter {name} is loaded")
        return self._loras[name]

    def _epoch_of(self, request: Request) -> int:
        return self._epoch if request.lora is None else request.lora.epoch

    def _loras_of(self, requests: list[Request]) -> list[Lora | None]:
        """Of each row of a pass; empty where none has one."""
        if not any(request.lora for request in requests):
            return []
        return [None if request.lora is None else request.lora.lora for request in requests]

    # One step

    def step(self) -> None:
        """Prefills whoever has a slot now, then draws one token for everybody who runs."""
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
            self._accept(0, *sample(logits_BV, self._lanes[:running]))
        self._measure()

    def _prefill(self, fresh: list[Request]) -> None:
        for request in fresh:
            self.faults.at_prompt(request.prompt)
        pending = group(fresh)
        while pending:
            found = []
            for prefill in pending:
                # The last token is always computed anew: its logits are what the first draw needs.
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
                self._start(request, len(prefill.tokens) - 1)  # the last one counts as computed, as for everybody
        logits_BV = logits if len(owners) == len(wave) else logits[owners]
        self._accept(first, *sample(logits_BV, self._lanes[first : first + len(owners)]))

    def _start(self, request: Request, cached: int) -> None:
        """Gives the request the next slot and fills in its lane."""
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
        """The logits [B, V] after each prefill's last token."""
        loras = self._loras_of([prefill.requests[0] for prefill in wave])
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

    def _accept(self, first: int, tokens_B: NDArray[np.int64], logprobs_B: NDArray[np.float32]) -> None:
        """Gives the drawn tokens to the requests in the slots from `first` on, and ends those that are done."""
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
        """Lets requests go. From the last slot down, so that whoever fills the hole of one is not itself to go."""
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
