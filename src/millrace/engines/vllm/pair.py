"""vLLM servers that are one engine."""

from collections.abc import Mapping

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.stock.pair import Role
from millrace.engines.stock.pair_launch import PairKind
from millrace.engines.vllm.arguments import gpus, require_no_contradiction
from millrace.engines.vllm.launch import launch
from millrace.engines.vllm.prefill import LEASE, Decode, Prefill


def settings(config: VLLMEngineConfig, _role: Role, port: int) -> Mapping[str, object]:
    """Return the settings of one server. port: at which NIXL's agents meet.

    It does not sleep on a GPU, because NIXL would go on to use the KV cache's old memory.
    """
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": config.device,
        "kv_connector_extra_config": {"kv_lease_duration": LEASE},
    }
    side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": config.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
    return {
        "env": {**side, **config.env},
        "engine_args": {**config.engine_args, "kv_transfer_config": transfer},
        "sleep_mode": False,
    }


# Followers have their prompts computed on the decode servers. The KV cache of a request that an update catches between
# the two servers would delay the update by the lease.
PAIR = PairKind(launch, require_no_contradiction, gpus, settings, Decode, Prefill, {"decode"})
