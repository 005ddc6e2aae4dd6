"""The policy: a language model that computes logprobs and returns its weights for publishing. It may read images."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from millrace.checkpoint_names import load_config
from millrace.config.models import TrainConfig
from millrace.errors import DataError
from millrace.rollout.vision import Vision, load_vision
from millrace.train.batch import TrainSample, supervised_sample
from millrace.train.replay import RoutingReplay
from millrace.train.world import World
from millrace.weights.sharded import ShardedTensors

CHUNK_BYTES = 256 * 1024 * 1024  # of float32 logits at a time; a vocabulary of 152,000 gives 440 tokens a chunk


class TokenLogprobs(NamedTuple):
    """Logprobs and entropies of given tokens.

    logprobs_BT: [B, T] float32, of each token given those before it. entropy_BT: [B, T] float32, in nats, of the
    distribution that each token was drawn from, without gradient. Column 0, which has no prediction, is 0.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor


class _GatherLogprobs(torch.autograd.Function):
    """log_softmax(logits / temperature) at the targets, and the entropy, in float32, chunk by chunk.

    torch's log_softmax keeps float32 copies of all logits, which are the largest tensors of a training step. This one
    keeps only the logits as the model returned them, and computes the softmax again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs, normalizers, entropies = [], [], []
        for logits_CV, targets_C in zip(torch.split(logits_NV, rows), torch.split(targets_N, rows), strict=True):
            scaled_CV = logits_CV.float() / temperature
            normalizer_C = scaled_CV.logsumexp(dim=-1)
            logprobs.append(scaled_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1) - normalizer_C)
            entropies.append(torch.special.entr(torch.exp(scaled_CV - normalizer_C.unsqueeze(-1))).sum(dim=-1))
            normalizers.append(normalizer_C)
        entropy_N = torch.cat(entropies)
        ctx.save_for_backward(logits_NV, targets_N, torch.cat(normalizers))
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, targets_N, normalizers_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        scaled_grad_N = grads[0] / ctx.temperature
        for start in range(0, logits_NV.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            grad_C1 = scaled_grad_N[chunk].unsqueeze(-1)
            probs_CV = torch.exp(logits_NV[chunk].float() / ctx.temperature - normalizers_N[chunk].unsqueeze(-1))
            grad_CV = probs_CV.mul_(-grad_C1).scatter_add_(-1, targets_N[chunk].unsqueeze(-1), grad_C1)
            grad_NV[chunk] = grad_CV
        return grad_NV, None, None, None


def gather_logprobs(
    logits_BTV: Tensor, token_ids_BT: Tensor, temperature: float, *, chunk_bytes: int = CHUNK_BYTES
) -> TokenLogprobs:
    """Return the logprobs of `token_ids_BT` under `logits_BTV / temperature`.

    logits_BTV: [B, T, V], of any floating-point dtype. token_ids_BT: [B, T] int64. temperature: above 0. chunk_bytes:
    how much memory the float32 logits of one chunk may take.
    """
    batch, length, vocab = logits_BTV.shape
    rows = max(1, chunk_bytes // (4 * vocab))
    # The targets are rolled because flattening `logits[:, :-1]` would copy it. The wrapped column is dropped below.
    targets_N = token_ids_BT.roll(-1, dims=1).reshape(-1)
    logprobs_N, entropy_N = _GatherLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_BTV.reshape(-1, vocab), targets_N, temperature, rows
    )
    return TokenLogprobs(
        nn.functional.pad(logprobs_N.view(batch, length)[:, :-1], (1, 0)),
        nn.functional.pad(entropy_N.view(batch, length)[:, :-1], (1, 0)),
    )


class Policy:
    """A causal model with float32 master weights, sharded over the ranks of the world.

    Dropout is off, because the engines sample without it, and the logprobs of a step must match theirs. Every method is
    collective: all ranks call it in the same order. vision: how the model reads images, or why it reads none.
    """

    def __init__(self, model: PreTrainedModel, world: World, config: TrainConfig, vision: Vision | str) -> None:
        self.world = world
        self.vision = vision
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.model = _place(model, world, self.dtype)
        self._replay = RoutingReplay(self.model)
        self.reference: PreTrainedModel | None = None
        if config.gradient_checkpointing:
            # transformers 5.24 renamed the method.
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            enable = getattr(model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
            # Layers checkpoint in training mode only. The mode is set on the layer itself, so its dropout stays off.
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters by transformers' names; tied ones once."""
        return dict(self.model.named_parameters())

    def require_places(self, sample: TrainSample) -> None:
        """Raise DataError unless a sample has a run of placeholders, of the right length, for each of its images."""
        if sample.images or not isinstance(self.vision, str):
            self._sight().require_runs(sample.token_ids.tolist(), sample.images)

    def _sight(self) -> Vision:
        if isinstance(self.vision, str):
            raise DataError(f"the model reads no images: {self.vision}")
        return self.vision

    def blank_sample(self) -> TrainSample | None:
        """Return a sample with a small image and without trained tokens; None if it is never needed.

        With several ranks, all of them must gather the weights of the vision tower in every forward pass.
        """
        if self.world.size == 1 or isinstance(self.vision, str):
            return None
        image, tokens = self.vision.blank()
        return supervised_sample([self.vision.placeholder] * tokens, [False] * tokens, [image])

    def token_logprobs(
        self,
        token_ids_BT: Tensor,
        temperature: float,
        images: Sequence[bytes] = (),
        experts_BTLK: Tensor | None = None,
    ) -> TokenLogprobs:
        """Return the policy's logprobs and entropies. They have a gradient unless the caller has disabled it.

        token_ids_BT: [B, T] int64, on the world's device. images: the contents of image files, in the order of their
        runs of placeholders in `token_ids_BT`. Raises DataError if there are some and the model reads none.
        experts_BTLK: the experts to route the tokens to, as in `RoutingReplay.replaying`, which raises DataError.
        """
        with self._replay.replaying(experts_BTLK):
            return self._forward(self.model, token_ids_BT, temperature, images)

    @torch.no_grad()
    def reference_logprobs(self, token_ids_BT: Tensor, temperature: float, images: Sequence[bytes] = ()) -> Tensor:
        """Return the frozen reference's logprobs: [B, T] float32, without gradient. Its routers choose by themselves.

        Raises ValueError if there is no reference.
        """
        if self.reference is None:
            raise ValueError("the policy has no reference; call take_reference first")
        return self._forward(self.reference, token_ids_BT, temperature, images).logprobs_BT

    def _forward(
        self, model: PreTrainedModel, token_ids_BT: Tensor, temperature: float, images: Sequence[bytes]
    ) -> TokenLogprobs:
        self.world.make_current()
        inputs = self._image_inputs(token_ids_BT, images) if images else {}
        with self._precision():
            logits_BTV = model(input_ids=token_ids_BT, use_cache=False, **inputs).logits
        return gather_logprobs(logits_BTV, token_ids_BT, temperature)

    def _image_inputs(self, token_ids_BT: Tensor, images: Sequence[bytes]) -> dict[str, Tensor]:
        """Return the model's inputs for images. From the kinds of tokens (1: image) it computes their positions."""
        vision = self._sight()
        inputs = {name: tensor.to(token_ids_BT.device) for name, tensor in vision.inputs(images).items()}
        return {**inputs, "mm_token_type_ids": (token_ids_BT == vision.placeholder).int()}

    def _precision(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32 or self.world.size > 1:  # FSDP has its own mixed precision
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the weights by transformers' names; tied ones once.

        The tensors are the weights themselves, without gradient, and sharded if the policy is. Writing to them changes
        the policy.
        """
        return _state(self.model)

    def named_tensors(self) -> ShardedTensors:
        """Return an iterable of the weights, whole, in float32, on the world's device.

        If the policy is sharded, each tensor is gathered when the iteration reaches it, so every rank must iterate over
        all of them. Otherwise the tensors are the weights themselves, which the next step changes.
        """
        return ShardedTensors(self.state())

    def take_reference(self) -> None:
        """Make a frozen copy of the current weights the reference of the KL term."""
        if self.reference is None:
            model = type(self.model)._from_config(self.model.config, dtype=torch.float32)
            self.reference = _place(model, self.world, self.dtype).requires_grad_(False)
        with torch.no_grad():
            present = self.state()
            for name, tensor in _state(self.reference).items():
                tensor.copy_(present[name])

    def reference_state(self) -> dict[str, Tensor]:
        """Return the weights of the reference, as `state` does; empty if there is none."""
        return _state(self.reference) if self.reference is not None else {}


def load_policy(path: str | Path, config: TrainConfig, world: World) -> Policy:
    """Load a policy from a folder in Hugging Face's format or a Hub name.

    A model whose architecture reads images is loaded with its vision tower. Raises DataError if there is no causal
    language model, or it is damaged.
    """
    try:
        described = load_config(path)
        sees = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(described.model_type) in (described.architectures or ())
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(path, config=described, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"no causal language model can be loaded from {str(path)!r}: {error}") from error
    return Policy(model, world, config, load_vision(str(path)))


def _place(model: PreTrainedModel, world: World, dtype: torch.dtype) -> PreTrainedModel:
    """Move the model to the world's device, switch dropout off, and shard it by FSDP2 if there are several ranks.

    Each decoder layer is one unit, and the rest (embedding, last norm, head) another. Every unit is sharded again after
    its forward pass, so outside of a pass the parameters are always the shards.
    """
    world.make_current()
    model.eval()
    if world.size == 1:
        return model.to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = (
        MixedPrecisionPolicy()
        if dtype == torch.float32
        else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )
    layer_names = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in layer_names]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    return model


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    persistent = model.state_dict().keys()
    tensors.update((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    return tensors
