"""The command line of vLLM: each setting appears once, and engine_args arrive as they were given."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.arguments import Node, option, options
from millrace.engines.vllm.arguments import ENVIRONMENT, OTHERS, SETTINGS, Ports, nodes, rank_gpus
from millrace.engines.vllm.connectors import kept_after_flush, offloads
from millrace.errors import ConfigError


def plan(replica: int = 0, ports: Ports | None = None, visible: str | None = None, **settings: Any) -> tuple[Node, ...]:
    return nodes(
        VLLMEngineConfig(kind="vllm", **settings),
        LaunchSpec(model_path=Path("/models/m"), log_dir=Path("/logs"), replica=replica, seed=100),
        ports=ports or Ports(4000, None, None),
        api_key="the-key",
        admin_key="the-admin-key",
        visible_gpus=visible,
    )


def said(node: Node, name: str) -> str | None:
    """Returns the value that vLLM's parser would take for the option: the last one on the line."""
    values = [argument.removeprefix(f"--{name}=") for argument in node.arguments if argument.startswith(f"--{name}=")]
    return values[-1] if values else None


def test_every_setting_reaches_the_server() -> None:
    (node,) = plan(
        replica=2,
        replicas=3,
        tp_size=2,
        pp_size=2,
        dp_size=2,
        ep_size=4,
        base_gpu_id=1,
        api_servers=3,
        gpu_memory_utilization=0.5,
        kv_cache_memory_bytes=9000,
        max_running_requests=12,
        log_level="warning",
        dtype="float16",
        host="10.0.0.1",
        threads=5,
        env={"NCCL_DEBUG": "INFO"},
    )
    assert set(node.arguments) == {
        "--dtype=float16",
        "--model=/models/m",
        "--seed=102",
        "--host=10.0.0.1",
        "--port=4000",
        "--api-server-count=3",
        "--tensor-parallel-size=2",
        "--pipeline-parallel-size=2",
        "--data-parallel-size=2",
        "--enable-expert-parallel",
        "--max-num-seqs=12",
        "--gpu-memory-utilization=0.5",
        "--kv-cache-memory-bytes=9000",
        "--enable-sleep-mode",
        "--logprobs-mode=processed_logprobs",
        "--generation-config=vllm",
        "--enable-prompt-tokens-details",
        "--worker-extension-cls=millrace_vllm.Extension",
        "--middleware=millrace_vllm_keys.Keys",
        "--disable-uvicorn-access-log",
    }
    assert node.url == "http://10.0.0.1:4000"
    assert node.environment == {
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "17,18,19,20,21,22,23,24",  # they come after the eight GPUs of each of two replicas
        "OMP_NUM_THREADS": "5",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_USE_RUST_FRONTEND": "0",
        "VLLM_API_KEY": "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "MILLRACE_API_KEY": "the-key",
        "MILLRACE_ADMIN_API_KEY": "the-admin-key",
    }


def test_keys_are_in_no_argument_and_not_shown() -> None:
    (node,) = plan(device="cpu")
    assert "the-key" not in " ".join(node.arguments)
    assert "the-key" not in repr(node)
    assert "the-admin-key" not in repr(node)


def test_the_cpu_gets_what_it_needs() -> None:
    (node,) = plan(device="cpu")
    assert {"--enforce-eager", "--distributed-executor-backend=uni", "--kv-cache-memory-bytes=268435456"} <= {
        *node.arguments
    }
    assert "--enable-sleep-mode" not in node.arguments
    assert node.environment["OMP_NUM_THREADS"] == "1"
    assert node.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert node.environment["CUDA_VISIBLE_DEVICES"] == ""
    (several,) = plan(device="cpu", tp_size=2, gpu_memory_utilization=0.1)
    assert said(several, "distributed-executor-backend") is None
    assert said(several, "kv-cache-memory-bytes") is None
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in several.environment


@pytest.mark.parametrize(
    ("settings", "opened"), [({}, None), ({"engine_args": {"enable_lora": True}}, "1"), ({"api_servers": 2}, None)]
)
def test_adapters_can_be_loaded_where_the_server_takes_them(settings: dict[str, Any], opened: str | None) -> None:
    assert plan(**settings)[0].environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == opened
    both = plan(engine_args={"enable_lora": True}, api_servers=2)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in both[0].environment


@pytest.mark.parametrize(
    ("arguments", "places"),
    [({}, None), ({"enable_lora": True}, "3"), ({"enable_lora": True, "max-loras": 5}, "5")],
    ids=["without", "open", "said"],
)
def test_the_server_has_room_for_the_last_adapter_and_a_spare_one(
    arguments: dict[str, Any], places: str | None
) -> None:
    (node,) = plan(device="cpu", engine_args=arguments)
    assert [a.partition("=")[2] for a in node.arguments if a.startswith("--max-loras")] == ([places] if places else [])


def test_without_sleep_mode_the_server_is_started_without_it() -> None:
    assert "--enable-sleep-mode" not in plan(sleep_mode=False)[0].arguments


@pytest.mark.parametrize("spelling", ["enforce_eager", "enforce-eager", "--enforce-eager", "no_enforce_eager"])
def test_engine_args_win_over_the_defaults(spelling: str) -> None:
    (node,) = plan(device="cpu", engine_args={spelling: spelling.startswith("no")})
    assert [a for a in node.arguments if "enforce-eager" in a] == ["--no-enforce-eager"]


def test_routed_experts_are_asked_for() -> None:
    """On the CPU with the runner that returns them, which vLLM does not choose there."""
    gpu, cpu = plan(return_routed_experts=True)[0], plan(return_routed_experts=True, device="cpu")[0]
    assert "--enable-return-routed-experts" in gpu.arguments
    assert "--enable-return-routed-experts" in cpu.arguments
    assert [node.environment.get("VLLM_USE_V2_MODEL_RUNNER") for node in (gpu, cpu)] == [None, "1"]
    assert not [argument for argument in plan()[0].arguments if "routed-experts" in argument]


def test_node_0_publishes_kv_events() -> None:
    ports = Ports(4000, "127.0.0.1:6000", None, "ipc:///dev/shm/x")
    first, second = plan(ports=ports, kv_events=True, nnodes=2, tp_size=2)
    config = {"publisher": "zmq", "endpoint": "ipc:///dev/shm/x", "enable_kv_cache_events": True}
    assert json.loads(said(first, "kv-events-config") or "") == config
    assert said(second, "kv-events-config") is None


@pytest.mark.parametrize("name", ["kv_events_config", "kv-events", "kv-events-config.topic"])
def test_kv_events_that_are_set_twice_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"contradicts engine.kv_events; keep one of them"):
        plan(kv_events=True, engine_args={name: "x"})
    assert said(plan(engine_args={name: "x"})[0], name.replace("_", "-")) == "x"


def test_false_switches_off_and_a_dictionary_is_json() -> None:
    line = options(
        {
            "enable_prefix_caching": False,
            "compilation_config.pass_config.fuse_norm": 1,
            "kv_events_config": {"publisher": "zmq", "a": [1]},
            "max_model_len": None,
            "lora_modules": ["a=/x", "b=/y"],
        },
        off=True,
    )
    assert line == [
        "--no-enable-prefix-caching",
        "--compilation-config.pass_config.fuse_norm=1",  # a name inside of JSON keeps its underscores
        '--kv-events-config={"publisher": "zmq", "a": [1]}',
        "--lora-modules",
        "a=/x",
        "b=/y",
    ]
    assert "--no-enable-prefix-caching" in plan(engine_args={"enable_prefix_caching": False})[0].arguments


@pytest.mark.parametrize("known", sorted(SETTINGS))
@pytest.mark.parametrize("form", ["{}", "no_{}", "{}.inner"])
def test_a_setting_that_is_set_twice_is_refused_with_both_names(known: str, form: str) -> None:
    name = form.format(known.removeprefix("--").replace("-", "_"))
    setting = f"engine.{SETTINGS[known]}"
    with pytest.raises(ConfigError) as error:
        plan(engine_args={name: True})
    assert str(error.value) == f"engine.engine_args.{name} contradicts {setting}; set only {setting}"


@pytest.mark.parametrize("known", sorted(OTHERS))
def test_an_argument_that_only_millrace_sets_is_refused(known: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.engine_args.{known} contradicts "):
        plan(engine_args={known: "x"})


@pytest.mark.parametrize(
    ("abbreviation", "setting"), [("tens", "tp_size"), ("data-parallel-si", "dp_size"), ("max_num_s", "max_running")]
)
def test_an_abbreviation_that_vllms_parser_accepts_is_refused(abbreviation: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"engine_args.{abbreviation} contradicts engine.{setting}"):
        plan(engine_args={abbreviation: 2})


@pytest.mark.parametrize("name", ["max_model_len", "served_model_name", "tokens_only", "middleware", "model_impl"])
def test_other_arguments_pass(name: str) -> None:
    assert f"{option(name)}=x" in plan(engine_args={name: "x"})[0].arguments


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_a_variable_that_repeats_what_millrace_sets_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.env.{name} contradicts "):
        plan(env={name: "1"})


def test_each_node_on_this_host_gets_its_share_of_the_gpus_and_one_answers_http() -> None:
    planned = plan(nnodes=2, tp_size=4, base_gpu_id=2, api_servers=2, ports=Ports(4000, "127.0.0.1:6000", None))
    assert [said(node, "node-rank") for node in planned] == ["0", "1"]
    assert [node.environment["CUDA_VISIBLE_DEVICES"] for node in planned] == ["2,3", "4,5"]
    assert [node.url for node in planned] == ["http://127.0.0.1:4000", None]
    assert [said(node, "port") for node in planned] == ["4000", None]
    assert [said(node, "api-server-count") for node in planned] == ["2", None]
    assert ["--headless" in node.arguments for node in planned] == [False, True]
    assert {said(node, "master-addr") for node in planned} == {"127.0.0.1"}
    assert {said(node, "master-port") for node in planned} == {"6000"}
    assert {said(node, "data-parallel-rpc-port") for node in planned} == {None}
    assert {said(node, "seed") for node in planned} == {"100"}  # ranks of one engine draw the same tokens
    assert {node.environment["VLLM_HOST_IP"] for node in planned} == {"127.0.0.1"}


def test_on_several_hosts_each_starts_its_own_node() -> None:
    (node,) = plan(
        nnodes=2,
        dp_size=8,
        node_rank=1,
        dist_init_addr="10.0.0.1:6000",
        data_parallel_rpc_port=6001,
        ports=Ports(None, "10.0.0.1:6000", 6001),
    )
    assert node.rank == 1
    assert node.url is None
    assert said(node, "master-addr") == "10.0.0.1"
    assert said(node, "data-parallel-rpc-port") == "6001"
    assert node.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"  # four of the eight ranks are on each host
    assert "VLLM_HOST_IP" not in node.environment


@pytest.mark.parametrize(
    ("visible", "settings", "expected"),
    [
        (None, {"tp_size": 2}, "2,3"),
        ("4,5,6,7", {"tp_size": 2}, "6,7"),  # the GPUs that this process may use
        ("4,5,6,7", {"cuda_visible_devices": "GPU-a,GPU-b"}, "GPU-b"),
        (None, {"engine_args": {"prefill_context_parallel_size": 2}}, "2,3"),
    ],
)
def test_the_second_replica_sees_the_gpus_after_those_of_the_first(
    visible: str | None, settings: dict[str, Any], expected: str
) -> None:
    (node,) = plan(replica=1, replicas=2, visible=visible, **settings)
    assert node.environment["CUDA_VISIBLE_DEVICES"] == expected
    config = VLLMEngineConfig(kind="vllm", replicas=2, **settings)
    assert rank_gpus(config, 1, visible) == tuple(expected.split(","))


def test_the_gpu_of_each_rank() -> None:
    two = VLLMEngineConfig(kind="vllm", nnodes=2, tp_size=4, base_gpu_id=2)
    assert rank_gpus(two, 0, "9,8,7, 6,5,4") == ("7", "6", "5", "4")
    there = two.model_copy(update={"node_rank": 0, "dist_init_addr": "10.0.0.1:6000"})
    assert rank_gpus(there, 0, None) == ()  # half of its ranks are on another host
    assert rank_gpus(VLLMEngineConfig(kind="vllm", device="cpu"), 0, None) == ()


def test_too_few_gpus_are_reported_before_the_start() -> None:
    with pytest.raises(ConfigError, match="replica 1 needs the GPUs 2 to 3 of those in .*, which has 3"):
        plan(replica=1, replicas=2, tp_size=2, visible="0,1,2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tp_size": 4, "dp_size": 2, "ep_size": 4},
            "tp_size x dp_size = 8 ranks, or does not spread them .1.; ep_size is 4",
        ),
        ({"tp_size": 4, "dp_size": 2, "nnodes": 3}, "tp_size 4 x pp_size 1 x dp_size 2 can't be split over 3 nodes"),
        ({"dp_size": 2, "nnodes": 2, "node_rank": 0, "dist_init_addr": "a:1"}, "need data_parallel_rpc_port"),
        ({"nnodes": 2, "tp_size": 2, "node_rank": 1}, "needs dist_init_addr"),
        ({"nnodes": 2, "tp_size": 2, "dist_init_addr": "10.0.0.1"}, "dist_init_addr"),
        ({"urls": ("http://a:1",), "python": "/usr/bin/python"}, "give one of them"),
    ],
)
def test_a_config_that_vllm_can_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VLLMEngineConfig(kind="vllm", **settings)


def test_host_memory_for_kv_cache_is_of_all_ranks_of_a_core() -> None:
    (node,) = plan(kv_offload_gb=40, tp_size=2, dp_size=2)
    assert said(node, "kv-offloading-size") == "74.506"  # 80 GB in GiB
    assert said(plan()[0], "kv-offloading-size") is None


def connector(name: str, **extra: object) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize(
    ("transfer", "kept"),
    [
        (connector("OffloadingConnector", cpu_bytes_to_use=1), None),
        (connector("SimpleCPUOffloadConnector"), None),
        (connector("NixlConnector"), None),
        (connector("ExampleConnector"), "ExampleConnector"),
        (connector("LMCacheMPConnector"), "LMCacheMPConnector"),
        (
            connector("OffloadingConnector", spec_name="TieringOffloadingSpec"),
            "OffloadingConnector with TieringOffloadingSpec",
        ),
        (
            connector("MultiConnector", connectors=[connector("NixlConnector"), connector("MooncakeStoreConnector")]),
            "MooncakeStoreConnector",
        ),
    ],
)
def test_a_connector_that_may_keep_old_prefixes_is_refused(transfer: dict[str, Any], kept: str | None) -> None:
    assert kept_after_flush(transfer) == kept
    if kept is None:
        plan(engine_args={"kv_transfer_config": transfer})
    else:
        with pytest.raises(ConfigError, match=f"kv_transfer_config: {kept} keeps prefixes of old weights"):
            plan(engine_args={"kv_transfer_config": transfer})


def test_only_connectors_that_keep_something_offload() -> None:
    assert offloads(connector("OffloadingConnector"))
    assert not offloads(connector("NixlConnector"))
    assert not offloads({})
    with pytest.raises(ConfigError, match=r"kv_transfer_config contradicts engine\.kv_offload_gb"):
        plan(kv_offload_gb=1, engine_args={"kv_transfer_config": connector("NixlConnector")})
