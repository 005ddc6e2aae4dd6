"""The value types that the rest of Millrace shares. This module does no I/O and does not import torch.

The types that callers construct (GenerateRequest, SamplingParams, RoutingContext, LoraConfig) accept the usual forms of
their arguments, such as arrays and NumPy numbers. They raise ArgumentError for arguments of other types.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from millrace import arguments
from millrace.errors import ArgumentError
from millrace.quantisation import Quantisation

Float32Array = NDArray[np.float32]
ExpertArray = NDArray[np.unsignedinteger]
# Arguments that may be None.
OPTIONAL = frozenset({"json_schema", "seed", "session", "group", "min_version", "exact_version"})


def _convert(instance: object, how: Callable[[str, Any], object], *names: str) -> None:
    """Convert fields of a frozen dataclass in its `__post_init__`."""
    for name in names:
        value = getattr(instance, name)
        if value is not None or name not in OPTIONAL:
            object.__setattr__(instance, name, how(name, value))


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # the end-of-sequence token, one of `stop_token_ids`, or one of the texts in `stop`
    LENGTH = "length"  # `max_new_tokens`, or the context is full
    ABORT = "abort"  # a client aborted the request, or an engine gave it up; the tokens so far are valid


class PauseMode(StrEnum):
    """What a pause does to the running requests."""

    ABORT = "abort"  # they end at once and return the tokens generated so far
    RETRACT = "retract"  # they lose their KV cache and wait; after the resume the current weights compute it again
    KEEP = "keep"  # they wait and keep their KV cache


class MemoryTag(StrEnum):
    """A part of an engine's memory that a sleeping engine releases."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


ALL_MEMORY = frozenset(MemoryTag)


class Health(StrEnum):
    """The result of a health probe."""

    READY = "ready"
    BUSY = "busy"  # the port accepts connections, but the engine did not answer within the probe's deadline
    PAUSED = "paused"
    ASLEEP = "asleep"
    DEAD = "dead"  # the port accepts no connections, or the server answered with an error
    UNKNOWN = "unknown"  # this process could not send the probe: no file descriptor, or the host did not resolve


class Capability(StrEnum):
    """A feature of a running server, as the server reports it. Check capabilities instead of version numbers."""

    VERSION_SPANS = "version_spans"  # a generation that spans an update reports which version made which tokens
    UPDATE_SESSION = "update_session"  # a weight update has a begin and an end
    ROLLBACK = "rollback"  # an update can be dropped after its begin, and the old weights keep serving
    STAGED_UPDATE = "staged_update"  # generation continues during loading; otherwise it stops from begin to commit
    SLEEP = "sleep"
    KV_OFFLOAD = "kv_offload"  # KV cache that leaves the device is kept in host memory; a flush drops it there too
    UPDATE_FROM_DISK = "update_from_disk"
    UPDATE_FROM_PROCESS_GROUP = "update_from_process_group"  # it receives one tensor after the other
    WHOLE_BROADCASTS = (
        "whole_broadcasts"  # in a group, it receives the bytes of a bucket at once, and ahead of the load
    )
    UPDATE_FROM_BARE_NCCL = "update_from_bare_nccl"  # an NCCL communicator without a torch.distributed group
    UPDATE_FROM_SHARED_MEMORY = "update_from_shared_memory"
    UPDATE_FROM_TORCH_STORAGE = "update_from_torch_storage"  # CPU memory shared by torch, on the engine's host
    UPDATE_FROM_CUDA_IPC = "update_from_cuda_ipc"
    UPDATE_FROM_PARTS = "update_from_parts"  # by memory of one of these kinds, for each rank the parts that it needs
    SENT_PARTS = "sent_parts"  # in a group, several ranks send each of its ranks the parts that it needs
    UPDATE_FROM_PEER = "update_from_peer"  # from another engine that offers its weights; it also offers its own
    CHECKSUMS = "checksums"  # per tensor, under the trainer's names
    OWN_CHECKSUMS = "own_checksums"  # per tensor as the engine stores it (fused, sharded), to compare equal engines
    SAMPLED_CHECKSUMS = "sampled_checksums"  # of an update's tensors, under the trainer's names, before its commit
    AUDIT = "audit"  # it can say what its layers hold, and how far that is from samples of the trainer's weights
    FILTERED_LOGPROBS = "filtered_logprobs"  # logprobs are those after top_k, top_p and min_p were applied
    PENALTIES = "penalties"  # repetition_penalty, frequency_penalty and presence_penalty; otherwise they are refused
    STOP_TEXTS = "stop_texts"  # the server has a tokenizer, which `SamplingParams.stop` needs
    JSON_SCHEMA = "json_schema"  # the output can be made to match `SamplingParams.json_schema`
    PROMPT_PENALTY = "prompt_penalty"  # repetition_penalty also counts the tokens of the prompt
    LORA = "lora"
    IMAGES = "images"
    ROUTED_EXPERTS = "routed_experts"  # a generation has the experts that each token was routed to
    PAUSE_ABORT = "pause_abort"
    PAUSE_RETRACT = "pause_retract"
    PAUSE_KEEP = "pause_keep"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an engine samples tokens.

    The returned logprobs are those of the distribution that is sampled from: after bias, penalties and temperature (0
    counts as 1). They are those before top_k, top_p and min_p, or after them with Capability.FILTERED_LOGPROBS.

    max_new_tokens: the limit on output tokens. temperature: 0 means greedy. top_p: 1.0 switches the filter off, as do
    top_k -1 and min_p 0.0. seed: None lets the engine draw one. stop_token_ids: tokens that end the generation, besides
    the model's own end-of-sequence token. ignore_eos: continue after the end-of-sequence token.

    stop: texts that end the generation. min_new_tokens: no end-of-sequence or stop token is sampled before.
    repetition_penalty, frequency_penalty, presence_penalty: make tokens less likely that have occurred. logit_bias: is
    added to the logits of these tokens. json_schema: a JSON schema that the output matches, as a mapping or
    text; stored as text. docs/generating.md has definitions, ranges, and what each engine supports.

    >>> SamplingParams(max_new_tokens=256, temperature=0.7, seed=1)
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    json_schema: str | None = None

    def __post_init__(self) -> None:
        _convert(self, arguments.whole, "max_new_tokens", "top_k", "seed", "min_new_tokens")
        _convert(self, arguments.real, "temperature", "top_p", "min_p")
        _convert(self, arguments.real, "repetition_penalty", "frequency_penalty", "presence_penalty")
        _convert(self, arguments.token_ids, "stop_token_ids")
        _convert(self, arguments.flag, "ignore_eos")
        _convert(self, arguments.texts, "stop")
        _convert(self, arguments.biases, "logit_bias")
        _convert(self, arguments.json_schema, "json_schema")

    @property
    def penalizes(self) -> bool:
        """Whether a token's earlier occurrences change its probability."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to continue a prompt, given as token ids.

    input_ids: [T] token ids, as a list, a tuple, or an array or tensor of integers (also [1, T], also on a GPU), or a
    mapping with `input_ids` such as a BatchEncoding. They are stored as a tuple. sampling: how to sample. request_id:
    unique among the requests in flight, random by default. prompt_logprobs: return the prompt's logprobs, too.
    continued_tokens: how many of the last `input_ids` are output of an earlier call; for penalties and stop texts, they
    count as output. images: one PIL image, path, or content of an image file for each image in the prompt, in order;
    stored as the contents of image files. In `input_ids`, each image is one placeholder token, or the run of
    placeholders that an engine made of it. routed_experts_start: the first position of `Generation.routed_experts`; at
    most the prompt's length. Without the capability it has no effect. extra: options for one kind of engine, sent to
    the engine unchanged.

    >>> GenerateRequest(tokenizer(prompt)["input_ids"], SamplingParams(max_new_tokens=256))
    """

    input_ids: tuple[int, ...]
    sampling: SamplingParams
    _: KW_ONLY
    request_id: str = field(default_factory=lambda: uuid4().hex)
    prompt_logprobs: bool = False
    continued_tokens: int = 0
    images: tuple[bytes, ...] = field(default=(), repr=False)
    routed_experts_start: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _convert(self, arguments.token_ids, "input_ids")
        if not isinstance(self.sampling, SamplingParams):
            raise ArgumentError(
                f"sampling must be SamplingParams, and is {arguments.shown(self.sampling)}; write "
                "SamplingParams(max_new_tokens=...)"
            )
        _convert(self, arguments.text, "request_id")
        _convert(self, arguments.flag, "prompt_logprobs")
        _convert(self, arguments.count, "continued_tokens", "routed_experts_start")
        _convert(self, arguments.images, "images")
        _convert(self, arguments.mapping, "extra")


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """Hints and conditions for the choice of an engine.

    session: the requests of one session (the turns of one episode) share a growing prefix. group: the requests of one
    group share a prompt. min_version: only engines that serve this weight version or a later one may answer.
    exact_version: only engines that serve this weight version may answer.
    """

    session: str | None = None
    group: str | None = None
    min_version: int | None = None
    exact_version: int | None = None

    def __post_init__(self) -> None:
        _convert(self, arguments.text, "session", "group")
        _convert(self, arguments.whole, "min_version", "exact_version")

    def admits(self, version: int | None) -> bool:
        """Return whether an engine that serves `version` may answer."""
        if version is None:
            return False
        if self.exact_version is not None and version != self.exact_version:
            return False
        return self.min_version is None or version >= self.min_version

    def describe(self) -> str:
        """Return the accepted versions as the end of a sentence about engines; empty if all are accepted."""
        if self.exact_version is not None:
            return f" at version {self.exact_version}"
        return f" at version {self.min_version} or later" if self.min_version is not None else ""


ANYWHERE = RoutingContext()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """The weight version that generated the tokens `start:end`.

    Positions count from the first output token of a Generation, or from the first token of an Episode. `version` is
    None for weights that no Millrace trainer published.
    """

    version: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one GenerateRequest.

    output_ids: [T] token ids, without the prompt. logprobs: [T] float32, the natural logarithm of each token's
    probability. version_spans: which weight versions made the tokens; they cover 0:T in order, without a gap.
    prompt_tokens: the length of the prompt. cached_tokens: how many of these were in the engine's prefix cache. extra:
    fields of the engine's answer that Millrace does not use.

    text: of the output and the request's continued tokens, without the stop text or stop token that ended it; None
    unless the request has stop texts. prompt_logprobs: [P] float32 if requested, by the model's own distribution
    (temperature 1, without penalties and bias); the first is NaN. A stream has both in its last item only.
    penalty_restarts: positions in the output from which on penalties no longer count the tokens before.
    prompt_ids: the prompt as the engine read it, with a run of placeholder tokens for each image; None if the request
    has no images, or was aborted before the engine read it. queue_seconds: how long the request waited for an engine of
    the fleet with room for it; 0 if an external router chose the engine.

    routed_experts: [N, L, K] uint8, or uint16 for models of more than 256 experts: the K experts that each token was
    routed to in each of the L layers that have experts. Row i is of the token at position `routed_experts_start + i` of
    the prompt and the output, up to the output's last token but one, because no layer has read the last. A token that
    several calls read has the experts of the first. A row takes L x K x itemsize bytes. None unless the engine has
    Capability.ROUTED_EXPERTS, and before the last item of a stream.

    >>> generation = await fleet.generate(request, deadline=60)
    >>> tokenizer.decode(generation.output_ids), generation.logprobs.mean()
    """

    request_id: str
    output_ids: tuple[int, ...]
    logprobs: Float32Array
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    prompt_tokens: int
    cached_tokens: int
    extra: Mapping[str, object] = field(default_factory=dict)
    text: str | None = None
    prompt_logprobs: Float32Array | None = None
    penalty_restarts: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    routed_experts: ExpertArray | None = None
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of one engine.

    used_tokens, max_tokens: tokens in the KV cache (prompt and output), and how many fit. tokens_per_second: output
    tokens, as the engine reports it.
    """

    running_requests: int
    waiting_requests: int
    used_tokens: int
    max_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a running server reports about itself."""

    kind: str
    engine_version: str
    model_path: str
    weight_version: int | None
    vocab_size: int
    context_length: int  # prompt and output together, in tokens
    capabilities: frozenset[Capability]
    ranks: int = 1  # processes that hold weights (TP x PP x DP); each needs its own share of CUDA IPC memory
    dtype: str | None = None  # torch's name of the compute dtype, as in `bfloat16`; None if it is not reported
    unusual_dtypes: Mapping[str, str] | None = None  # of weights that differ from `dtype`; None if not reported
    max_running: int | None = None  # requests that run at once; None if it is not reported
    cache_tokens: int | None = None  # tokens that fit into its KV cache; None if it is not reported
    quantisation: Quantisation | None = None  # how its layers should be quantised; None if nothing asks for it
    gpus: tuple[str, ...] = ()  # of each rank, in their order, as in the host's CUDA_VISIBLE_DEVICES; empty: unknown


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The shape of a LoRA adapter.

    To the weight [out, in] of each target layer it adds (alpha / rank) B A, with A [rank, in] and B [out, rank].
    target_modules: names of linear layers, or the ends of these names, as in PEFT.

    >>> LoraConfig(rank=16, alpha=32.0, target_modules=("q_proj", "v_proj"))
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        _convert(self, arguments.whole, "rank")
        _convert(self, arguments.real, "alpha")
        _convert(self, arguments.texts, "target_modules")
