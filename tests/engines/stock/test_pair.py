"""Prefill and decode servers as one replica: their settings, and what each gets of a bucket."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from millrace.buckets import CudaIpcBucket, CudaIpcShare, SharedMemoryBucket
from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig, check_router
from millrace.engines.sglang.arguments import Ports as SGLangPorts
from millrace.engines.sglang.arguments import nodes as sglang_nodes
from millrace.engines.sglang.pair import PAIR as SGLANG
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.pair import shares_of
from millrace.engines.stock.pair_launch import member_configs
from millrace.engines.vllm.arguments import Ports, nodes
from millrace.engines.vllm.pair import PAIR as VLLM
from millrace.errors import ConfigError

MEETING = [7000, 7001, 7002]
ROLES = [("decode", 0), ("decode", 1), ("prefill", 0)]


def vllm(**settings: Any) -> VLLMEngineConfig:
    return VLLMEngineConfig(kind="vllm", **{"prefill_decode": {"prefill": 1, "decode": 2}, **settings})


def sglang(**settings: Any) -> SGLangEngineConfig:
    return SGLangEngineConfig(kind="sglang", **{"prefill_decode": {"prefill": 1, "decode": 2}, **settings})


def spec_of(number: int, ahead: int) -> LaunchSpec:
    return LaunchSpec(model_path=Path("/m"), log_dir=Path("/l"), replica=number, seed=100 + ahead)


def test_each_vllm_has_gpus_a_seed_and_a_side_channel_of_its_own() -> None:
    gpus, seeds, ports = [], [], []
    for replica in range(2):
        members = member_configs(vllm(tp_size=2, replicas=2, base_gpu_id=1), replica, MEETING, VLLM)
        assert [(role, number) for role, number, *_ in members] == ROLES
        for _, number, ahead, one in members:
            given = {"ports": Ports(4000, None, None), "api_key": "k", "admin_key": "a", "visible_gpus": None}
            (node,) = nodes(one, spec_of(number, ahead), **given)  # type: ignore[arg-type]
            gpus.append(node.environment["CUDA_VISIBLE_DEVICES"])
            ports.append(node.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"])
            seeds += [argument for argument in node.arguments if argument.startswith("--seed=")]
            assert any('"kv_connector": "NixlConnector"' in argument for argument in node.arguments)
            assert "--enable-sleep-mode" not in node.arguments
    assert gpus == ["1,2", "3,4", "5,6", "7,8", "9,10", "11,12"]
    assert seeds == [f"--seed={100 + number}" for number in range(6)]
    assert ports == ["7000", "7001", "7002"] * 2


def test_each_sglang_has_gpus_a_seed_a_role_and_a_bootstrap_port_of_its_own() -> None:
    found: dict[str, list[str]] = {}
    for replica in range(2):
        members = member_configs(sglang(tp_size=2, replicas=2, base_gpu_id=1), replica, MEETING, SGLANG)
        assert [(role, number) for role, number, *_ in members] == ROLES
        for _, number, ahead, one in members:
            ports = SGLangPorts((4000,), None, None)
            (node,) = sglang_nodes(one, spec_of(number, ahead), ports=ports, api_key="k", admin_key="a")
            for argument in node.arguments:
                found.setdefault(argument.partition("=")[0], []).append(argument.partition("=")[2])
            assert node.environment["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "86400"
    assert found["--base-gpu-id"] == ["1", "3", "5", "7", "9", "11"]
    assert found["--random-seed"] == [str(100 + number) for number in range(6)]
    assert found["--disaggregation-mode"] == ["decode", "decode", "prefill"] * 2
    assert found["--disaggregation-bootstrap-port"] == ["7000", "7001", "7002"] * 2
    assert found["--disaggregation-transfer-backend"] == ["nixl"] * 6
    assert "--enable-memory-saver" not in found


@pytest.mark.parametrize(("make", "kind"), [(vllm, VLLM), (sglang, SGLANG)], ids=["vllm", "sglang"])
def test_servers_can_share_gpus_that_are_named_twice(make: Any, kind: Any) -> None:
    config = make(cuda_visible_devices="0,1,0,1,2,3", tp_size=2)
    members = member_configs(config, 0, MEETING, kind)
    assert [one.cuda_visible_devices for *_, one in members] == ["0,1", "0,1", "2,3"]
    assert [one.base_gpu_id + number * 2 for _, number, _, one in members] == [0, 0, 0]
    with pytest.raises(ConfigError, match="needs the GPUs 4 to 5 of those in engine.cuda_visible_devices, which has 5"):
        member_configs(make(cuda_visible_devices="0,1,0,1,2", tp_size=2), 0, MEETING, kind)


def test_each_rank_gets_its_own_handle_of_gpu_memory() -> None:
    def share(number: int) -> CudaIpcShare:
        return CudaIpcShare(str(number), b"", 0, 0, b"", 0, b"", event_sync_required=False)

    bucket = CudaIpcBucket(tuple(map(share, range(5))), 8, ())
    parts = [part for part in shares_of(bucket, [2, 2, 1]) if isinstance(part, CudaIpcBucket)]
    assert [[one.device for one in part.shares] for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
    shared = SharedMemoryBucket("/proc/1/fd/2", ())
    assert shares_of(shared, [2, 1]) == [shared, shared]


@pytest.mark.parametrize("make", [vllm, sglang])
@pytest.mark.parametrize(
    "settings",
    [
        {"dp_size": 2},
        {"kv_offload_gb": 1},
        {"kv_events": True},
        {"urls": ("http://a:1",)},
        {"nnodes": 2},
        {"pp_size": 2},
    ],
)
def test_settings_that_do_not_work_with_it_are_refused(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(settings))} does not work with prefill_decode"):
        make(**settings)


def test_a_router_is_refused() -> None:
    for router, config in ((VLLMRouterConfig(kind="vllm"), vllm()), (SGLangRouterConfig(kind="sglang"), sglang())):
        with pytest.raises(ValueError, match=r"a router does not work with engine\.prefill_decode"):
            check_router(router, config)


def test_arguments_that_contradict_it_are_refused() -> None:
    connector = {"kv_transfer_config": {"kv_connector": "NixlConnector"}}
    with pytest.raises(ConfigError, match=r"kv_transfer_config contradicts engine\.prefill_decode"):
        VLLM.check(vllm(engine_args=connector))
    for name in ("disaggregation_mode", "disaggregation-m", "--disaggregation-bootstrap-port"):
        with pytest.raises(ConfigError, match=r"contradicts engine\.prefill_decode"):
            SGLANG.check(sglang(engine_args={name: "decode"}))
    with pytest.raises(ConfigError, match=r"data-parallel attention contradict engine\.prefill_decode"):
        SGLANG.check(sglang(engine_args={"enable_dp_attention": True}))


def test_another_backend_for_sglang_stays() -> None:
    config = sglang(engine_args={"disaggregation_transfer_backend": "mooncake"})
    SGLANG.check(config)
    for *_, one in member_configs(config, 0, MEETING, SGLANG):
        assert one.engine_args["disaggregation_transfer_backend"] == "mooncake"
