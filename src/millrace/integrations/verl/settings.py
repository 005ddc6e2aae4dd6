"""The settings of a Millrace rollout in verl: `actor_rollout_ref.rollout.custom`, and what verl's own settings add."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError, field_validator

from millrace.config.base import Model
from millrace.config.engines import EmbeddedEngineConfig, EngineConfig
from millrace.config.explain import explain
from millrace.config.models import PublishConfig
from millrace.config.paths import LocalPath
from millrace.errors import ConfigError

WHERE = "actor_rollout_ref.rollout"
TRANSPORTS_THAT_STORE = ("disk", "delta")


class RolloutSettings(Model):
    """The settings below `actor_rollout_ref.rollout.custom`."""

    engine: dict[str, Any]
    """The engines, with the settings of `millrace.open_fleet`. verl's own settings are the defaults of some of them
    (`engine_of`)."""
    publish: PublishConfig = PublishConfig()
    """How new weights reach the engines."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row Millrace restarts an engine that died or hangs."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How many engine failures one generation survives."""
    timeout: PositiveFloat = 600.0
    """Seconds for one generation, the wait for an engine included."""
    log_dir: LocalPath | None = None
    """Folder of the engines' logs. None is a folder below the system's folder for temporary files."""

    @field_validator("publish")
    @classmethod
    def _check_publish(cls, publish: PublishConfig) -> PublishConfig:
        if publish.folder is not None or publish.transport in TRANSPORTS_THAT_STORE:
            raise ValueError("versions can't be stored (folder, disk, delta), since verl gives each tensor only once")
        return publish


def read_settings(rollout: Any) -> RolloutSettings:
    """Return the settings of a rollout. Raises ConfigError if they are invalid or verl's need what Millrace has not.

    rollout: verl's RolloutConfig.
    """
    for is_set, name, reason in REFUSED:
        if is_set(rollout):
            raise ConfigError(f"{WHERE}.{name}: {reason}")
    custom = _plain(rollout.custom)
    if not isinstance(custom, Mapping) or "engine" not in custom:
        raise ConfigError(
            f"{WHERE}.custom.engine is missing; name the engines, for example +{WHERE}.custom.engine.kind=sglang"
        )
    try:
        return RolloutSettings.model_validate(custom)
    except ValidationError as error:
        raise ConfigError(explain(error.errors()[0], RolloutSettings, (WHERE, "custom"))[1]) from None


REFUSED: Sequence[tuple[Callable[[Any], bool], str, str]] = (
    (lambda r: r.data_parallel_size > 1, "data_parallel_size", "Millrace runs more replicas instead; leave it at 1"),
    (lambda r: r.expert_parallel_size > 1, "expert_parallel_size", "set custom.engine.ep_size instead"),
    (
        lambda r: r.pipeline_model_parallel_size > 1,
        "pipeline_model_parallel_size",
        "leave it at 1",
    ),
    (lambda r: bool(r.quantization), "quantization", "set custom.engine.engine_args.quantization instead"),
    (lambda r: r.enable_rollout_routing_replay, "enable_rollout_routing_replay", "Millrace returns no routed experts"),
    (lambda r: r.mtp.enable_rollout, "mtp.enable_rollout", "set speculative decoding in custom.engine.engine_args"),
    (lambda r: bool((r.qat or {}).get("enable")), "qat", "Millrace publishes no quantised weights"),
    (lambda r: r.prometheus.enable, "prometheus.enable", "the engines have metrics of their own; leave it out"),
)
"""Settings of verl that would be ignored: whether one is set, its name, and what to do."""


def engine_of(
    settings: RolloutSettings, rollout: Any, *, replicas: int, devices: Sequence[str] | None, sleeps: bool
) -> EngineConfig:
    """Return the config of the engines. Raises ConfigError if it is invalid, or contradicts verl's settings.

    Args:
        settings: The settings below `custom`.
        rollout: verl's RolloutConfig.
        replicas: The number of verl's replicas.
        devices: The GPUs of all replicas, in their order; None without GPUs.
        sleeps: Whether the engines lend their memory to the trainer.
    """
    given, tp_size = settings.engine, rollout.tensor_model_parallel_size
    attached = given.get("urls") is not None
    if attached:
        defaults: dict[str, Any] = {"replicas": len(given["urls"])}
    else:
        defaults = {"replicas": replicas, "dtype": rollout.dtype, **_defaults(given, rollout, devices, sleeps)}
    whole = defaults | given
    if arguments := {**defaults.get("engine_args", {}), **given.get("engine_args", {})}:
        whole["engine_args"] = arguments
    try:
        engine: EngineConfig = TypeAdapter(EngineConfig).validate_python(whole)
    except ValidationError as error:
        raise ConfigError(explain(error.errors()[0], EngineConfig, (WHERE, "custom", "engine"))[1]) from None
    if engine.scale is not None:
        raise ConfigError(
            f"{WHERE}.custom.engine.replicas is a range, and verl's number of replicas is fixed; leave it out"
        )
    engine_tp = 1 if isinstance(engine, EmbeddedEngineConfig) else engine.tp_size
    if engine_tp != tp_size and not attached:
        raise ConfigError(
            f"{WHERE}.tensor_model_parallel_size is {tp_size}, and an engine has {engine_tp} tensor-parallel ranks; "
            "set both to the same number"
        )
    return engine


def _defaults(given: Mapping[str, Any], rollout: Any, devices: Sequence[str] | None, sleeps: bool) -> dict[str, Any]:
    """Return the settings of the engines that follow from verl's, for engines that are started here."""
    length = rollout.max_model_len
    if given.get("kind") == "embedded":
        return {} if length is None else {"context_length": length}
    if given.get("kind") not in ("sglang", "vllm"):
        return {}
    found: dict[str, Any] = {
        "tp_size": rollout.tensor_model_parallel_size,
        "max_running_requests": rollout.max_num_seqs,
    }
    is_sglang = given["kind"] == "sglang"
    if given.get("device", "cuda") == "cuda":
        found["mem_fraction_static" if is_sglang else "gpu_memory_utilization"] = rollout.gpu_memory_utilization
        found["memory_saver" if is_sglang else "sleep_mode"] = sleeps
        if devices is not None:
            found["cuda_visible_devices"] = ",".join(devices)
    if length is not None:
        found["engine_args"] = {"context_length" if is_sglang else "max_model_len": length}
    return found


def _plain(value: Any) -> Any:
    """Return OmegaConf's containers as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
