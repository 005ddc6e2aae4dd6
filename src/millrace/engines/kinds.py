"""The kinds of engines. An engine is one folder in this package, one config class, and one row here."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millrace.config.engines import EngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.embedded.launch import launch as launch_embedded
from millrace.engines.http_engine import HttpEngine
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.sglang.launch import launch as launch_sglang
from millrace.engines.sglang.pair import PAIR as SGLANG_PAIR
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.pair_launch import PairKind
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.engines.vllm.launch import launch as launch_vllm
from millrace.engines.vllm.pair import PAIR as VLLM_PAIR


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One kind of engine. client: the adapter class. launch: starts a server from its config. pair: what prefill and
    decode servers need to be one engine; None if the kind has none."""

    client: type[HttpEngine]
    launch: Callable[[Any, LaunchSpec], Awaitable[Launched]]
    pair: PairKind[Any] | None = None


ENGINE_KINDS: Mapping[str, EngineKind] = {
    "embedded": EngineKind(EmbeddedEngine, launch_embedded),
    "sglang": EngineKind(SGLangEngine, launch_sglang, SGLANG_PAIR),
    "vllm": EngineKind(VLLMEngine, launch_vllm, VLLM_PAIR),
}


async def launch(config: EngineConfig, spec: LaunchSpec) -> Launched:
    """Start one replica, and wait until it is healthy.

    A stock engine runs on the config's interpreter, or on that of the installed environment.

    Raises:
        ConfigError: engine_args or env contradict the settings, or what the engine needs is not installed.
        LaunchError: the engine is not installed, or it did not come up. The message ends with the end of the server's
            log, and no process is left.
    """
    return await ENGINE_KINDS[config.kind].launch(config, spec)
