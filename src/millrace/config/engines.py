"""The settings of the engines, as pydantic models (`engine` and `judges.engine` of a run)."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from millrace.config.base import Flag, ForeignArgument, Model
from millrace.config.paths import LocalPath

EngineArgument = ForeignArgument
# Settings that say where engines are, which another launcher than `local` finds out itself.
OF_THIS_HOST = (
    "host", "ports", "urls", "node_rank", "dist_init_addr", "data_parallel_rpc_port", "base_gpu_id",
    "cuda_visible_devices", "kv_events",
)  # fmt: skip
# Settings that give each of the engines its own place, so that none is left for one more.
OF_FIXED_ENGINES = ("ports", "urls", "base_gpu_id", "node_rank", "dist_init_addr", "data_parallel_rpc_port")


class ReplicaRange(Model):
    """The bounds between which a fleet chooses its number of servers by its load (docs/clusters.md)."""

    min: NonNegativeInt = 1
    """Smallest number of servers. 0 ends all of them while nothing is asked."""
    max: PositiveInt
    """Largest number of servers."""
    idle_seconds: PositiveFloat = 300.0
    """Seconds for which fewer servers must have been enough before one is ended. The stabilisation window of
    Kubernetes' autoscaler."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; set max to {self.min} or more")
        return self


def _launcher(name: str) -> str:
    """Return the name of a launcher, if it is a known one, or may be an import path."""
    if name not in ("local", "ray", "slurm") and re.fullmatch(r"[\w.]+:\w+", name) is None:
        raise ValueError("it must be local, ray or slurm, or module:attribute for a launcher of your own")
    return name


# A part of an error's location in angle brackets is no setting (config/explain.py).
Replicas = Annotated[
    Annotated[PositiveInt, Tag("<number>")] | Annotated[ReplicaRange, Tag("<range>")],
    Discriminator(lambda given: "<range>" if isinstance(given, Mapping | ReplicaRange) else "<number>"),
]


class ReplicatedConfig(Model):
    """The settings that all kinds of engines share."""

    replicas: Replicas = 1
    """Number of servers, each with the whole model. `{min: 1, max: 4}` lets the fleet choose it by its load."""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Flag("sglang", "--dtype"), Flag("vllm", "--dtype")
    ] = "auto"
    """Dtype of the engine's weights and computation. `auto` uses the dtype of the model's folder, except that SGLang
    and vLLM on a GPU serve a float32 folder in bfloat16."""
    max_running_requests: Annotated[
        PositiveInt, Flag("sglang", "--max-running-requests"), Flag("vllm", "--max-num-seqs")
    ] = 64
    """Requests that one server runs at the same time. Further requests wait in its queue."""
    threads: PositiveInt | None = None
    """Number of CPU threads that torch uses. None keeps torch's default."""
    host: Annotated[str, Flag("sglang", "--host", passed=False), Flag("vllm", "--host", passed=False)] = "127.0.0.1"
    """Address that the servers listen on."""
    ports: Annotated[
        tuple[PositiveInt, ...] | None, Flag("sglang", "--port", passed=False), Flag("vllm", "--port", passed=False)
    ] = None
    """One port for each replica. None picks free ports."""
    urls: tuple[str, ...] | None = None
    """Running servers to attach to, one for each replica. Their keys come from MILLRACE_ENGINE_API_KEY and
    MILLRACE_ENGINE_ADMIN_API_KEY."""
    launch: Annotated[str, AfterValidator(_launcher)] = "local"
    """What starts the servers (docs/clusters.md): `local` starts them on this host, `ray` on a Ray cluster, and
    `slurm` as steps of a Slurm job. `module:attribute` is a launcher of your own."""
    cluster: Annotated[str, Field(coerce_numbers_to_str=True)] | None = None
    """The cluster, for a launcher that has one. Ray's is the host:port of its head node; None uses RAY_ADDRESS, or a
    cluster that runs on this host, or starts Ray on this host. Slurm's is the id of a running job; None is the job that
    this process runs in."""
    start_timeout: PositiveFloat = 60.0
    """Seconds until a server must be healthy. On a cluster it also has so many seconds to get its place."""

    @model_validator(mode="after")
    def _check_launch(self) -> Self:
        if self.launch == "local":
            if self.cluster is not None:
                raise ValueError("cluster is for a launcher that has one, and launch is local; set launch")
            return self
        for name in OF_THIS_HOST:
            if name in type(self).model_fields and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for launch: local, and launch is {self.launch}; leave {name} out")
        return self

    @property
    def scale(self) -> ReplicaRange | None:
        """The bounds of the number of servers; None if it is fixed."""
        return self.replicas if isinstance(self.replicas, ReplicaRange) else None

    @property
    def first_replicas(self) -> int:
        """The number of servers that are started at first. The first one shows what the others will be."""
        return max(self.replicas.min, 1) if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def most_replicas(self) -> int:
        """The largest number of servers."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        for name in OF_FIXED_ENGINES if self.scale is not None else ():
            if name in type(self).model_fields and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"replicas is a range, and {name} is for a fixed number of engines; leave {name} out, or set "
                    "replicas to a number"
                )
        return self

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        if self.urls is not None and len(self.urls) != self.replicas:
            raise ValueError(
                f"urls names {len(self.urls)} servers for {self.replicas} replicas; set replicas to {len(self.urls)}"
            )
        if self.ports is not None and len(self.ports) != self.replicas:
            raise ValueError(
                f"ports names {len(self.ports)} ports for {self.replicas} replicas; give each a port, or leave it out"
            )
        return self


class EmbeddedEngineConfig(ReplicatedConfig):
    """Millrace's own engine. It serves any causal language model of transformers, on the CPU or one GPU."""

    kind: Literal["embedded"]
    """Millrace's own engine."""
    device: str = "cpu"
    """The torch device: `cpu`, `cuda` or `cuda:N`."""
    cached_prefixes: Annotated[int, Field(ge=0)] = 64
    """Number of prompt prefixes that the KV cache keeps. 0 turns the prefix cache off."""
    context_length: PositiveInt | None = None
    """Longest sequence, in tokens of prompt and output. None uses the model's context length."""
    faults: bool = False
    """For tests: the engine crashes, hangs or refuses requests on demand."""


class PrefillDecodeConfig(Model):
    """The servers of one replica that computes prompts and generates on different servers."""

    prefill: PositiveInt = 1
    """Servers that compute prompts."""
    decode: PositiveInt = 1
    """Servers that generate."""


class StockEngineConfig(ReplicatedConfig):
    """The settings that SGLang and vLLM share.

    Millrace starts a stock engine from the environment that `millrace engines install` made, or with the interpreter
    `python`. With `urls` it attaches to running servers instead.
    """

    version: str
    """Version of the engine. It selects the environment that `millrace engines install` made."""
    device: Annotated[Literal["cuda", "cpu"], Flag("sglang", "--device")] = "cuda"
    """Device that the engine runs on."""
    python: LocalPath | None = None
    """A Python interpreter with the engine installed. None uses the environment that `millrace engines install`
    made."""
    tp_size: Annotated[
        PositiveInt,
        Flag("sglang", "--tp-size", "--tensor-parallel-size"),
        Flag("vllm", "--tensor-parallel-size", "--tp"),
    ] = 1
    """Number of tensor-parallel ranks."""
    pp_size: Annotated[
        PositiveInt,
        Flag("sglang", "--pp-size", "--pipeline-parallel-size"),
        Flag("vllm", "--pipeline-parallel-size", "--pp"),
    ] = 1
    """Number of pipeline-parallel stages."""
    dp_size: Annotated[
        PositiveInt, Flag("sglang", "--dp-size", "--data-parallel-size"), Flag("vllm", "--data-parallel-size", "--dp")
    ] = 1
    """Number of data-parallel ranks."""
    ep_size: Annotated[
        PositiveInt,
        Flag("sglang", "--ep-size", "--ep", "--expert-parallel-size"),
        Flag("vllm", "--enable-expert-parallel", passed=False),
    ] = 1
    """Number of expert-parallel ranks."""
    nnodes: Annotated[
        PositiveInt, Flag("sglang", "--nnodes"), Flag("vllm", "--nnodes", "--data-parallel-size-local", passed=False)
    ] = 1
    """Number of nodes that one engine runs on."""
    node_rank: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Flag("sglang", "--node-rank", passed=False),
        Flag("vllm", "--node-rank", "--data-parallel-start-rank", "--headless", passed=False),
    ] = None
    """Rank of this host's node. None runs all nodes on this host."""
    dist_init_addr: Annotated[
        Annotated[str, Field(pattern=r"^.+:\d+$")] | None,
        Flag("sglang", "--dist-init-addr", "--nccl-init-addr", passed=False),
        Flag("vllm", "--master-addr", "--master-port", "--data-parallel-address", passed=False),
    ] = None
    """host:port of node 0. None picks a free port if all nodes run on this host."""
    base_gpu_id: Annotated[int, Field(ge=0), Flag("sglang", "--base-gpu-id", passed=False)] = 0
    """Index of the first GPU. Replica r starts at base_gpu_id + r x the GPUs of one replica."""
    cuda_visible_devices: Annotated[str | None, Flag("vllm", "--device-ids", passed=False)] = None
    """CUDA_VISIBLE_DEVICES of the servers. None keeps this process's value."""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag("sglang", "--log-level"),
        Flag("vllm", "--log-level", passed=False),
    ] = "info"
    """Level of the servers' logs."""
    return_routed_experts: Annotated[
        bool,
        Flag("sglang", "--enable-return-routed-experts", passed=False),
        Flag("vllm", "--enable-return-routed-experts", passed=False),
    ] = False
    """Return the experts that each token was routed to, for routing replay. The model must be a mixture of experts."""
    kv_events: bool = False
    """Route by the KV cache events that the engine publishes. They report the prefixes in its cache. It needs the extra
    `millrace[kv-events]`."""
    kv_offload_gb: Annotated[
        PositiveInt | None,
        Flag(
            "sglang",
            "--hicache-size",
            "--enable-hierarchical-cache",
            "--enable-hicache",
            "--hicache-ratio",
            passed=False,
        ),
        Flag("vllm", "--kv-offloading-size", passed=False),
    ] = None
    """Host memory of each rank, in gigabytes, that keeps KV cache for which the device has no room. None keeps none."""
    prefill_decode: PrefillDecodeConfig | None = None
    """Compute prompts and generate on different servers, which are one replica (docs/sglang.md, docs/vllm.md). Each has
    `tp_size` GPUs. None: one server does both."""
    start_timeout: PositiveFloat = 600.0
    """Seconds until a server must be healthy. A large model on a slow disk takes minutes, a small one on the CPU 20 to
    60 s."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables that are added for the servers."""
    engine_args: dict[str, EngineArgument] = Field(default_factory=dict)
    """Further arguments of the engine, by the engine's names for them. A dictionary becomes JSON."""

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if self.urls is not None and self.python is not None:
            raise ValueError("urls attaches to running servers and python launches new ones; give one of them")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} is not below nnodes {self.nnodes}")
        if self.node_rank is not None and self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("an engine on several hosts needs dist_init_addr (host:port of node 0); it is missing")
        if self.nnodes > 1 and self.most_replicas > 1:
            raise ValueError("an engine over several nodes is launched alone; set replicas to 1")
        if self.kv_events and self.urls is not None:
            raise ValueError(
                "kv_events is for engines that Millrace launches; it is not known where an engine at urls publishes "
                "its events"
            )
        if self.kv_events and self.dp_size > 1:
            raise ValueError(
                f"kv_events is for engines with one KV cache, and with dp_size {self.dp_size} each rank has its own; "
                "set replicas instead, or leave kv_events out"
            )
        return self

    @model_validator(mode="after")
    def _check_prefill_decode(self) -> Self:
        if self.prefill_decode is None:
            return self
        needs = {"urls": None, "ports": None, "launch": "local", "nnodes": 1, "node_rank": None, "dp_size": 1}
        needs |= {"pp_size": 1, "kv_events": False, "kv_offload_gb": None, "return_routed_experts": False}
        for name, value in needs.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} does not work with prefill_decode; leave one of them out")
        return self


class SGLangEngineConfig(StockEngineConfig):
    """Stock SGLang."""

    kind: Literal["sglang"]
    """Stock SGLang."""
    version: str = "0.5.23"
    """Version of SGLang."""
    max_total_tokens: Annotated[PositiveInt | None, Flag("sglang", "--max-total-tokens", passed=False)] = None
    """Capacity of the KV cache, in tokens. None keeps SGLang's default on a GPU, and is 65536 on the CPU."""
    mem_fraction_static: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Flag("sglang", "--mem-fraction-static")
    ] = None
    """Share of the GPU's memory for weights and KV cache. None keeps SGLang's default."""
    memory_saver: Annotated[bool, Flag("sglang", "--enable-memory-saver", passed=False)] = True
    """Release GPU memory when the engine sleeps. It has no effect on the CPU."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.tp_size * self.pp_size % self.nnodes:
            raise ValueError(f"tp_size {self.tp_size} x pp_size {self.pp_size} can't be split over {self.nnodes} nodes")
        if self.return_routed_experts and self.pp_size > 1:
            raise ValueError(
                "SGLang returns the routed experts of the last pipeline stage only; set pp_size to 1, or leave out "
                "return_routed_experts"
            )
        return self


class VLLMEngineConfig(StockEngineConfig):
    """Stock vLLM."""

    kind: Literal["vllm"]
    """Stock vLLM."""
    version: str = "0.32.0"
    """Version of vLLM."""
    api_servers: Annotated[PositiveInt, Flag("vllm", "--api-server-count", passed=False)] = 1
    """Number of processes that serve HTTP on the same port."""
    gpu_memory_utilization: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Flag("vllm", "--gpu-memory-utilization", "--device-memory-utilization"),
    ] = None
    """Share of the GPU's memory that vLLM uses. None keeps vLLM's default."""
    kv_cache_memory_bytes: Annotated[PositiveInt | None, Flag("vllm", "--kv-cache-memory-bytes", passed=False)] = None
    """Size of the KV cache, in bytes. None keeps vLLM's default on a GPU, and is 256 MB on the CPU."""
    sleep_mode: Annotated[bool, Flag("vllm", "--enable-sleep-mode", passed=False)] = True
    """Release GPU memory when the engine sleeps. It has no effect on the CPU."""
    data_parallel_rpc_port: Annotated[PositiveInt | None, Flag("vllm", "--data-parallel-rpc-port", passed=False)] = None
    """Port on node 0 for data-parallel ranks on other hosts, in addition to dist_init_addr."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        world = self.tp_size * self.dp_size
        if self.ep_size not in (1, world):
            raise ValueError(
                f"vLLM spreads experts over all tp_size x dp_size = {world} ranks, or does not spread them (1); "
                f"ep_size is {self.ep_size}"
            )
        if world * self.pp_size % self.nnodes:
            raise ValueError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size} x dp_size {self.dp_size} can't be split over "
                f"{self.nnodes} nodes"
            )
        if self.nnodes > 1 and self.node_rank is not None and self.dp_size > 1 and self.data_parallel_rpc_port is None:
            raise ValueError(
                "data-parallel ranks on several hosts also need data_parallel_rpc_port, a free port on node 0's host"
            )
        return self


EngineConfig = Annotated[EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig, Field(discriminator="kind")]
