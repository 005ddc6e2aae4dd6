"""The settings of a rollout, with verl's own config classes."""

from dataclasses import replace
from typing import Any

import pytest
from verl.workers.config import RolloutConfig

from millrace.config.engines import EmbeddedEngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.errors import ConfigError
from millrace.integrations.verl.settings import engine_of, read_settings


def rollout(engine: Any = None, **settings: Any) -> RolloutConfig:
    custom = {"engine": {"kind": "sglang"} if engine is None else engine, **settings.pop("custom", {})}
    return RolloutConfig(**{"name": "millrace", "tensor_model_parallel_size": 1, "custom": custom, **settings})


def engine(config: RolloutConfig, *, devices: list[str] | None = None, sleeps: bool = True, replicas: int = 2) -> Any:
    return engine_of(read_settings(config), config, replicas=replicas, devices=devices, sleeps=sleeps)


def test_verl_s_settings_are_those_of_sglang() -> None:
    config = rollout(tensor_model_parallel_size=2, max_model_len=4096, gpu_memory_utilization=0.6, max_num_seqs=128)
    assert engine(config, devices=["4", "5", "6", "7"]) == SGLangEngineConfig(
        kind="sglang",
        replicas=2,
        dtype="bfloat16",
        tp_size=2,
        max_running_requests=128,
        mem_fraction_static=0.6,
        memory_saver=True,
        cuda_visible_devices="4,5,6,7",
        engine_args={"context_length": 4096},
    )


def test_verl_s_settings_are_those_of_vllm() -> None:
    config = rollout({"kind": "vllm", "engine_args": {"block_size": 32}}, max_model_len=4096)
    assert engine(config, sleeps=False) == VLLMEngineConfig(
        kind="vllm",
        replicas=2,
        dtype="bfloat16",
        max_running_requests=1024,
        gpu_memory_utilization=0.5,
        sleep_mode=False,
        engine_args={"max_model_len": 4096, "block_size": 32},
    )


def test_the_engine_s_own_settings_take_precedence() -> None:
    config = rollout({"kind": "embedded", "replicas": 3, "dtype": "float32"}, max_model_len=128)
    expected = EmbeddedEngineConfig(kind="embedded", replicas=3, dtype="float32", context_length=128)
    assert engine(config, devices=["0"]) == expected


def test_engines_at_urls_keep_their_own_settings() -> None:
    config = rollout({"kind": "vllm", "urls": ["http://10.0.0.7:8000"]}, tensor_model_parallel_size=4)
    assert engine(config, replicas=2) == VLLMEngineConfig(kind="vllm", urls=("http://10.0.0.7:8000",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(rollout(), custom=None), "rollout.custom.engine is missing"),
        (
            rollout(custom={"retrys": 1}),
            "unknown setting .*custom.retrys; did you mean .retries",
        ),
        (rollout(custom={"publish": {"transport": "disk", "folder": "x"}}), "versions can't be stored"),
        (rollout(data_parallel_size=2), "rollout.data_parallel_size: Millrace runs more replicas instead"),
        (rollout(quantization="fp8"), "rollout.quantization: set custom.engine.engine_args.quantization"),
        (rollout(enable_rollout_routing_replay=True), "rollout.enable_rollout_routing_replay: Millrace returns"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(config: RolloutConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rollout({"kind": "sglan"}), r"rollout\.custom\.engine"),
        (rollout({"kind": "sglang", "tp_size": 2}), "tensor_model_parallel_size is 1, and an engine has 2"),
        (rollout({"kind": "embedded"}, tensor_model_parallel_size=2), "an engine has 1 tensor-parallel ranks"),
    ],
)
def test_engines_that_contradict_verl_s_settings_are_refused(config: RolloutConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(config)
