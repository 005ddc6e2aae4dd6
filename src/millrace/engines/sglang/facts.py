"""What does not change while a server runs, worked out from what the server says of itself. Pure."""

from collections.abc import Mapping
from typing import Any

from millrace.engines.stock.facts import Facts, Limits
from millrace.engines.stock.model import Model
from millrace.model_config import COMPUTE_DTYPES
from millrace.types import Capability, EngineInfo

# By the server's own description of its API, so that a fork or a later version tells by itself what it can do.
CAPABILITY_PATHS = {
    Capability.UPDATE_SESSION: "/begin_weight_update",
    Capability.UPDATE_FROM_DISK: "/update_weights_from_disk",
    Capability.UPDATE_FROM_PROCESS_GROUP: "/update_weights_from_distributed",
    Capability.OWN_CHECKSUMS: "/weights_checker",
}
# An SGLang that quantises its weights has them in another form than they come in, and dies of an update. With this load
# format it quantises what comes again; it dies of updates from disk all the same.
QUANTISES_AGAIN = "flash_rl"
BREAKING = {Capability.UPDATE_FROM_DISK}
UPDATES = BREAKING | {
    Capability.UPDATE_FROM_PROCESS_GROUP,
    Capability.UPDATE_FROM_TORCH_STORAGE,
    Capability.UPDATE_FROM_CUDA_IPC,
}
# By what SGLang calls them; which one `auto` has become, it does not say.
DTYPES = {name: name for name in COMPUTE_DTYPES} | {"half": "float16", "float": "float32"}
PAUSE_CAPABILITIES = {Capability.PAUSE_ABORT, Capability.PAUSE_RETRACT, Capability.PAUSE_KEEP}


def read_facts(
    paths: Mapping[str, object], served: Mapping[str, Any], server: Mapping[str, Any], model: Model
) -> Facts:
    """From the paths of /openapi.json, /model_info, /server_info and the model's folder. Raises KeyError where the
    server does not say what SGLang says."""
    info = EngineInfo(
        kind="sglang",
        engine_version=server["version"],
        model_path=served["model_path"],
        weight_version=None,
        vocab_size=model.vocab_size,
        # Less than the model's: of what is longer, SGLang refuses the prompt or cuts the answer without a word.
        context_length=server["max_req_input_len"],
        capabilities=capabilities_of(paths, served, server),
        ranks=server["tp_size"] * server["pp_size"],
        dtype=DTYPES.get(server["dtype"]),
    )
    seeds = bool(server["enable_deterministic_inference"])
    return Facts(info, model, Limits(info.vocab_size, info.context_length, seeds))


def capabilities_of(
    paths: Mapping[str, object], served: Mapping[str, Any], server: Mapping[str, Any]
) -> frozenset[Capability]:
    """From the server's description of its API, of its model and of its settings."""
    found = {capability for capability, path in CAPABILITY_PATHS.items() if path in paths}
    found |= {Capability.VERSION_SPANS, *PAUSE_CAPABILITIES}
    on_cpu = server["device"] == "cpu"
    single = server["dp_size"] == 1 or server["enable_dp_attention"]
    if "/update_weights_from_tensor" in paths and single:
        found.add(Capability.UPDATE_FROM_TORCH_STORAGE if on_cpu else Capability.UPDATE_FROM_CUDA_IPC)
    if not single:
        found.discard(Capability.UPDATE_FROM_PROCESS_GROUP)
    if server["quantization"] is not None:
        found -= BREAKING if server["load_format"] == QUANTISES_AGAIN else UPDATES
    if on_cpu or server["enable_memory_saver"]:
        found.add(Capability.SLEEP)
    if server["enable_lora"] and server["dp_size"] == 1:  # SGLang loads none at runtime otherwise
        found.add(Capability.LORA)
    if served["has_image_understanding"]:
        found.add(Capability.IMAGES)
    return frozenset(found)
