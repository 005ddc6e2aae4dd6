"""SGLang servers that are one engine."""

from collections.abc import Mapping

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.sglang.arguments import attention_dp, gpus, require_no_contradiction
from millrace.engines.sglang.launch import launch
from millrace.engines.sglang.prefill import Decode, Prefill
from millrace.engines.stock.arguments import given
from millrace.engines.stock.pair import Role
from millrace.engines.stock.pair_launch import PairKind
from millrace.errors import ConfigError

OWN = ("--disaggregation-mode", "--disaggregation-bootstrap-port")
BACKEND = "--disaggregation-transfer-backend"
# Seconds for which one half of a request waits for the other, which may wait in a queue. SGLang's default is 300. A
# request's own deadline is Millrace's, and SGLang notices a dead prefill server by a heartbeat.
PATIENCE = 24 * 3600
# Seconds after which a decode server frees the KV cache of an aborted transfer, if the prefill server does not say that
# it writes no more. No flush succeeds before, so it must be below the deadline of a flush.
RELEASE = 15
ENVIRONMENT = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(PATIENCE),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(PATIENCE),
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": str(RELEASE),
}


def check(config: SGLangEngineConfig) -> None:
    """Raise ConfigError for engine arguments that contradict `prefill_decode`."""
    require_no_contradiction(config)
    for name in given(config):
        if any(own.startswith(name) for own in OWN):
            raise ConfigError(f"engine.engine_args {name} contradicts engine.prefill_decode; leave it out")
    if attention_dp(config):
        raise ConfigError("engine.engine_args with data-parallel attention contradict engine.prefill_decode")


def settings(config: SGLangEngineConfig, role: Role, port: int) -> Mapping[str, object]:
    """Return the settings of one server. port: at which a prefill server tells decode servers how to reach its ranks.

    It does not sleep on a GPU, because NIXL would go on to use the KV cache's old memory.
    """
    arguments = {**config.engine_args, "disaggregation_mode": role, "disaggregation_bootstrap_port": port}
    if BACKEND not in given(config):
        arguments["disaggregation_transfer_backend"] = "nixl"
    return {
        "env": {**ENVIRONMENT, **config.env},
        "engine_args": arguments,
        "memory_saver": False,
    }


PAIR = PairKind(launch, check, gpus, settings, Decode, Prefill, {"decode", "prefill"})
