"""The KV cache: a slot of `context_length` tokens for each running request, and slots for finished prefixes.

Running requests fill the slots 0 to B-1 without a gap, so a step reads a plain view and gathers nothing. The slots
above `running` keep the prefixes of finished requests. The least recently used prefix is dropped first.

Each slot has an epoch, which says which weights computed it. Every change of the weights starts a new epoch. A prefix
is reused in its own epoch only. A slot that two epochs computed is MIXED and never reused.
"""

import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

from millrace.engines.embedded.scheduler import common_prefixes

MIXED = -1


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one token's keys and values in one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `length` tokens of a slot."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the cache that a forward pass uses: the first `context` positions of `rows` slots from slot `first`.

    slots_T, positions_T: where each new token is written. sources_T: the indices of these tokens among the rows * query
    tokens, row by row; None: all of them.
    """

    first: int
    rows: int
    context: int
    slots_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    sources_T: NDArray[np.int64] | None


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers comes without types
    """The cache of one layer, as the model's attention uses it.

    `update` writes the step's keys and values, and returns all keys and values that the rows of the step can attend to.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, keys_SHCD: torch.Tensor, values_SHCD: torch.Tensor) -> None:
        super().__init__()
        self.keys_SHCD, self.values_SHCD = keys_SHCD, values_SHCD
        self.is_initialized = True

    def aim(
        self,
        windows: tuple[torch.Tensor, torch.Tensor],
        places: tuple[torch.Tensor, torch.Tensor],
        sources_T: torch.Tensor | None,
    ) -> None:
        """Set what the next `update` returns and where it writes, as pairs for keys and values.

        windows: [rows, heads, context, dim]. places: [T * heads], flat indices over slots, heads and context.
        """
        self._windows, self._places, self._sources_T = windows, places, sources_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values, and return the window.

        key_states, value_states: [rows, heads, query, dim]. Returns both as [rows, heads, context, dim].
        """
        self._write(self.keys_SHCD, self._places[0], key_states)
        self._write(self.values_SHCD, self._places[1], value_states)
        return self._windows

    def _write(self, slots_SHCD: torch.Tensor, places: torch.Tensor, states: torch.Tensor) -> None:
        if states.shape[2] > 1:
            states = states.transpose(1, 2).flatten(0, 1)  # tokens, heads, dim
            if self._sources_T is not None:
                states = states[self._sources_T]
        dim = states.shape[-1]
        slots_SHCD.view(-1, dim).index_copy_(0, places, states.reshape(-1, dim))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the slots exist before the first token."""

    def get_seq_length(self) -> int:
        return self._windows[0].shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002  # transformers passes it by name
        return self._windows[0].shape[2], 0

    def get_max_length(self) -> int:
        return self.keys_SHCD.shape[2]

    def get_max_cache_shape(self) -> int:  # the name up to transformers 5.11, where it is abstract
        return self.get_max_length()


class SlotCache:
    """The slots of all layers, and the tokens that each slot holds. Used by the model thread only."""

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        running: int,
        stored: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.running = running
        self.context_length = context_length
        self._shapes, self._dtype, self._device = layers, dtype, device
        slots = running + stored
        self.tokens = np.zeros((slots, context_length), np.int64)
        self.lengths = np.zeros(slots, np.int64)
        self.epochs = np.full(slots, MIXED, np.int64)
        self.spoiled = np.zeros(slots, np.bool_)  # whether it may hold NaNs, which broken weights produce
        self._rows = np.arange(running)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0
        self._buffers: list[torch.Tensor] = []
        self._layers: list[SlotLayer] = []
        # The buffer and the row in it: of each layer's keys, then of each layer's values.
        self._homes: list[tuple[int, int]] = []
        self.model_cache: Cache | None = None
        self.allocate()

    def allocate(self) -> None:
        """Allocate the memory, zeroed (see `clean`)."""
        self.spoiled[:] = False
        kinds = [(s.key_heads, s.key_dim) for s in self._shapes] + [(s.value_heads, s.value_dim) for s in self._shapes]
        unlike = list(dict.fromkeys(kinds))  # one buffer per shape, so that few calls copy a slot
        members = [[i for i, kind in enumerate(kinds) if kind == one] for one in unlike]
        self._homes = [(unlike.index(kind), members[unlike.index(kind)].index(i)) for i, kind in enumerate(kinds)]
        context = self.context_length | 1  # odd, so that slots do not all map to the same few sets of the CPU cache
        self._buffers = [
            _zeros((len(rows), len(self.lengths), heads, context, dim), self._dtype, self._device)
            for rows, (heads, dim) in zip(members, unlike, strict=True)
        ]
        tensors = [self._buffers[buffer][row] for buffer, row in self._homes]
        count = len(self._shapes)
        self._layers = [SlotLayer(k, v) for k, v in zip(tensors[:count], tensors[count:], strict=True)]
        self.model_cache = Cache(layers=self._layers)

    def release(self) -> None:
        """Free the memory, and drop every stored prefix."""
        self.forget()
        self._buffers, self._layers, self.model_cache = [], [], None

    def forget(self) -> None:
        """Drop every stored prefix."""
        self.epochs[self.running :] = MIXED
        self.lengths[self.running :] = 0

    def taint(self) -> None:
        """Mark the slots after a change of the weights: running ones are mixed, stored prefixes are dropped."""
        self.epochs[: self.running] = MIXED
        self.forget()

    def aim(self, window: Window) -> None:
        """Set what the next forward pass reads and writes."""
        rows = slice(window.first, window.first + window.rows)
        windows = [buffer[:, rows, :, : window.context].unbind(0) for buffer in self._buffers]
        places = []
        for buffer in self._buffers:
            heads, context = buffer.shape[2:4]
            places_TH = (window.slots_T[:, None] * heads + np.arange(heads)) * context + window.positions_T[:, None]
            places.append(torch.from_numpy(places_TH.reshape(-1)).to(self._device))
        sources_T = None if window.sources_T is None else torch.from_numpy(window.sources_T).to(self._device)
        count = len(self._layers)
        for layer, key, value in zip(self._layers, self._homes[:count], self._homes[count:], strict=True):
            layer.aim(
                (windows[key[0]][key[1]], windows[value[0]][value[1]]), (places[key[0]], places[value[0]]), sources_T
            )

    def find(self, tokens: NDArray[np.int64], epoch: int, running: int) -> Prefix:
        """Return the longest prefix of `tokens` in a stored slot or one of the first `running` slots.

        Its length is 0 if there is none.
        """
        lengths = common_prefixes(self.tokens, self.lengths, tokens)
        lengths[self.epochs != epoch] = 0
        lengths[running : self.running] = 0
        slot = int(lengths.argmax())
        return Prefix(slot, int(lengths[slot]))

    def copy(self, prefix: Prefix, to: int, start: int = 0) -> None:
        """Copy a prefix into slot `to`, which then holds only it. The first `start` tokens are there already."""
        slot, end = prefix.slot, prefix.length
        if slot != to and start == 0:
            self.clean(to)
        if slot != to and start < end:
            for buffer in self._buffers:
                buffer[:, to, :, start:end] = buffer[:, slot, :, start:end]
            self.tokens[to, start:end] = self.tokens[slot, start:end]
        self.lengths[to] = end
        self.epochs[to] = self.epochs[slot]
        self.spoiled[to] |= self.spoiled[slot]
        self._touch(slot)
        self._touch(to)

    def clean(self, slot: int) -> None:
        """Zero a slot that may hold NaNs, before other tokens use it.

        Attention also reads masked positions, and a NaN there would spread.
        """
        if self.spoiled[slot]:
            for buffer in self._buffers:
                buffer[:, slot].zero_()
            self.spoiled[slot] = False

    def write(self, slot: int, tokens: NDArray[np.int64], epoch: int) -> None:
        """Record that the model has computed the slot for `tokens`, from the first to the last."""
        self.tokens[slot, : len(tokens)] = tokens
        self.lengths[slot] = len(tokens)
        self.epochs[slot] = epoch

    def extend(self, rows: int, tokens_B: NDArray[np.int64]) -> None:
        """Record that a step has added one token to each of the first `rows` slots."""
        self.tokens[self._rows[:rows], self.lengths[:rows]] = tokens_B
        self.lengths[:rows] += 1

    def store(self, slot: int) -> None:
        """Keep a running slot's content for later requests.

        A mixed slot, or one that a stored prefix covers, is not kept. A stored prefix that it extends is replaced.
        """
        if self.epochs[slot] == MIXED or self.running == len(self.lengths):
            return
        length = int(self.lengths[slot])
        stored = slice(self.running, None)
        shared = common_prefixes(self.tokens[stored], self.lengths[stored], self.tokens[slot, :length])
        shared[self.epochs[stored] != self.epochs[slot]] = 0
        longest = int(shared.argmax())
        if shared[longest] == length:
            self._touch(self.running + longest)
            return
        extended = np.flatnonzero((shared > 0) & (shared == self.lengths[stored]))
        if len(extended):
            to, start = self.running + int(extended[0]), int(shared[extended[0]])
        else:
            to, start = self.running + int(np.where(self.epochs[stored] == MIXED, -1, self._used[stored]).argmin()), 0
        self.copy(Prefix(slot, length), to, start)

    def used_tokens(self, running: int) -> int:
        """Return the number of tokens in the first `running` slots."""
        return int(self.lengths[:running].sum())

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. On the CPU, the kernel makes each page when it is first written, so that waking takes no time."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # the tensor keeps it
    return torch.frombuffer(memory, dtype=dtype).view(shape)
