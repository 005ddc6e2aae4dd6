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
    slots_T: torch.Tensor
    positions_T: torch.Tensor
    sources_T: torch.Tensor | None


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers comes without types
    """One layer's face of the slots, as the model's attention sees it: `update` writes the step's keys and values to
    their places and returns everything that the rows of the step may look at."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys_SHCD: torch.Tensor, values_SHCD: torch.Tensor) -> None:
        super().__init__()
        self.keys_SHCD, self.values_SHCD = keys_SHCD, values_SHCD
        self.is_initialized = True

    def aim(self, window: Window) -> None:
        """Sets what the next `update` writes and returns."""
        rows = slice(window.first, window.first + window.rows)
        self._window = window
        self._keys = self.keys_SHCD[rows, :, : window.context]
        self._values = self.values_SHCD[rows, :, : window.context]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states: [rows, heads, query, dim]. Returns both as [rows, heads, context, dim]."""
        window = self._window
        for states, slots_SHCD in ((key_states, self.keys_SHCD), (value_states, self.values_SHCD)):
            tokens_THD = states.transpose(1, 2).flatten(0, 1)
            if window.sources_T is not None:
                tokens_THD = tokens_THD[window.sources_T]
            slots_SHCD[window.slots_T, :, window.positions_T] = tokens_THD
        return self._keys, self._values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy here: the slots exist before the first token."""

    def get_seq_length(self) -> int:
        return self._keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002  # transformers passes it by name
        return self._keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys_SHCD.shape[2]


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
        self._used = np.zeros(slots, np.int64)
        self._clock = 0
        self._buffers: list[torch.Tensor] = []
        self._layers: list[SlotLayer] = []
        self.model_cache: Cache | None = None
        self.allocate()

    def allocate(self) -> None:
        """Takes the memory. Zeroed, because attention reads places that it then masks, and a NaN there would spread."""
        self._buffers = []
        slots = len(self.lengths)
        context = self.context_length | 1  # odd, so that slots do not all begin in the same few sets of a cache
        kinds = [(s.key_heads, s.key_dim) for s in self._shapes] + [(s.value_heads, s.value_dim) for s in self._shapes]
        places: list[torch.Tensor | None] = [None] * len(kinds)
        for kind in dict.fromkeys(kinds):  # layers of one shape lie in one tensor, so that a slot is copied by one call
            members = [i for i, other in enumerate(kinds) if other == kind]
            heads, dim = kind
            shape = (len(members), slots, heads, context, dim)
            buffer = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._buffers.append(buffer)
            for i, tensor in zip(members, buffer.unbind(0), strict=True):
                places[i] = tensor
        tensors = [tensor for tensor in places if tensor is not None]
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
        for layer in self._layers:
            layer.aim(window)

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
        if slot != to and start < end:
            for buffer in self._buffers:
                buffer[:, to, :, start:end] = buffer[:, slot, :, start:end]
            self.tokens[to, start:end] = self.tokens[slot, start:end]
        self.lengths[to] = end
        self.epochs[to] = self.epochs[slot]
        self._touch(slot)
        self._touch(to)

    def write(self, slot: int, tokens: NDArray[np.int64], epoch: int) -> None:
        """Notes that the model has computed the slot up to the end of `tokens`, its first ones included."""
        self.tokens[slot, : len(tokens)] = tokens
        self.lengths[slot] = len(tokens)
        self.epochs[slot] = epoch

    def extend(self, rows: int, tokens_B: NDArray[np.int64]) -> None:
        """Notes that a step has added one token to each of the first `rows` slots."""
        self.tokens[np.arange(rows), self.lengths[:rows]] = tokens_B
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
