"""Read what a vLLM server is and can do from its own answers. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace.engines.stock.facts import Facts, Limits
from millrace.engines.stock.model import Model
from millrace.engines.vllm.arguments import EXTENSION
from millrace.engines.vllm.connectors import offloads
from millrace.engines.vllm.wire import COMPLETIONS, GENERATE
from millrace.quantisation import quantisation_of
from millrace.types import Capability, EngineInfo

SCHEMAS = {GENERATE: "GenerateRequest", COMPLETIONS: "CompletionRequest"}


@dataclass(frozen=True, slots=True)
class Server:
    """The properties of a vLLM server that its adapter depends on.

    path: the generate route. extension: whether the workers have Millrace's extension and every worker's answer is
    returned. replicas: the number of data-parallel ranks, each with a KV cache of its own. transfer: whether there is
    no extension, but vLLM's weight transfer by NCCL. checker: whether there is no extension, but vLLM's own checksums.
    versions: whether the server stores the weight version. aborts: whether it has a route that aborts requests.
    logprobs_mode: vLLM's own setting. total_tokens: the size of all KV caches. fields, sampling: the fields of a
    request and of its sampling parameters that the server's API description has; the server silently ignores others.
    offloads: whether KV cache that leaves the device is kept elsewhere.
    """

    path: str
    extension: bool
    replicas: int
    transfer: bool
    checker: bool
    versions: bool
    aborts: bool
    logprobs_mode: str
    total_tokens: int
    fields: frozenset[str]
    sampling: frozenset[str]
    on_cpu: bool
    offloads: bool = False


@dataclass(frozen=True, slots=True)
class VLLMFacts(Facts):
    """What a vLLM server is and can do."""

    server: Server


def has_extension(config: Mapping[str, Any]) -> bool:
    """Return whether the workers have Millrace's extension. config: the `vllm_config` of /server_info."""
    return bool(config["parallel_config"]["worker_extension_cls"] == EXTENSION)


def ranks_of(config: Mapping[str, Any]) -> int:
    """Return the number of workers. config: the `vllm_config` of /server_info."""
    parallel = config["parallel_config"]
    return int(parallel["world_size"] * parallel["data_parallel_size"])


def transfer_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the server's KV connector, as vLLM's option describes it; empty if it has none."""
    return config.get("kv_transfer_config") or {}


def read_server(api: Mapping[str, Any], config: Mapping[str, Any], answers: int) -> Server:
    """Return the server's properties. The arguments are those of `read_facts`."""
    paths, cache = api["paths"], config["cache_config"]
    path = GENERATE if GENERATE in paths else COMPLETIONS
    fields = api["components"]["schemas"][SCHEMAS[path]]["properties"]
    sampling = fields["sampling_params"]["properties"] if path == GENERATE else fields
    # Without Millrace's middleware, vLLM returns the answers of only one of several data-parallel ranks: an error of
    # another would be lost.
    extension = has_extension(config) and answers == ranks_of(config)
    on_cpu = config["device_config"]["device"] == "cpu"
    transfer = (config["weight_transfer_config"] or {}).get("backend") == "nccl"
    return Server(
        path=path,
        extension=extension,
        replicas=config["parallel_config"]["data_parallel_size"],
        transfer=transfer and not extension and not on_cpu,
        checker="/weight_checker" in paths and not extension,
        versions="/update_weight_version" in paths,
        aborts="/abort_requests" in paths,
        logprobs_mode=config["model_config"]["logprobs_mode"],
        total_tokens=(cache["num_gpu_blocks"] or 0) * cache["block_size"],
        fields=frozenset(fields),
        sampling=frozenset(sampling),
        on_cpu=on_cpu,
        offloads=offloads(transfer_config(config)),
    )


def read_facts(
    version: str,
    served: Mapping[str, Any],
    api: Mapping[str, Any],
    config: Mapping[str, Any],
    model: Model,
    answers: int,
) -> VLLMFacts:
    """Return the facts of a server. Raises KeyError if the answers are not vLLM's.

    version: of /version. served: the first of /v1/models. api: the answer of /openapi.json. config: the `vllm_config`
    of /server_info. model: the model's folder. answers: how many workers answer a call of Millrace's extension.
    """
    server = read_server(api, config, answers)
    info = EngineInfo(
        kind="vllm",
        engine_version=version,
        model_path=served["root"],
        weight_version=None,
        vocab_size=model.vocab_size,
        context_length=served["max_model_len"],
        capabilities=capabilities_of(config, server, api["paths"], model),
        ranks=ranks_of(config),
        dtype=str(config["model_config"]["dtype"]).removeprefix("torch."),
        quantisation=quantisation_of(quantization_option(config), model.quantization),
        max_running=config["scheduler_config"]["max_num_seqs"] * server.replicas,
        cache_tokens=server.total_tokens or None,
    )
    stop_texts = Capability.STOP_TEXTS in info.capabilities
    image_token = model.image_token if Capability.IMAGES in info.capabilities else None
    limits = Limits(
        info.vocab_size,
        info.context_length,
        seeds=True,
        stop_texts=stop_texts,
        json_schema=Capability.JSON_SCHEMA in info.capabilities,
        image_token=image_token,
    )
    return VLLMFacts(info, model, limits, server)


def quantization_option(config: Mapping[str, Any]) -> str | None:
    """Return the server's option `quantization`."""
    option = config["model_config"].get("quantization")
    return None if option is None else str(option)


def capabilities_of(
    config: Mapping[str, Any], server: Server, paths: Mapping[str, object], model: Model
) -> frozenset[Capability]:
    """Return the server's capabilities."""
    found = {
        Capability.VERSION_SPANS,
        Capability.PAUSE_ABORT,
        Capability.PAUSE_RETRACT,
        Capability.PAUSE_KEEP,
        Capability.UPDATE_FROM_DISK,
        Capability.PENALTIES,
        Capability.PROMPT_PENALTY,
    }
    if "/detokenize" in paths and not config["model_config"]["skip_tokenizer_init"]:
        found |= {Capability.STOP_TEXTS, Capability.JSON_SCHEMA}
    if server.extension:
        found |= {Capability.WHOLE_BROADCASTS, Capability.OWN_CHECKSUMS, Capability.SAMPLED_CHECKSUMS}
        found |= {Capability.UPDATE_FROM_PARTS, Capability.SENT_PARTS, Capability.AUDIT}
        found.add(Capability.UPDATE_FROM_SHARED_MEMORY if server.on_cpu else Capability.UPDATE_FROM_CUDA_IPC)
    if server.transfer:
        found.add(Capability.UPDATE_FROM_BARE_NCCL)
    if server.checker:
        found.add(Capability.OWN_CHECKSUMS)
    if server.logprobs_mode == "processed_logprobs":
        found.add(Capability.FILTERED_LOGPROBS)
    if server.offloads:
        found.add(Capability.KV_OFFLOAD)
    if server.on_cpu or config["model_config"]["enable_sleep_mode"]:
        found.add(Capability.SLEEP)
    # Before 0.24, the setting was the model's.
    returned = (config.get("aux_output_config") or config["model_config"]).get("enable_return_routed_experts")
    if returned and model.experts is not None and server.path == GENERATE:
        found.add(Capability.ROUTED_EXPERTS)
    if config["lora_config"] is not None and "/v1/load_lora_adapter" in paths:
        found.add(Capability.LORA)
    multimodal = config["model_config"]["multimodal_config"] is not None
    if multimodal and model.image_token is not None and "content_parts" in server.fields:
        found.add(Capability.IMAGES)
    return frozenset(found)
