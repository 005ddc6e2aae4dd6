"""The settings of a router of others' that stands between the requests and the engines (docs/routers.md)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from millrace.config.base import ForeignArgument, Model
from millrace.config.paths import LocalPath

# Which engines each can stand before without losing a part of what they are asked.
SERVES: Mapping[str, frozenset[str]] = {
    "sglang": frozenset({"sglang", "embedded"}),
    "vllm": frozenset({"vllm"}),
}
# What Millrace says itself, and what would make something else of the router than one list of engines alike.
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
    """Started from the environment of `millrace engines install`, or by an interpreter that has it (`python`); or one
    that somebody else started (`url`; its key is read from MILLRACE_ROUTER_API_KEY)."""

    python: LocalPath | None = None
    """An interpreter that has the router. None uses the environment that `millrace engines install` made."""
    url: str | None = None
    """A running router to attach to. Its key comes from MILLRACE_ROUTER_API_KEY."""
    fallback: Literal["direct", "none"] = "direct"
    """Where requests go while the router does not answer: straight to the engines, or into an error."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row of a router that ended by itself."""
    start_timeout: PositiveFloat = 30.0
    """Seconds until the router must be healthy."""
    args: dict[str, ForeignArgument] = Field(default_factory=dict)
    """The router's own arguments, by their own names. A dictionary becomes JSON."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.url is not None and (self.args or self.python is not None):
            raise ValueError("url attaches to a router that runs; python and args are for one that is started here")
        names = {name.replace("-", "_") for name in self.args}
        if own := sorted(names & OWN_ARGS):
            raise ValueError(f"args.{own[0]} is Millrace's own to set")
        if others := sorted(names & OTHER_MODES):
            raise ValueError(
                f"args.{others[0]}: Millrace keeps one list of engines alike, and says itself who is in it"
            )
        return self


class SGLangRouterConfig(ForeignRouterConfig):
    """sglang-router. Its cache_aware does not look at token ids; what sticks is `manual`."""

    kind: Literal["sglang"]
    """sglang-router."""
    version: str = "0.3.2"
    """Version of the router."""
    policy: Literal["manual", "cache_aware", "power_of_two", "random", "round_robin"] = "manual"
    """The router's policy. `manual` is sticky; `cache_aware` does not look at token ids."""


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
    """`router: sglang` alone says which one."""
    return {"kind": value} if isinstance(value, str) else value


RouterConfig = Annotated[
    Annotated[SGLangRouterConfig | VLLMRouterConfig, Field(discriminator="kind")], BeforeValidator(by_name)
]


def check_router(router: SGLangRouterConfig | VLLMRouterConfig, engine: str) -> None:
    """Raises ValueError where it can't stand before engines of this kind."""
    if engine not in SERVES[router.kind]:
        able = [kind for kind, engines in SERVES.items() if engine in engines]
        raise ValueError(
            f"router {router.kind} drops a part of what {engine} engines are asked; "
            f"take {' or '.join(able)}, or none: requests then go straight to the engines"
        )
