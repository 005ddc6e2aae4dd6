"""Build the command line and environment of each SGLang process from the settings. No I/O."""

from dataclasses import dataclass

from millrace.config.base import option_owners, passed_options
from millrace.config.engines import EngineArgument, SGLangEngineConfig
from millrace.engines.sglang.facts import KEEPING, MIXED_UP_EXPERTS
from millrace.engines.sglang.loading import LOADER
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.arguments import (
    ADMIN_KEY,
    API_KEY,
    KEYS,
    Node,
    device_names,
    given,
    kv_events_config,
    local_ranks,
    option,
    options,
    require_set_once,
)
from millrace.errors import ConfigError
from millrace.launch.ports import unbracketed, url_of

CPU_TOTAL_TOKENS = 65536
# Defaults that engine_args can override. torch_native, pytorch and xgrammar are backends that need no kernel package.
# On a CPU, the warm-up and busy waiting cost more than they gain.
CPU_DEFAULTS: dict[str, EngineArgument] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "xgrammar",
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "lora_backend": "torch_native",
}
# SGLang's own default on most GPUs is 256. It decodes a larger batch without CUDA graphs, at about half the speed.
LARGEST_CUDA_GRAPH = 512
# SGLang's default page size is 1, which makes an event entry for each token. It stays the default on the CPU, because
# 0.5.15 crashes with larger pages there.
KV_EVENTS_DEFAULTS: dict[str, EngineArgument] = {"page_size": 64}
EVENTS_WITHOUT_LORA = frozenset({"0.5.15"})  # versions whose KV events do not mention LoRA adapters

# The setting that each option belongs to, of all versions that Millrace supports.
SETTINGS = option_owners(SGLangEngineConfig, "sglang")
# Options that are set elsewhere or must not be set, with their owner and advice.
OTHERS = {
    "--model-path": ("model", "set only model"),
    "--model": ("model", "set only model"),
    "--random-seed": ("seed", "set only seed"),
    "--weight-version": ("the version that Millrace publishes", "leave it out"),
    "--api-key": KEYS,
    "--admin-api-key": KEYS,
    "--nccl-port": ("the free port that Millrace chooses", "leave it out"),
    **dict.fromkeys(KEEPING, ("the publishes, which can't drop the prefixes that it keeps", "leave it out")),
    "--config": ("engine.engine_args, the one place for SGLang's own arguments", "move the file's settings there"),
}
# The size of the cache of what the vision tower made of an image. SGLang keeps it across updates and flushes.
VISION_CACHE = "SGLANG_VLM_CACHE_SIZE_MB"
# Versions that take port + GRPC_DISTANCE for gRPC, and end if there is no such port, although gRPC is off. In other
# versions the variable switches gRPC on.
WITH_GRPC_PORT = frozenset({"0.5.15"})
GRPC_PORT, GRPC_DISTANCE, LAST_PORT = "SGLANG_GRPC_PORT", 10_000, 65_535
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": ("engine.cuda_visible_devices", "set only engine.cuda_visible_devices"),
    "OMP_NUM_THREADS": ("engine.threads", "set only engine.threads"),
    "SGLANG_USE_CPU_ENGINE": ("engine.device", "set only engine.device"),
    VISION_CACHE: ("what Millrace sets, as an update does not drop that cache", "leave it out"),
    API_KEY: KEYS,
    ADMIN_KEY: KEYS,
}


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one launch.

    http: one for each node on this host. rendezvous: the host:port where the ranks meet; None: at port `nccl` of this
    host. nccl: None if SGLang must choose one for each data-parallel rank. kv_events: the endpoint at which node 0
    publishes the contents of its KV cache.
    """

    http: tuple[int, ...]
    nccl: int | None
    rendezvous: str | None
    kv_events: str | None = None


def nodes(
    config: SGLangEngineConfig, spec: LaunchSpec, *, ports: Ports, api_key: str, admin_key: str
) -> tuple[Node, ...]:
    """Return the nodes to start on this host, ordered by rank.

    Raises ConfigError if engine_args or env contradict what Millrace sets.
    """
    require_no_contradiction(config)
    keys = {API_KEY: api_key, ADMIN_KEY: admin_key}
    # On the CPU, base_gpu_id is a NUMA node, and there may be only one.
    base = config.base_gpu_id + (spec.replica * gpus(config) if config.device == "cuda" else 0)
    ranks = local_ranks(config)
    return tuple(
        Node(
            rank,
            url_of(config.host, port),
            (
                *options(defaults(config)),
                *options(
                    settings(config, spec)
                    | {
                        "node_rank": rank,
                        "port": port,
                        "nccl_port": ports.nccl,
                        "dist_init_addr": ports.rendezvous,
                        "random_seed": spec.seed + spec.replica,
                        "kv_events_config": kv_events_config(ports.kv_events) if rank == 0 else None,
                        "base_gpu_id": base + ranks.index(rank) * gpus(config) // config.nnodes,
                    }
                ),
                *options(config.engine_args),
            ),
            grpc_port(config, port) | environment(config) | keys,
        )
        for rank, port in zip(ranks, ports.http, strict=True)
    )


def require_no_contradiction(config: SGLangEngineConfig) -> None:
    """Raise ConfigError for an engine argument or variable that Millrace sets itself, or for unusable KV events."""
    require_set_once(config, settings=SETTINGS, others=OTHERS, environment=ENVIRONMENT)
    loras = given(config).keys() & {"--enable-lora", "--lora-paths"}
    if config.kv_events and loras and config.version in EVENTS_WITHOUT_LORA:
        raise ConfigError(
            f"the KV events of SGLang {config.version} do not name a block's LoRA adapter; leave out engine.kv_events, "
            f"or engine.engine_args {', '.join(sorted(loras))}, or use 0.5.23"
        )


def settings(config: SGLangEngineConfig, spec: LaunchSpec) -> dict[str, EngineArgument]:
    """Return the options that all nodes of an engine share."""
    max_total_tokens = config.max_total_tokens
    if max_total_tokens is None and config.device == "cpu":
        max_total_tokens = CPU_TOTAL_TOKENS
    return passed_options(config, "sglang") | {
        "--model-path": str(spec.model_path),
        "--weight-version": str(spec.version),
        "--host": unbracketed(config.host),
        "--max-total-tokens": max_total_tokens,
        "--enable-return-routed-experts": config.return_routed_experts,
        "--enable-hierarchical-cache": config.kv_offload_gb is not None,
        "--hicache-size": config.kv_offload_gb,
        "--enable-memory-saver": config.memory_saver and config.device == "cuda",
    }


def defaults(config: SGLangEngineConfig) -> dict[str, EngineArgument]:
    """Return Millrace's defaults for options that engine_args does not set."""
    by_device = {"cpu": CPU_DEFAULTS, "cuda": KV_EVENTS_DEFAULTS if config.kv_events else {}}
    left_open = {"custom_weight_loader": LOADER, **by_device[config.device]}
    graphs_set = any(name.startswith(("--cuda-graph", "--disable-cuda-graph")) for name in given(config))
    if config.device == "cuda" and not graphs_set:
        left_open["cuda_graph_max_bs_decode"] = min(config.max_running_requests, LARGEST_CUDA_GRAPH)
    if config.return_routed_experts and config.version in MIXED_UP_EXPERTS:
        left_open["disable_overlap_schedule"] = True
    return {name: value for name, value in left_open.items() if option(name) not in given(config)}


def environment(config: SGLangEngineConfig) -> dict[str, str]:
    """Return the variables to add to the environment of every node, without the keys."""
    variables = {**config.env, VISION_CACHE: "0"}
    if config.cuda_visible_devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    if config.threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    if config.device == "cpu":
        # Several processes with a thread for every core each slow each other down: 5x under load.
        variables |= {"OMP_NUM_THREADS": str(config.threads or 1), "SGLANG_USE_CPU_ENGINE": "1"}
        variables.setdefault("CUDA_VISIBLE_DEVICES", "")
    return variables


def grpc_port(config: SGLangEngineConfig, port: int) -> dict[str, str]:
    """Return the variable that a server at this port needs if its port for gRPC would be too high."""
    if config.version not in WITH_GRPC_PORT or port + GRPC_DISTANCE <= LAST_PORT:
        return {}
    return {GRPC_PORT: str(port - GRPC_DISTANCE)}


def rank_gpus(config: SGLangEngineConfig, replica: int, visible: str | None) -> tuple[str, ...]:
    """Return the GPU of each rank of a replica, as CUDA_VISIBLE_DEVICES names it; empty if it is not known here.

    visible: CUDA_VISIBLE_DEVICES of this process.
    """
    separate_dp = config.dp_size > 1 and not attention_dp(config)
    if config.device == "cpu" or config.node_rank is not None or config.pp_size > 1 or separate_dp:
        return ()
    first = config.base_gpu_id + replica * gpus(config)
    numbers = range(first, first + gpus(config), gpus(config) // config.tp_size)
    device_ids = visible if config.cuda_visible_devices is None else config.cuda_visible_devices
    if device_ids is None:
        return tuple(map(str, numbers))
    names = device_names(device_ids)
    return tuple(names[number] for number in numbers) if numbers[-1] < len(names) else ()


def attention_dp(config: SGLangEngineConfig) -> bool:
    """Whether the data-parallel ranks share the tensor-parallel group (DP attention), and so need no GPUs of their own.

    SGLang 0.5.15 has a flag for it, 0.5.23 a flag and a size.
    """
    explicit = given(config)
    sizes = (explicit.get("--attn-dp-size"), explicit.get("--attention-data-parallel-size"))
    return explicit.get("--enable-dp-attention") is True or any(size not in (None, 1) for size in sizes)


def gpus(config: SGLangEngineConfig) -> int:
    """Return how many consecutive GPU ids one engine takes, over all its nodes."""
    step = given(config).get("--gpu-id-step", 1)
    copies = 1 if attention_dp(config) else config.dp_size
    return config.tp_size * config.pp_size * copies * (step if isinstance(step, int) else 1)
