"""Load the model, and run forward passes over slots of the KV cache."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from millrace.checkpoint_names import load_config
from millrace.engines.embedded import attention
from millrace.engines.embedded.cache import LayerShape, SlotCache, Window
from millrace.engines.embedded.lora import Hooks, Lora
from millrace.errors import ConfigError

# The context of a pass is rounded up to a multiple of this, which kernels prefer. Extra positions are masked.
CONTEXT_STEP = 16


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The properties of a loaded model."""

    path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    dtype: str  # torch's name
    unusual_dtypes: Mapping[str, str] = field(default_factory=dict)  # by tensor name, for weights of another dtype


def load_model(
    path: Path, *, device: torch.device, dtype: torch.dtype, context_length: int | None
) -> tuple[PreTrainedModel, ModelInfo, list[LayerShape]]:
    """Load a causal model of transformers from a local folder, and find out what its layers cache.

    Raises ConfigError if it can't be served with these settings.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, config=load_config(path), dtype=dtype, local_files_only=True
    ).to(device)
    model.requires_grad_(False).eval()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.register())
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or context_length
    if limit is None:
        raise ConfigError(
            "the model's config sets no max_position_embeddings; set engine.context_length (--context-length)"
        )
    if context_length is not None and context_length > limit:
        raise ConfigError(f"--context-length {context_length} is above the model's limit of {limit}")
    info = ModelInfo(
        path=str(path),
        model_type=model.config.model_type,
        architectures=tuple(model.config.architectures or (type(model).__name__,)),
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        context_length=context_length or limit,
        eos_token_ids=_token_ids(
            model.generation_config.eos_token_id if model.generation_config else getattr(config, "eos_token_id", None)
        ),
        dtype=str(dtype).removeprefix("torch."),
    )
    return model, info, _layer_shapes(model, model.config, info.context_length, device)


@torch.inference_mode()
def _layer_shapes(
    model: torch.nn.Module, config: object, context_length: int, device: torch.device
) -> list[LayerShape]:
    """Run one token through the model to find the shapes: configs have too many names for these sizes."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise ConfigError(
                f"the model can't be served: it caches more than keys and values ({type(layer).__name__})"
            )
    tokens = torch.zeros((1, 1), dtype=torch.long, device=device)
    model(input_ids=tokens, use_cache=True, **{cache_argument(model): cache})
    shapes = []
    for layer in cache.layers:
        if layer.is_sliding and layer.sliding_window < context_length:
            raise ConfigError(
                f"the model has sliding-window attention; set --context-length to at most {layer.sliding_window}"
            )
        shapes.append(
            LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3])
        )
    return shapes


def cache_argument(model: torch.nn.Module) -> str:
    """Return the name of the forward pass's KV cache argument, which transformers 5.24 renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _token_ids(ids: int | list[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


class Runner:
    """Runs the model over consecutive slots. Used by the model thread only."""

    def __init__(
        self, model: torch.nn.Module, cache: SlotCache, hooks: Hooks, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._cache_argument = cache_argument(model)
        self.hooks = hooks
        self._columns = torch.arange(cache.context_length, device=device)
        self._open = torch.zeros((), dtype=dtype, device=device)
        self._closed = torch.full((), float("-inf"), dtype=dtype, device=device)

    @torch.inference_mode()
    def forward(
        self,
        tokens_BQ: NDArray[np.int64],
        positions_BQ: NDArray[np.int64],
        first_slot: int,
        real_BQ: NDArray[np.bool_] | None = None,
        loras_B: Sequence[Lora | None] = (),
    ) -> torch.Tensor:
        """Run B rows of Q tokens in the slots from `first_slot` on. Return the last column's logits [B, V], float32.

        Rows shorter than Q are padded on the left. real_BQ: False for padding; None if there is none. Padding attends
        to position 0, so that its softmax is defined, and its keys and values are not stored. loras_B: the LoRA adapter
        of each row; empty if no row has one.
        """
        return self._forward(tokens_BQ, positions_BQ, first_slot, real_BQ, loras_B, logits=1)[:, -1].float()

    @torch.inference_mode()
    def logprobs(
        self,
        tokens_Q: NDArray[np.int64],
        positions_Q: NDArray[np.int64],
        slot: int,
        next_Q: NDArray[np.int64],
        loras_B: Sequence[Lora | None] = (),
    ) -> tuple[torch.Tensor, list[float]]:
        """Run one row as `forward` does. Return its logits [1, V], and the logprob of each token's successor.

        next_Q: [Q or Q - 1], the successors. The last token may have none.
        """
        logits_QV = self._forward(tokens_Q[None], positions_Q[None], slot, None, loras_B, logits=0)[0].float()
        logprobs_QV = torch.log_softmax(logits_QV[: len(next_Q)], dim=-1)
        picked_Q = logprobs_QV.gather(1, self._to_device(next_Q)[:, None])[:, 0]
        return logits_QV[-1:].clone(), picked_Q.tolist()

    def _forward(
        self,
        tokens_BQ: NDArray[np.int64],
        positions_BQ: NDArray[np.int64],
        first_slot: int,
        real_BQ: NDArray[np.bool_] | None,
        loras_B: Sequence[Lora | None],
        *,
        logits: int,
    ) -> torch.Tensor:
        """Return the logits of the last columns, [B, logits, V], or of all columns if `logits` is 0."""
        rows, columns = tokens_BQ.shape
        longest = int(positions_BQ[:, -1].max()) + 1
        context = min(self._cache.context_length, -(-longest // CONTEXT_STEP) * CONTEXT_STEP)
        positions = self._to_device(positions_BQ)
        bias = torch.where(self._columns[:context] <= positions[..., None], self._open, self._closed)
        slots_T = np.arange(first_slot, first_slot + rows).repeat(columns)
        window = Window(first_slot, rows, context, slots_T, positions_BQ.reshape(-1), None)
        if real_BQ is not None:
            kept = np.flatnonzero(real_BQ)
            window = Window(first_slot, rows, context, slots_T[kept], window.positions_T[kept], kept)
        self._cache.aim(window)
        self.hooks.rows = loras_B
        output = self._model(
            input_ids=self._to_device(tokens_BQ),
            attention_mask=bias[:, None],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=logits,
            **{self._cache_argument: self._cache.model_cache},
        )
        logits_BQV: torch.Tensor = output.logits
        return logits_BQV

    def warm_up(self) -> None:
        """Run a padded prefill and a decode step in the empty slots.

        A model that does not work with this engine fails here, at startup, and not at the first request.
        """
        columns = np.arange(3)
        rows = min(2, self._cache.running)
        positions_BQ = np.stack([columns, np.maximum(columns - 1, 0)])[:rows]
        real_BQ = np.stack([columns >= 0, columns >= 1])[:rows]
        self.forward(np.zeros_like(positions_BQ), positions_BQ, 0, real_BQ)
        self.forward(np.zeros((rows, 1), np.int64), np.full((rows, 1), 3), 0)

    def trim(self) -> None:
        """Return torch's cached free memory to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
