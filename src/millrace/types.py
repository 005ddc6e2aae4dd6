"""The words of Millrace as values. No I/O, no torch: everything here can be made, compared and printed anywhere.

What a caller makes (requests, sampling, routing contexts, LoRA configs) takes the usual forms of its arguments, such as
arrays and NumPy's numbers, and raises ArgumentError for what is of another type.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from millrace import arguments
from millrace.errors import ArgumentError

Float32Array = NDArray[np.float32]


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # the end-of-sequence token or one of `stop_token_ids`
    LENGTH = "length"  # `max_new_tokens`, or the context is full
    ABORT = "abort"  # somebody asked for it; the tokens so far are valid


class PauseMode(StrEnum):
    """What a pause does to the requests that run."""

    ABORT = "abort"  # they end now and come back with the tokens they have
    RETRACT = "retract"  # they lose their KV cache and wait; after resume it is computed again, by the weights of then
    KEEP = "keep"  # they stay where they are, with the KV cache they have


class MemoryTag(StrEnum):
    """A part of an engine's memory that can be released and taken back."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


ALL_MEMORY = frozenset(MemoryTag)


class Health(StrEnum):
    """What an engine answers about itself. Only DEAD means that nothing takes a connection at its port."""

    READY = "ready"
    BUSY = "busy"  # it takes connections, but did not answer within the probe's deadline
    PAUSED = "paused"
    ASLEEP = "asleep"
    DEAD = "dead"
    UNKNOWN = "unknown"  # this process could not ask, for want of a file descriptor or a resolved name


class Capability(StrEnum):
    """What a running server can do, read off the server itself. Code asks the capability, never the version number."""

    VERSION_SPANS = "version_spans"  # a generation that goes on across an update says which version made which tokens
    UPDATE_SESSION = "update_session"  # weight updates happen between begin and end
    ROLLBACK = "rollback"  # an update that was begun can be dropped, the old weights go on serving
    STAGED_UPDATE = "staged_update"  # loading does not disturb generation; without it, it stops from begin to commit
    SLEEP = "sleep"
    UPDATE_FROM_DISK = "update_from_disk"
    UPDATE_FROM_PROCESS_GROUP = "update_from_process_group"
    UPDATE_FROM_BARE_NCCL = "update_from_bare_nccl"  # a group of NCCL without one of torch.distributed around it
    UPDATE_FROM_SHARED_MEMORY = "update_from_shared_memory"
    UPDATE_FROM_TORCH_STORAGE = "update_from_torch_storage"  # CPU memory shared by torch, on the engine's host
    UPDATE_FROM_CUDA_IPC = "update_from_cuda_ipc"
    CHECKSUMS = "checksums"  # per tensor, under the trainer's own names
    OWN_CHECKSUMS = "own_checksums"  # per tensor as the engine keeps it (fused, sharded), to compare engines alike
    SAMPLED_CHECKSUMS = "sampled_checksums"  # of an update's tensors, under the trainer's own names, before its commit
    FILTERED_LOGPROBS = "filtered_logprobs"  # logprobs are those after top_k, top_p and min_p
    LORA = "lora"
    IMAGES = "images"
    PAUSE_ABORT = "pause_abort"
    PAUSE_RETRACT = "pause_retract"
    PAUSE_KEEP = "pause_keep"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. The logprobs that come back are those of the temperature-scaled distribution, or with
    Capability.FILTERED_LOGPROBS of what the filters leave of it.

    temperature 0 is greedy; top_k -1 and top_p 1.0 and min_p 0.0 switch each filter off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k"):
            _become(self, name, arguments.whole(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p"):
            _become(self, name, arguments.real(name, getattr(self, name)))
        if self.seed is not None:
            _become(self, "seed", arguments.whole("seed", self.seed))
        _become(self, "stop_token_ids", arguments.token_ids("stop_token_ids", self.stop_token_ids))
        _become(self, "ignore_eos", arguments.flag("ignore_eos", self.ignore_eos))


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Token ids in. `request_id` is the caller's and unique among the requests in flight; `extra` goes to the engine
    unchanged, for what one engine can do and others can't.

    input_ids: [T] token ids, in a list, a tuple, an array or tensor of integers (also [1, T], also on a device), or a
    mapping with `input_ids` such as a BatchEncoding; kept as a tuple. Raises ArgumentError for anything else. The
    engine raises EngineRefused for ids that are not in its vocabulary.
    """

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _become(self, "request_id", arguments.text("request_id", self.request_id))
        _become(self, "input_ids", arguments.token_ids("input_ids", self.input_ids))
        if not isinstance(self.sampling, SamplingParams):
            raise ArgumentError(
                f"sampling must be SamplingParams, and is {arguments.shown(self.sampling)}; write "
                "SamplingParams(max_new_tokens=...)"
            )
        _become(self, "extra", arguments.mapping("extra", self.extra))


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What a fleet should know to choose an engine. The requests of one `session` (the turns of one episode) share what
    came before, those of one `group` their prompt. The engine serves `min_version` or a later one; with
    `exact_version`, that one."""

    session: str | None = None
    group: str | None = None
    min_version: int | None = None
    exact_version: int | None = None

    def __post_init__(self) -> None:
        for name in ("session", "group"):
            if (key := getattr(self, name)) is not None:
                _become(self, name, arguments.text(name, key))
        for name in ("min_version", "exact_version"):
            if (version := getattr(self, name)) is not None:
                _become(self, name, arguments.whole(name, version))

    def admits(self, version: int | None) -> bool:
        if version is None:
            return False
        if self.exact_version is not None and version != self.exact_version:
            return False
        return self.min_version is None or version >= self.min_version

    def describe(self) -> str:
        """Which versions may answer, as the end of a sentence about engines; nothing where any may."""
        if self.exact_version is not None:
            return f" at version {self.exact_version}"
        return f" at version {self.min_version} or later" if self.min_version is not None else ""


ANYWHERE = RoutingContext()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """The tokens `start:end` of a generation (of a sample, where positions count from its first token) were made by the
    weights of `version`. None: by weights that no Millrace trainer published."""

    version: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Token ids out, all from one call.

    output_ids: [T] token ids. logprobs: [T] float32, natural logarithm. version_spans cover 0:T in order,
    without a gap.
    """

    request_id: str
    output_ids: tuple[int, ...]
    logprobs: Float32Array
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    prompt_tokens: int
    cached_tokens: int
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How much an engine has to do. Tokens count prompt and output."""

    running_requests: int
    waiting_requests: int
    used_tokens: int
    max_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a running server says of itself."""

    kind: str
    engine_version: str
    model_path: str
    weight_version: int | None
    vocab_size: int
    context_length: int  # prompt and output together, in tokens
    capabilities: frozenset[Capability]
    ranks: int = 1  # processes that hold weights (TP x PP x DP); each opens a share of its own of what is handed over
    dtype: str | None = None  # that it computes in, as in `bfloat16`; None where it does not say
    # Of the weights that it holds in another dtype than that; None where it does not say
    unusual_dtypes: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor and where it lies in its bucket. dtype is torch's name without the module, as in `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket
    nbytes: int


@dataclass(frozen=True, slots=True)
class SharedMemoryBucket:
    """Tensors side by side in a memory file that the engine's host can open under `path`."""

    path: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class TorchStorageBucket:
    """Tensors side by side in CPU memory that torch shares by name (its sharing strategy `file_system`): what
    `UntypedStorage._share_filename_cpu_` returns."""

    manager: bytes
    handle: bytes
    nbytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class CudaIpcShare:
    """One opening of a GPU's memory by another process: what `UntypedStorage._share_cuda_` returns. Torch counts the
    openings, so each share is for one process and for one use."""

    device: str  # the GPU's UUID: an index means another GPU where CUDA_VISIBLE_DEVICES differs
    handle: bytes
    storage_bytes: int
    storage_offset: int  # bytes from the start of the allocation
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


@dataclass(frozen=True, slots=True)
class CudaIpcBucket:
    """Tensors side by side in a GPU's memory; one share for each of the engine's ranks."""

    shares: tuple[CudaIpcShare, ...]
    nbytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What a LoRA adapter adds to a linear layer W of `target_modules` (names, or their ends, as PEFT means it):
    (alpha / rank) B A, where A is [rank, in] and B is [out, rank]."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        _become(self, "rank", arguments.whole("rank", self.rank))
        _become(self, "alpha", arguments.real("alpha", self.alpha))
        _become(self, "target_modules", arguments.texts("target_modules", self.target_modules))


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """A group of torch.distributed in which a sender, rank 0, broadcasts weights. The engine's own ranks start at
    `rank_offset`."""

    name: str
    backend: str  # gloo or nccl
    address: str
    port: int
    rank_offset: int
    world_size: int


@dataclass(frozen=True, slots=True)
class ProcessGroupBucket:
    """Tensors that the sender broadcasts, in this order, from rank 0 of the group that the engine has joined."""

    group_name: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class DiskBucket:
    """A folder of safetensors files on a path that the engine's host can read."""

    path: str


Bucket = SharedMemoryBucket | TorchStorageBucket | CudaIpcBucket | ProcessGroupBucket | DiskBucket


def _become(value: object, name: str, plain: object) -> None:
    """Sets a field of a frozen value while it is made."""
    object.__setattr__(value, name, plain)
