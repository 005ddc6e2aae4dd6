"""Build the command line and environment of each vLLM process from the settings. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from millrace.config.base import option_owners, passed_options
from millrace.config.engines import EngineArgument, VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.arguments import (
    ADMIN_KEY,
    API_KEY,
    KEYS,
    Node,
    Owner,
    device_names,
    given,
    kv_events_config,
    local_ranks,
    option,
    options,
    require_set_once,
)
from millrace.engines.vllm.connectors import kept_after_flush
from millrace.errors import ConfigError
from millrace.launch.ports import parted, unbracketed, url_of

Value = TypeVar("Value")

CPU_KV_CACHE_BYTES = 256 * 1024 * 1024
# Defaults that engine_args can override.
DEFAULTS: dict[str, EngineArgument] = {"disable_uvicorn_access_log": True}  # a log line for each request takes time
CPU_DEFAULTS: dict[str, EngineArgument] = {
    "enforce_eager": True,  # compilation takes a minute and gains little
    "block_size": 32,  # with vLLM's default of 128, no shorter prefix is cached
    "enable_chunked_prefill": False,  # vLLM crashes on a seeded prompt that is computed in two chunks
}
# Both are in `extension/`, which the launcher puts on the PYTHONPATH of the server.
EXTENSION = "millrace_vllm.Extension"
KEYS_MIDDLEWARE = "millrace_vllm_keys.Keys"

# The setting that each option belongs to, of all versions that Millrace supports.
SETTINGS = option_owners(VLLMEngineConfig, "vllm")
REPLICAS: Owner = ("engine.replicas, over which Millrace balances requests itself", "set engine.replicas instead")
NO_KEYS: Owner = ("the API keys, which it would not check", "leave it out")
# Options that are set elsewhere or must not be set, with their owner and advice.
OTHERS: dict[str, Owner] = {
    "--model": ("model", "set only model"),
    "--model-tag": ("model", "set only model"),
    "--seed": ("seed", "set only seed"),
    "--api-key": KEYS,
    "--worker-extension-cls": ("the extension that Millrace loads weights with", "leave it out"),
    "--logprobs-mode": ("the logprobs of the sampled distribution, which a trainer needs", "leave it out"),
    "--enable-scale-out": ("Millrace, which generates by token ids", "leave it out"),
    "--enable-prompt-tokens-details": ("Millrace, which reports cached tokens", "leave it out"),
    "--config": ("engine.engine_args, the one place for vLLM's own arguments", "move the file's settings there"),
    "--data-parallel-rank": REPLICAS,
    "--data-parallel-external-lb": REPLICAS,
    "--data-parallel-hybrid-lb": REPLICAS,
    "--data-parallel-multi-port-external-lb": REPLICAS,
    "--uds": ("engine.host", "set only engine.host"),
    "--grpc": NO_KEYS,
    "--grpc-port": NO_KEYS,
}
ENVIRONMENT: dict[str, Owner] = {
    "CUDA_VISIBLE_DEVICES": ("engine.cuda_visible_devices", "set only engine.cuda_visible_devices"),
    "OMP_NUM_THREADS": ("engine.threads", "set only engine.threads"),
    "VLLM_LOGGING_LEVEL": ("engine.log_level", "set only engine.log_level"),
    "VLLM_SERVER_DEV_MODE": ("Millrace, which needs the control routes", "leave it out"),
    "VLLM_USE_RUST_FRONTEND": NO_KEYS,
    "VLLM_RUST_FRONTEND_PATH": NO_KEYS,
    "VLLM_API_KEY": KEYS,
    API_KEY: KEYS,
    ADMIN_KEY: KEYS,
}


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one launch.

    http: None if node 0, which alone answers HTTP, is on another host. rendezvous: the host:port where several nodes
    meet. data_parallel: the port on that host where data-parallel ranks reach node 0. kv_events: the endpoint at which
    node 0 publishes the contents of its KV cache.
    """

    http: int | None
    rendezvous: str | None
    data_parallel: int | None
    kv_events: str | None = None


def nodes(
    config: VLLMEngineConfig,
    spec: LaunchSpec,
    *,
    ports: Ports,
    api_key: str,
    admin_key: str,
    visible_gpus: str | None,
) -> tuple[Node, ...]:
    """Return the nodes to start on this host, ordered by rank.

    visible_gpus: CUDA_VISIBLE_DEVICES of this process. Raises ConfigError if engine_args or env contradict what
    Millrace sets, or if there are too few GPUs.
    """
    require_no_contradiction(config)
    keys = {API_KEY: api_key, ADMIN_KEY: admin_key}
    variables = environment(config) | keys
    ranks = local_ranks(config)
    planned = []
    for index, rank in enumerate(ranks):
        if config.device == "cuda":
            variables["CUDA_VISIBLE_DEVICES"] = node_gpus(config, spec.replica, index, visible_gpus)
        planned.append(
            Node(
                rank,
                url_of(config.host, ports.http or 0) if rank == 0 else None,
                (
                    *options(defaults(config), off=True),
                    *options(
                        settings(config, spec.model_path)
                        | rendezvous(config, rank, ports)
                        | {"seed": spec.seed + spec.replica},
                        off=True,
                    ),
                    *options(config.engine_args, off=True),
                ),
                dict(variables),
            )
        )
    return tuple(planned)


def require_no_contradiction(config: VLLMEngineConfig) -> None:
    """Raise ConfigError for an engine argument or variable that Millrace sets itself, or for a KV connector that would
    keep prefixes of old weights."""
    require_set_once(config, settings=both_ways(SETTINGS), others=both_ways(OTHERS), environment=ENVIRONMENT)
    checked_connector(config)


def checked_connector(config: VLLMEngineConfig) -> None:
    """Raise ConfigError for a KV connector that would keep prefixes of old weights, or beside `kv_offload_gb`."""
    transfer = given(config).get("--kv-transfer-config")
    for setting in ("kv_offload_gb", "prefill_decode"):
        if transfer is not None and getattr(config, setting) is not None:
            raise ConfigError(f"engine.engine_args.kv_transfer_config contradicts engine.{setting}; keep one of them")
    if isinstance(transfer, dict) and (connector := kept_after_flush(transfer)):
        raise ConfigError(
            f"engine.engine_args.kv_transfer_config: {connector} keeps prefixes of old weights after a publish; leave "
            "it out, or set engine.kv_offload_gb"
        )


def both_ways(names: Mapping[str, Value]) -> dict[str, Value]:
    """Return the options together with their negations, `--no-...`."""
    return dict(names) | {f"--no-{name.removeprefix('--')}": value for name, value in names.items()}


def settings(config: VLLMEngineConfig, model_path: Path) -> dict[str, EngineArgument]:
    """Return the options that all nodes of an engine share."""
    kv_cache = config.kv_cache_memory_bytes
    if kv_cache is None and config.gpu_memory_utilization is None and config.device == "cpu":
        kv_cache = CPU_KV_CACHE_BYTES
    return passed_options(config, "vllm") | {
        "model": str(model_path),
        "enable_expert_parallel": True if config.ep_size > 1 else None,
        "enable_return_routed_experts": True if config.return_routed_experts else None,
        "kv_cache_memory_bytes": kv_cache,
        "kv_offloading_size": offloading_gib(config),
        "enable_sleep_mode": True if config.sleep_mode and config.device == "cuda" else None,
        # One process on the CPU: a second one has nothing to do and doubles the startup time.
        "distributed_executor_backend": "uni" if alone_on_cpu(config) else None,
        # A trainer needs the logprobs of the sampled distribution, without the sampling defaults of the model's folder.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "worker_extension_cls": EXTENSION,
    }


def offloading_gib(config: VLLMEngineConfig) -> float | None:
    """Return the host memory for KV cache in vLLM's unit: GiB of all ranks of one engine core."""
    if config.kv_offload_gb is None:
        return None
    return round(config.kv_offload_gb * 10**9 / 2**30 * config.tp_size * config.pp_size, 3)


def rendezvous(config: VLLMEngineConfig, rank: int, ports: Ports) -> dict[str, EngineArgument]:
    """Return the options that differ by node: its rank, its address, and where the nodes meet."""
    values: dict[str, EngineArgument] = {}
    if rank == 0:
        values |= {
            "host": unbracketed(config.host),
            "port": ports.http,
            "api_server_count": config.api_servers,
            "middleware": KEYS_MIDDLEWARE,
            "kv_events_config": kv_events_config(ports.kv_events, enable_kv_cache_events=True),
        }
    else:
        values["headless"] = True
    if ports.rendezvous is not None:
        host, port = parted(ports.rendezvous)
        values |= {"nnodes": config.nnodes, "node_rank": rank, "master_addr": host, "master_port": port}
        values["data_parallel_rpc_port"] = ports.data_parallel
    return values


def defaults(config: VLLMEngineConfig) -> dict[str, EngineArgument]:
    """Return Millrace's defaults for options that engine_args does not set."""
    open_to_both = DEFAULTS | (CPU_DEFAULTS if config.device == "cpu" else {})
    explicit = given(config)
    if explicit.get("--enable-lora") is True:
        # A published LoRA adapter and the one before it. On the CPU one more slot must stay empty (see adapter.py).
        open_to_both |= {"max_loras": 3 if config.device == "cpu" else 2}
    return {
        name: value for name, value in open_to_both.items() if not both_ways({option(name): 0}).keys() & explicit.keys()
    }


def alone_on_cpu(config: VLLMEngineConfig) -> bool:
    """Whether the engine is a single process on the CPU."""
    return config.device == "cpu" and config.tp_size * config.pp_size * config.dp_size == 1


def environment(config: VLLMEngineConfig) -> dict[str, str]:
    """Return the variables to add to the environment of every node, without the keys."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **config.env,
        "VLLM_SERVER_DEV_MODE": "1",  # opens the control routes
        # These override values inherited from this process, which would bypass the keys or demand another one.
        "VLLM_USE_RUST_FRONTEND": "0",
        "VLLM_API_KEY": "",
        "VLLM_LOGGING_LEVEL": config.log_level.upper(),
    }
    if given(config).get("--enable-lora") is True and config.api_servers == 1:  # vLLM does not allow it with several
        variables.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # the routes that load adapters
    if config.nnodes > 1 and config.node_rank is None:
        variables.setdefault("VLLM_HOST_IP", "127.0.0.1")  # vLLM's default is the address of an external interface
    if config.cuda_visible_devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    if config.threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    if config.device == "cpu":
        variables["OMP_NUM_THREADS"] = str(config.threads or 1)
        variables.setdefault("CUDA_VISIBLE_DEVICES", "")
        # Otherwise the first request compiles two small functions in C++: half a minute on a busy machine.
        variables.setdefault("TORCHDYNAMO_DISABLE", "1")
        if config.return_routed_experts:  # vLLM returns them with this runner only, and says what it needs
            variables.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        if alone_on_cpu(config):
            variables.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # otherwise vLLM overrides the executor
    return variables


def gpus(config: VLLMEngineConfig) -> int:
    """Return how many GPUs one engine takes, over all its nodes."""
    context = given(config).get("--prefill-context-parallel-size", 1)
    return config.tp_size * config.pp_size * config.dp_size * (context if isinstance(context, int) else 1)


def node_gpus(config: VLLMEngineConfig, replica: int, index: int, visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for the node with number `index` on this host.

    vLLM always uses the first of its visible GPUs. Raises ConfigError if there are too few.
    """
    count = gpus(config) // config.nnodes
    first = config.base_gpu_id + replica * gpus(config) + index * count
    device_ids = visible if config.cuda_visible_devices is None else config.cuda_visible_devices
    if device_ids is None:
        return ",".join(str(number) for number in range(first, first + count))
    names = device_names(device_ids)
    if len(names) < first + count:
        raise ConfigError(
            f"engine: replica {replica} needs the GPUs {first} to {first + count - 1} of those in "
            f"CUDA_VISIBLE_DEVICES, which has {len(names)} ({device_ids!r})"
        )
    return ",".join(names[first : first + count])


def rank_gpus(config: VLLMEngineConfig, replica: int, visible: str | None) -> tuple[str, ...]:
    """Return the GPU of each rank of a replica, as CUDA_VISIBLE_DEVICES names it; empty if it is not known here.

    visible: CUDA_VISIBLE_DEVICES of this process. Raises ConfigError if there are too few.
    """
    if config.device == "cpu" or config.node_rank is not None:
        return ()
    nodes_gpus = (node_gpus(config, replica, index, visible) for index in range(config.nnodes))
    return tuple(gpu for gpus_of_node in nodes_gpus for gpu in device_names(gpus_of_node))
