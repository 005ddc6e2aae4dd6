"""Read what an SGLang server is and can do from its own answers. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace.engines.sglang.loading import LOADER
from millrace.engines.stock.facts import Facts, Limits
from millrace.engines.stock.model import Model
from millrace.model_config import COMPUTE_DTYPES
from millrace.quantisation import quantisation_of
from millrace.types import Capability, EngineInfo

# Capability to the route that provides it. Routes are read from the server, so forks and later versions work too.
CAPABILITY_PATHS = {
    Capability.UPDATE_SESSION: "/begin_weight_update",
    Capability.UPDATE_FROM_DISK: "/update_weights_from_disk",
    Capability.UPDATE_FROM_PROCESS_GROUP: "/update_weights_from_distributed",
    Capability.OWN_CHECKSUMS: "/weights_checker",
}
# An SGLang with quantised weights crashes on an update, because the weights do not arrive quantised. With this load
# format it quantises them again, but still crashes on an update from disk.
REQUANTISING_FORMAT = "flash_rl"
# How a server with fp8 in blocks gets weights, if it has Millrace's loader, which copies them and their scales.
COPIED = {Capability.UPDATE_FROM_TORCH_STORAGE, Capability.UPDATE_FROM_CUDA_IPC}
BY_LOADER = {
    Capability.SAMPLED_CHECKSUMS,
    Capability.UPDATE_FROM_PARTS,
    Capability.WHOLE_BROADCASTS,
    Capability.SENT_PARTS,
}
BREAKING = {Capability.UPDATE_FROM_DISK}
UPDATES = BREAKING | {
    Capability.UPDATE_FROM_PROCESS_GROUP,
    Capability.UPDATE_FROM_TORCH_STORAGE,
    Capability.UPDATE_FROM_CUDA_IPC,
    Capability.UPDATE_FROM_PARTS,
    Capability.WHOLE_BROADCASTS,
    Capability.SENT_PARTS,
}
# SGLang's names of dtypes. It does not report what `auto` resolved to.
DTYPES = {name: name for name in COMPUTE_DTYPES} | {"half": "float16", "float": "float32"}
RUNNING = "effective_max_running_requests_per_dp"
# Versions that, with overlap, return the experts of another batch: the next one has overwritten them by then.
MIXED_UP_EXPERTS = frozenset({"0.5.15"})
# Versions that die on a CPU of the first request with a JSON schema.
NO_SCHEMA_ON_CPU = frozenset({"0.5.15"})
# Options of caches that /flush_cache does not reach. They would give an old version's prefixes to the next one.
KEEPING = (
    "--hicache-storage-backend",
    "--enable-lmcache",
    "--enable-flexkv",
    "--enable-unified-cache-external-linker",
    "--disaggregation-decode-enable-offload-kvcache",
)
PAUSE_CAPABILITIES = {Capability.PAUSE_ABORT, Capability.PAUSE_RETRACT, Capability.PAUSE_KEEP}


@dataclass(frozen=True, slots=True)
class SGLangFacts(Facts):
    """What an SGLang server is and can do.

    caches: the number of data-parallel ranks, each with a KV cache of its own.
    """

    caches: int


def read_facts(
    paths: Mapping[str, object],
    served: Mapping[str, Any],
    server: Mapping[str, Any],
    model: Model,
) -> SGLangFacts:
    """Return the facts of a server.

    paths: of /openapi.json. served: the answer of /model_info. server: the answer of /server_info. model: the model's
    folder. Raises KeyError if the answers are not SGLang's.
    """
    capabilities = capabilities_of(paths, served, server, model)
    info = EngineInfo(
        kind="sglang",
        engine_version=server["version"],
        model_path=served["model_path"],
        weight_version=None,
        vocab_size=model.vocab_size,
        # Less than the model's: beyond it, SGLang refuses the prompt or silently cuts the output.
        context_length=server["max_req_input_len"],
        capabilities=capabilities,
        ranks=server["tp_size"] * server["pp_size"],
        dtype=DTYPES.get(server["dtype"]),
        quantisation=quantisation_of(server["quantization"], model.quantization),
        cache_tokens=server.get("max_total_num_tokens", 0) * server["dp_size"] or None,
        max_running=sum(rank.get(RUNNING, 0) for rank in server.get("internal_states", ())) or None,
    )
    seeds = bool(server["enable_deterministic_inference"])
    limits = Limits(
        info.vocab_size,
        info.context_length,
        seeds,
        penalties=Capability.PENALTIES in info.capabilities,
        stop_texts=Capability.STOP_TEXTS in info.capabilities,
        json_schema=Capability.JSON_SCHEMA in info.capabilities,
        image_token=model.image_token if Capability.IMAGES in info.capabilities else None,
    )
    # Before 0.5.23, dp_size also counted the ranks of DP attention.
    return SGLangFacts(info, model, limits, server["dp_size"] * server.get("attn_dp_size", 1))


def kept_after_flush(server: Mapping[str, Any]) -> str | None:
    """Return the option of a cache that a flush does not reach, if the server has one."""
    return next((option for option in KEEPING if server.get(option.removeprefix("--").replace("-", "_"))), None)


def has_loader(server: Mapping[str, Any]) -> bool:
    """Return whether a server has Millrace's weight loader. Its ranks answer by their tensor-parallel numbers."""
    return LOADER in (server.get("custom_weight_loader") or ()) and server["pp_size"] == 1


def quantises(server: Mapping[str, Any], model: Model) -> bool:
    """Return whether a server has quantised weights. It does not report what a folder alone asks for."""
    return server["quantization"] is not None or model.quantization is not None


def uses_as_loaded(server: Mapping[str, Any], model: Model) -> bool:
    """Return whether a server uses its weights as they were loaded, so that Millrace's loader can copy them."""
    if not quantises(server, model):
        return True
    config = model.quantization or {}
    return config.get("quant_method") == "fp8" and config.get("weight_block_size") is not None


def capabilities_of(
    paths: Mapping[str, object], served: Mapping[str, Any], server: Mapping[str, Any], model: Model
) -> frozenset[Capability]:
    """Return the server's capabilities. The arguments are those of `read_facts`."""
    found = {capability for capability, path in CAPABILITY_PATHS.items() if path in paths}
    found |= {Capability.VERSION_SPANS, *PAUSE_CAPABILITIES}
    on_cpu = server["device"] == "cpu"
    single = server["dp_size"] == 1 or server["enable_dp_attention"]
    if "/update_weights_from_tensor" in paths and single:
        if on_cpu:
            found.add(Capability.UPDATE_FROM_TORCH_STORAGE)
        elif server["pp_size"] == 1:  # otherwise the ranks of all stages open the same share, and it is for one rank
            found.add(Capability.UPDATE_FROM_CUDA_IPC)
    if not single:
        found.discard(Capability.UPDATE_FROM_PROCESS_GROUP)
    loader = "/update_weights_from_tensor" in paths and single and has_loader(server)
    if loader:
        found.add(Capability.AUDIT)
    if loader and uses_as_loaded(server, model):
        found |= BY_LOADER
    if quantises(server, model):
        left = COPIED if Capability.SAMPLED_CHECKSUMS in found else set[Capability]()
        found -= BREAKING if server["load_format"] == REQUANTISING_FORMAT else UPDATES - left
    if on_cpu or server["enable_memory_saver"]:
        found.add(Capability.SLEEP)
    if server.get("enable_hierarchical_cache"):
        found.add(Capability.KV_OFFLOAD)
    if server["enable_lora"] and server["dp_size"] == 1:  # otherwise SGLang can't load adapters at runtime
        found.add(Capability.LORA)
    if "/v1/detokenize" in paths and not server["skip_tokenizer_init"]:
        found.add(Capability.STOP_TEXTS)
        survives = not on_cpu or server["version"] not in NO_SCHEMA_ON_CPU
        if server["grammar_backend"] not in (None, "none") and survives:
            found.add(Capability.JSON_SCHEMA)
    if server["disable_overlap_schedule"]:  # otherwise penalties count a token when the next one is sampled already
        found.add(Capability.PENALTIES)
    if server.get("enable_return_routed_experts") and model.experts is not None:
        mixed_up = server["version"] in MIXED_UP_EXPERTS and not server["disable_overlap_schedule"]
        if not mixed_up and server["pp_size"] == 1:  # with several stages, it returns those of the last one's layers
            found.add(Capability.ROUTED_EXPERTS)
    if served["has_image_understanding"] and model.image_token is not None:
        found.add(Capability.IMAGES)
    return frozenset(found)
