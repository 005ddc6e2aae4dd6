"""Prefill and decode servers as one replica: their settings, and what each gets of a bucket."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from millrace.buckets import CudaIpcBucket, CudaIpcShare, SharedMemoryBucket
from millrace.config.engines import VLLMEngineConfig
from millrace.config.routers import VLLMRouterConfig, check_router
from millrace.engines.spec import LaunchSpec
from millrace.engines.vllm.arguments import Ports, nodes, require_no_contradiction
from millrace.engines.vllm.pair import shares_of
from millrace.engines.vllm.pair_launch import member_configs
from millrace.errors import ConfigError


def config(**settings: Any) -> VLLMEngineConfig:
    return VLLMEngineConfig(kind="vllm", **{"prefill_decode": {"prefill": 1, "decode": 2}, **settings})


def test_each_server_has_gpus_a_seed_and_a_side_channel_of_its_own() -> None:
    gpus, seeds, ports = [], [], []
    for replica in range(2):
        members = member_configs(config(tp_size=2, replicas=2, base_gpu_id=1), replica, [7000, 7001, 7002])
        assert [(role, number) for role, number, *_ in members] == [("decode", 0), ("decode", 1), ("prefill", 0)]
        for _, number, ahead, one in members:
            spec = LaunchSpec(model_path=Path("/m"), log_dir=Path("/l"), replica=number, seed=100 + ahead)
            (node,) = nodes(one, spec, ports=Ports(4000, None, None), api_key="k", admin_key="a", visible_gpus=None)
            gpus.append(node.environment["CUDA_VISIBLE_DEVICES"])
            ports.append(node.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"])
            seeds += [argument for argument in node.arguments if argument.startswith("--seed=")]
            assert any('"kv_connector": "NixlConnector"' in argument for argument in node.arguments)
    assert gpus == ["1,2", "3,4", "5,6", "7,8", "9,10", "11,12"]
    assert seeds == [f"--seed={100 + number}" for number in range(6)]
    assert ports == ["7000", "7001", "7002"] * 2


def test_each_rank_gets_its_own_handle_of_gpu_memory() -> None:
    def share(number: int) -> CudaIpcShare:
        return CudaIpcShare(str(number), b"", 0, 0, b"", 0, b"", event_sync_required=False)

    bucket = CudaIpcBucket(tuple(map(share, range(5))), 8, ())
    parts = [part for part in shares_of(bucket, [2, 2, 1]) if isinstance(part, CudaIpcBucket)]
    assert [[one.device for one in part.shares] for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
    shared = SharedMemoryBucket("/proc/1/fd/2", ())
    assert shares_of(shared, [2, 1]) == [shared, shared]


@pytest.mark.parametrize(
    "settings", [{"dp_size": 2}, {"kv_offload_gb": 1}, {"kv_events": True}, {"urls": ("http://a:1",)}, {"nnodes": 2}]
)
def test_settings_that_do_not_work_with_it_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(settings))} does not work with prefill_decode"):
        config(**settings)


def test_a_router_and_another_connector_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a router does not work with engine\.prefill_decode"):
        check_router(VLLMRouterConfig(kind="vllm"), config())
    connector = {"kv_transfer_config": {"kv_connector": "NixlConnector"}}
    with pytest.raises(ConfigError, match=r"kv_transfer_config contradicts engine\.prefill_decode"):
        require_no_contradiction(config(engine_args=connector))
