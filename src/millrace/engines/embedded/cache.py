"""The KV cache: one slot of `context_length` tokens for every running request, and slots for finished prefixes.

Running requests fill the slots 0 to B-1 without a hole, so that a step reads a plain view and gathers nothing. The
slots above `running` keep the prefixes of finished requests, the least recently used leaves first.

Whose weights computed a slot is told by its epoch, a number that every change of the weights raises. A prefix is reused
under its own epoch only; a slot that two epochs had a hand in is MIXED and never reused.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

from millrace.engines.embedded.scheduler import common_prefixes

MIXED = -1


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: heads and their width, for keys and for values."""

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
    """What a forward pass reads and writes: the first `context` places of `rows` slots, from slot `first` on.

    slots_T, positions_T: where each new token goes. sources_T: which of the rows * query tokens these are, counted row
    by row; None: all of them.
    """

    first: int
    rows: int
    context: int
    slots_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    sources_T: NDArray[np.int64] | None


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers comes without types
    """One layer's face of the slots, as the model's attention sees it: `update` writes the step's keys and values to
    their places and returns everything that the rows of the step may look at."""

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
        """Sets what the next `update` returns and where it writes, for keys and for values: windows [rows, heads,
        context, dim], places [T * heads] counted through slots, heads and context."""
        self._windows, self._places, self._sources_T = windows, places, sources_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states: [rows, heads, query, dim]. Returns both as [rows, heads, context, dim]."""
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
        """Nothing is lazy here: the slots exist before the first token."""

    def get_seq_length(self) -> int:
        return self._windows[0].shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002  # transformers passes it by name
        return self._windows[0].shape[2], 0

    def get_max_length(self) -> int:
        return self.keys_SHCD.shape[2]

    def get_max_cache_shape(self) -> int:  # its name up to transformers 5.11, where it is abstract
        return self.get_max_length()


class SlotCache:
    """All layers' slots and, beside them, which tokens each slot holds. Belongs to the model thread."""

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
        self.spoiled = np.zeros(slots, np.bool_)  # it may hold NaNs, of weights that had some
        self._rows = np.arange(running)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0
        self._buffers: list[torch.Tensor] = []
        self._layers: list[SlotLayer] = []
        self._homes: list[
            tuple[int, int]
        ] = []  # of each layer's keys, then of each one's values: buffer, and row in it
        self.model_cache: Cache | None = None
        self.allocate()

    def allocate(self) -> None:
        """Takes the memory, zeroed: see `clean`."""
        self.spoiled[:] = False
        kinds = [(s.key_heads, s.key_dim) for s in self._shapes] + [(s.value_heads, s.value_dim) for s in self._shapes]
        unlike = list(dict.fromkeys(kinds))  # what is of one shape lies in one buffer, so that one call copies a slot
        members = [[i for i, kind in enumerate(kinds) if kind == one] for one in unlike]
        self._homes = [(unlike.index(kind), members[unlike.index(kind)].index(i)) for i, kind in enumerate(kinds)]
        context = self.context_length | 1  # odd, so that slots do not all begin in the same few sets of a cache
        self._buffers = [
            torch.zeros((len(rows), len(self.lengths), heads, context, dim), dtype=self._dtype, device=self._device)
            for rows, (heads, dim) in zip(members, unlike, strict=True)
        ]
        tensors = [self._buffers[buffer][row] for buffer, row in self._homes]
        count = len(self._shapes)
        self._layers = [SlotLayer(k, v) for k, v in zip(tensors[:count], tensors[count:], strict=True)]
        self.model_cache = Cache(layers=self._layers)

    def release(self) -> None:
        """Gives the memory back, and with it every stored prefix."""
        self.forget()
        self._buffers, self._layers, self.model_cache = [], [], None

    def forget(self) -> None:
        """Drops every stored prefix."""
        self.epochs[self.running :] = MIXED
        self.lengths[self.running :] = 0

    def taint(self) -> None:
        """The weights changed: no slot's content is that of one version any more, and stored prefixes are of no use."""
        self.epochs[: self.running] = MIXED
        self.forget()

    def aim(self, window: Window) -> None:
        """Sets what the next forward pass reads and writes."""
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
        """The longest prefix of `tokens` in a stored slot or one of the first `running` slots; length 0: none."""
        lengths = common_prefixes(self.tokens, self.lengths, tokens)
        lengths[self.epochs != epoch] = 0
        lengths[running : self.running] = 0
        slot = int(lengths.argmax())
        return Prefix(slot, int(lengths[slot]))

    def copy(self, prefix: Prefix, to: int, start: int = 0) -> None:
        """Copies a prefix into slot `to`, which then holds it and nothing else; its first `start` tokens are there."""
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
        """Makes a slot fit for other tokens: attention reads places that it then masks, where a NaN would spread."""
        if self.spoiled[slot]:
            for buffer in self._buffers:
                buffer[:, slot].zero_()
            self.spoiled[slot] = False

    def write(self, slot: int, tokens: NDArray[np.int64], epoch: int) -> None:
        """Notes that the model has computed the slot up to the end of `tokens`, its first ones included."""
        self.tokens[slot, : len(tokens)] = tokens
        self.lengths[slot] = len(tokens)
        self.epochs[slot] = epoch

    def extend(self, rows: int, tokens_B: NDArray[np.int64]) -> None:
        """Notes that a step has added one token to each of the first `rows` slots."""
        self.tokens[self._rows[:rows], self.lengths[:rows]] = tokens_B
        self.lengths[:rows] += 1

    def store(self, slot: int) -> None:
        """Keeps a running slot's content for later requests, unless it is mixed or a stored prefix covers it already.
        A stored prefix that this one extends makes way for it."""
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
        return int(self.lengths[:running].sum())

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
