"""What one vLLM process is started with: its arguments and environment, worked out from the settings. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from millrace.config.models import EngineArgument, VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.arguments import (
    ADMIN_KEY,
    API_KEY,
    KEYS,
    Node,
    Owner,
    given,
    kv_events_config,
    local_ranks,
    option,
    options,
    require_said_once,
)
from millrace.errors import ConfigError
from millrace.launch.ports import parted, unbracketed, url_of

Value = TypeVar("Value")

CPU_KV_CACHE_BYTES = 256 * 1024 * 1024
# Only what engine_args leaves open.
DEFAULTS: dict[str, EngineArgument] = {"disable_uvicorn_access_log": True}  # a line for each request costs its time
CPU_DEFAULTS: dict[str, EngineArgument] = {
    "enforce_eager": True,  # compiling takes a minute and gains little
    "block_size": 32,  # vLLM's 128 caches no shorter prefix
    "enable_chunked_prefill": False,  # vLLM dies of a seeded prompt that is computed in two parts
}
# Both are in `extension/`, which the launcher puts on the PYTHONPATH of the server.
EXTENSION = "millrace_vllm.Extension"
KEYS_MIDDLEWARE = "millrace_vllm_keys.Keys"

# Every option string of vLLM 0.23.0 and 0.32.0 for what Millrace sets, and the setting that it belongs to.
SETTINGS = {
    "--tensor-parallel-size": "tp_size",
    "--tp": "tp_size",
    "--pipeline-parallel-size": "pp_size",
    "--pp": "pp_size",
    "--data-parallel-size": "dp_size",
    "--dp": "dp_size",
    "--data-parallel-size-local": "nnodes",
    "--data-parallel-start-rank": "node_rank",
    "--enable-expert-parallel": "ep_size",
    "--nnodes": "nnodes",
    "--node-rank": "node_rank",
    "--headless": "node_rank",
    "--master-addr": "dist_init_addr",
    "--master-port": "dist_init_addr",
    "--data-parallel-address": "dist_init_addr",
    "--data-parallel-rpc-port": "data_parallel_rpc_port",
    "--device-ids": "cuda_visible_devices",
    "--dtype": "dtype",
    "--host": "host",
    "--port": "ports",
    "--log-level": "log_level",
    "--api-server-count": "api_servers",
    "--max-num-seqs": "max_running_requests",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--device-memory-utilization": "gpu_memory_utilization",
    "--kv-cache-memory-bytes": "kv_cache_memory_bytes",
    "--enable-sleep-mode": "sleep_mode",
}
REPLICAS: Owner = ("engine.replicas, by which Millrace spreads requests itself", "set engine.replicas instead")
NO_KEYS: Owner = ("the keys that Millrace's launcher demands, of which it knows nothing", "leave it out")
# The same for what has its place elsewhere, or nowhere.
OTHERS: dict[str, Owner] = {
    "--model": ("model", "set only model"),
    "--model-tag": ("model", "set only model"),
    "--seed": ("seed", "set only seed"),
    "--api-key": KEYS,
    "--worker-extension-cls": ("the extension by which Millrace loads weights", "leave it out"),
    "--logprobs-mode": ("the logprobs that a trainer needs: of the distribution that was sampled", "leave it out"),
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
    """The ports of one launch. `http` is None where another host is node 0, which alone answers HTTP.

    Where there are several nodes, they meet at `rendezvous` (host:port); and where they hold data-parallel ranks, those
    reach node 0 at `data_parallel` of the same host. `kv_events`: where node 0 publishes what its KV cache has.
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
    """The nodes that are started on this host, in the order of their ranks.

    `visible_gpus` is CUDA_VISIBLE_DEVICES as this process has it. Raises ConfigError where engine_args or env
    contradict what Millrace sets, or there are too few GPUs.
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
    """Raises ConfigError for an engine argument or a variable that repeats what Millrace sets."""
    require_said_once(config, settings=both_ways(SETTINGS), others=both_ways(OTHERS), environment=ENVIRONMENT)


def both_ways(names: Mapping[str, Value]) -> dict[str, Value]:
    """With the opposite of every switch."""
    return dict(names) | {f"--no-{name.removeprefix('--')}": value for name, value in names.items()}


def settings(config: VLLMEngineConfig, model_path: Path) -> dict[str, EngineArgument]:
    """What all nodes of an engine are told alike."""
    kv_cache = config.kv_cache_memory_bytes
    if kv_cache is None and config.gpu_memory_utilization is None and config.device == "cpu":
        kv_cache = CPU_KV_CACHE_BYTES
    return {
        "model": str(model_path),
        "dtype": config.dtype,
        "tensor_parallel_size": config.tp_size,
        "pipeline_parallel_size": config.pp_size,
        "data_parallel_size": config.dp_size,
        "enable_expert_parallel": True if config.ep_size > 1 else None,
        "max_num_seqs": config.max_running_requests,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_cache,
        "enable_sleep_mode": True if config.sleep_mode and config.device == "cuda" else None,
        # One process on the CPU: a second executor has nothing to do there, and doubles the start.
        "distributed_executor_backend": "uni" if alone_on_cpu(config) else None,
        # A trainer needs the logprobs of the distribution that was sampled, and no sampling default that the model's
        # folder may have.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "worker_extension_cls": EXTENSION,
    }


def rendezvous(config: VLLMEngineConfig, rank: int, ports: Ports) -> dict[str, EngineArgument]:
    """What each node is told differently: who it is, where it listens, and where the nodes meet."""
    said: dict[str, EngineArgument] = {}
    if rank == 0:
        said |= {
            "host": unbracketed(config.host),
            "port": ports.http,
            "api_server_count": config.api_servers,
            "middleware": KEYS_MIDDLEWARE,
            "kv_events_config": kv_events_config(ports.kv_events, enable_kv_cache_events=True),
        }
    else:
        said["headless"] = True
    if ports.rendezvous is not None:
        host, port = parted(ports.rendezvous)
        said |= {"nnodes": config.nnodes, "node_rank": rank, "master_addr": host, "master_port": port}
        said["data_parallel_rpc_port"] = ports.data_parallel
    return said


def defaults(config: VLLMEngineConfig) -> dict[str, EngineArgument]:
    """What vLLM is told unless engine_args says otherwise."""
    open_to_both = DEFAULTS | (CPU_DEFAULTS if config.device == "cpu" else {})
    said = given(config)
    if said.get("--enable-lora") is True:
        # A published adapter and the one before it; on the CPU one place has to stay empty (`lora.py`).
        open_to_both |= {"max_loras": 3 if config.device == "cpu" else 2}
    return {
        name: value for name, value in open_to_both.items() if not both_ways({option(name): 0}).keys() & said.keys()
    }


def alone_on_cpu(config: VLLMEngineConfig) -> bool:
    """Whether one process can do all of the engine's work."""
    return config.device == "cpu" and config.tp_size * config.pp_size * config.dp_size == 1


def environment(config: VLLMEngineConfig) -> dict[str, str]:
    """What is added to the environment of every node, without the keys."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **config.env,
        "VLLM_SERVER_DEV_MODE": "1",  # opens the control routes
        # What this process was started with must not open a way around the launcher's keys, or ask for another.
        "VLLM_USE_RUST_FRONTEND": "0",
        "VLLM_API_KEY": "",
        "VLLM_LOGGING_LEVEL": config.log_level.upper(),
    }
    if given(config).get("--enable-lora") is True and config.api_servers == 1:  # vLLM refuses it with several
        variables.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # the routes that load adapters
    if config.nnodes > 1 and config.node_rank is None:
        variables.setdefault("VLLM_HOST_IP", "127.0.0.1")  # where vLLM would take the address that leads outside
    if config.cuda_visible_devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    if config.threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    if config.device == "cpu":
        variables["OMP_NUM_THREADS"] = str(config.threads or 1)
        variables.setdefault("CUDA_VISIBLE_DEVICES", "")
        # Or the first request waits for a C++ compiler, half a minute on a busy machine, for two small functions.
        variables.setdefault("TORCHDYNAMO_DISABLE", "1")
        if alone_on_cpu(config):
            variables.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # or vLLM overrules the executor
    return variables


def gpus(config: VLLMEngineConfig) -> int:
    """How many GPUs one engine takes, over all its nodes."""
    context = given(config).get("--prefill-context-parallel-size", 1)
    return config.tp_size * config.pp_size * config.dp_size * (context if isinstance(context, int) else 1)


def node_gpus(config: VLLMEngineConfig, replica: int, index: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for the node that is number `index` on this host: vLLM takes the GPUs that it sees from the
    first on. Raises ConfigError where there are too few."""
    count = gpus(config) // config.nnodes
    first = config.base_gpu_id + replica * gpus(config) + index * count
    said = visible if config.cuda_visible_devices is None else config.cuda_visible_devices
    if said is None:
        return ",".join(str(number) for number in range(first, first + count))
    names = [name for name in said.split(",") if name]
    if len(names) < first + count:
        raise ConfigError(
            f"engine: replica {replica} takes the GPUs {first} to {first + count - 1} of those in "
            f"CUDA_VISIBLE_DEVICES, which has {len(names)} ({said!r})"
        )
    return ",".join(names[first : first + count])
