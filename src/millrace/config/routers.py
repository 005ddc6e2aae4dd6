"""The settings of an external router between the requests and the engines (docs/routers.md)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from millrace.config.base import ForeignArgument, Model
from millrace.config.engines import EngineConfig, SGLangEngineConfig, StockEngineConfig
from millrace.config.paths import LocalPath

# The kinds of engines that each router can serve without dropping parts of the requests.
SERVES: Mapping[str, frozenset[str]] = {
    "sglang": frozenset({"sglang", "embedded"}),
    "vllm": frozenset({"vllm"}),
}
# Arguments that Millrace sets, and arguments of modes in which the router has more than one list of equal engines.
OWN_ARGS = frozenset({"host", "port", "policy", "api_key", "worker_urls"})
OTHER_MODES = frozenset({
    "control_plane_api_keys",
    "decode",
    "dp_aware",
    "enable_igw",
    "enable_program_scheduling",
    "intra_node_data_parallel_size",
    "mini_lb",
    "pd_disaggregation",
    "prefill",
    "service_discovery",
    "tls_cert_path",
    "vllm_discovery_address",
    "vllm_pd_disaggregation",
})  # fmt: skip


class ForeignRouterConfig(Model):
    """The settings that all external routers share.

    Millrace starts the router from the environment that `millrace engines install` made, or with the interpreter
    `python`. With `url` it attaches to a running router instead, whose key is read from MILLRACE_ROUTER_API_KEY.
    """

    python: LocalPath | None = None
    """A Python interpreter with the router installed. None uses the environment that `millrace engines install`
    made."""
    url: str | None = None
    """A running router to attach to. Its key comes from MILLRACE_ROUTER_API_KEY."""
    fallback: Literal["direct", "none"] = "direct"
    """What happens to requests while the router does not answer. `direct` sends them straight to the engines, `none`
    fails them."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row Millrace restarts a router that exited."""
    start_timeout: PositiveFloat = 30.0
    """Seconds until the router must be healthy."""
    args: dict[str, ForeignArgument] = Field(default_factory=dict)
    """Further arguments of the router, by the router's names for them. A dictionary becomes JSON."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.url is not None and (self.args or self.python is not None):
            raise ValueError("url attaches to a running router; python and args are for a router that Millrace starts")
        names = {name.replace("-", "_") for name in self.args}
        if own := sorted(names & OWN_ARGS):
            raise ValueError(f"args.{own[0]} is set by Millrace")
        if others := sorted(names & OTHER_MODES):
            raise ValueError(
                f"args.{others[0]} is not supported: the router must have one list of equal engines, which Millrace "
                "maintains"
            )
        return self


class SGLangRouterConfig(ForeignRouterConfig):
    """sglang-router. Its policy `cache_aware` ignores token ids; the policy with session affinity is `manual`."""

    kind: Literal["sglang"]
    """sglang-router."""
    version: str = "0.3.2"
    """Version of the router."""
    policy: Literal["manual", "cache_aware", "power_of_two", "random", "round_robin"] = "manual"
    """The router's policy. `manual` sends a session to the same engine each time. `cache_aware` ignores token ids."""


class VLLMRouterConfig(ForeignRouterConfig):
    """vllm-router."""

    kind: Literal["vllm"]
    """vllm-router."""
    version: str = "0.1.17"
    """Version of the router."""
    policy: Literal[
        "consistent_hash", "cache_aware", "kv_aware", "power_of_two", "random", "round_robin", "sticky_least_loaded"
    ] = "consistent_hash"
    """The router's policy."""


def by_name(value: Any) -> Any:
    """Expand the short form `router: sglang` to `router: {kind: sglang}`."""
    return {"kind": value} if isinstance(value, str) else value


RouterConfig = Annotated[
    Annotated[SGLangRouterConfig | VLLMRouterConfig, Field(discriminator="kind")], BeforeValidator(by_name)
]


def check_router(router: SGLangRouterConfig | VLLMRouterConfig, engine: EngineConfig) -> None:
    """Raise ValueError if the router can't serve engines with these settings."""
    if isinstance(engine, SGLangEngineConfig) and engine.return_routed_experts:
        raise ValueError(
            f"router {router.kind} drops the fields that ask for routed experts; leave out "
            "engine.return_routed_experts, or the router: requests then go straight to the engines"
        )
    if isinstance(engine, StockEngineConfig) and engine.prefill_decode is not None:
        raise ValueError("a router does not work with engine.prefill_decode, whose requests Millrace sends itself")
    if engine.kind not in SERVES[router.kind]:
        able = [kind for kind, engines in SERVES.items() if engine.kind in engines]
        raise ValueError(
            f"router {router.kind} drops parts of the requests to {engine.kind} engines; "
            f"use {' or '.join(able)}, or no router: requests then go straight to the engines"
        )
