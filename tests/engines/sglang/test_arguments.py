"""The command line of SGLang: each setting appears once, and engine_args arrive as they were given."""

import argparse
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.sglang.arguments import (
    CPU_DEFAULTS,
    GRPC_PORT,
    OTHERS,
    SETTINGS,
    VISION_CACHE,
    Ports,
    nodes,
    rank_gpus,
)
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.arguments import Node, option, options
from millrace.errors import ConfigError

# Names of SGLang's options that Millrace has no setting for. Each is long enough to be unambiguous.
FREE = st.from_regex(r"x[a-z]{2,8}(_[a-z]{1,8}){0,3}", fullmatch=True)
TEXTS = st.text("abc-=/. {}\"'", min_size=1).filter(lambda text: text != "--")  # argparse takes "--" for itself
SCALARS = st.one_of(st.integers(), st.floats(allow_nan=False), TEXTS, st.booleans())
LISTS = st.lists(st.one_of(st.integers(0, 99), st.from_regex(r"[a-z=/.]{1,9}", fullmatch=True)), min_size=1, max_size=4)


def plan(replica: int = 0, ports: Ports | None = None, **settings: Any) -> tuple[Node, ...]:
    config = SGLangEngineConfig(kind="sglang", **settings)
    count = config.nnodes if config.node_rank is None else 1
    return nodes(
        config,
        LaunchSpec(model_path=Path("/models/m"), log_dir=Path("/logs"), replica=replica, version=7, seed=100),
        ports=ports or Ports(tuple(range(4000, 4000 + count)), 5000, None),
        api_key="the-key",
        admin_key="the-admin-key",
    )


def said(node: Node, name: str) -> str | None:
    """Returns the value that SGLang's parser would take for the option: the last one on the line."""
    values = [argument.removeprefix(f"--{name}=") for argument in node.arguments if argument.startswith(f"--{name}=")]
    return values[-1] if values else None


def test_every_setting_reaches_the_server() -> None:
    (node,) = plan(
        replica=2,
        replicas=3,
        tp_size=4,
        pp_size=2,
        ep_size=2,
        base_gpu_id=1,
        max_total_tokens=9000,
        mem_fraction_static=0.5,
        max_running_requests=12,
        log_level="warning",
        dtype="float16",
        host="10.0.0.1",
        cuda_visible_devices="3,4",
        threads=5,
        env={"NCCL_DEBUG": "INFO"},
    )
    assert set(node.arguments) == {
        "--dtype=float16",
        "--model-path=/models/m",
        "--weight-version=7",
        "--random-seed=102",
        "--device=cuda",
        "--host=10.0.0.1",
        "--port=4000",
        "--nccl-port=5000",
        "--tp-size=4",
        "--pp-size=2",
        "--dp-size=1",
        "--ep-size=2",
        "--nnodes=1",
        "--node-rank=0",
        "--base-gpu-id=17",  # it comes after the eight GPUs of each of two replicas
        "--max-running-requests=12",
        "--cuda-graph-max-bs-decode=12",
        "--custom-weight-loader=millrace_sglang.load",
        "--max-total-tokens=9000",
        "--mem-fraction-static=0.5",
        "--enable-memory-saver",
        "--log-level=warning",
    }
    assert node.url == "http://10.0.0.1:4000"
    assert node.environment == {
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "3,4",
        "OMP_NUM_THREADS": "5",
        VISION_CACHE: "0",
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
    assert said(node, "max-total-tokens") == "65536"
    assert {f"--{name.replace('_', '-')}" for name in CPU_DEFAULTS} <= {a.partition("=")[0] for a in node.arguments}
    assert "--enable-memory-saver" not in node.arguments
    assert node.environment["OMP_NUM_THREADS"] == "1"
    assert node.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert node.environment["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_vision_towers_cache_which_outlives_updates_is_off(device: Literal["cpu", "cuda"]) -> None:
    (node,) = plan(device=device)
    assert node.environment[VISION_CACHE] == "0"


@pytest.mark.parametrize("spelling", ["attention_backend", "attention-backend", "--attention-backend"])
def test_engine_args_win_over_the_defaults_of_the_cpu(spelling: str) -> None:
    (node,) = plan(device="cpu", engine_args={spelling: "intel_amx", "sleep_on_idle": False})
    assert [a for a in node.arguments if a.startswith("--attention-backend")] == ["--attention-backend=intel_amx"]
    assert "--sleep-on-idle" not in node.arguments


@given(st.dictionaries(FREE, st.one_of(SCALARS, LISTS), max_size=6))
def test_engine_args_come_out_of_a_parser_as_they_went_in(values: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, value in values.items():
        if isinstance(value, bool):
            parser.add_argument(option(name), action="store_true")
        elif isinstance(value, list):
            parser.add_argument(option(name), nargs="+")
        else:
            parser.add_argument(option(name), type=type(value))
    (node,) = plan(engine_args=values)
    line = node.arguments[len(plan()[0].arguments) :]
    parsed = vars(parser.parse_args(line))
    expected = {name: [str(v) for v in value] if isinstance(value, list) else value for name, value in values.items()}
    assert parsed == expected


def test_none_and_false_leave_the_engines_own_default() -> None:
    assert options({"a": None, "b": False, "c": True, "no_d": True, "e": 0}) == ["--c", "--no-d", "--e=0"]


def test_routed_experts_are_asked_for() -> None:
    assert "--enable-return-routed-experts" not in plan()[0].arguments
    assert "--enable-return-routed-experts" in plan(return_routed_experts=True)[0].arguments
    overlapping = [plan(return_routed_experts=True, version=version)[0].arguments for version in ("0.5.23", "0.5.15")]
    assert ["--disable-overlap-schedule" in arguments for arguments in overlapping] == [False, True]
    with pytest.raises(ValidationError, match="routed experts of the last pipeline stage only; set pp_size to 1"):
        plan(return_routed_experts=True, pp_size=2)


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"max_running_requests": 300}, "300"),
        ({"max_running_requests": 2000}, "512"),
        ({"max_running_requests": 300, "device": "cpu"}, None),
        ({"max_running_requests": 300, "engine_args": {"cuda_graph_max_bs_decode": 64}}, "64"),
        ({"max_running_requests": 300, "engine_args": {"disable_cuda_graph": True}}, None),
    ],
)
def test_cuda_graphs_are_as_large_as_the_batches(settings: dict[str, Any], largest: str | None) -> None:
    (node,) = plan(**settings)
    assert said(node, "cuda-graph-max-bs-decode") == largest


def test_node_0_publishes_kv_events() -> None:
    ports = Ports((4000, 4001), 5000, "127.0.0.1:6000", "ipc:///dev/shm/x")
    first, second = plan(ports=ports, kv_events=True, nnodes=2, tp_size=2)
    assert json.loads(said(first, "kv-events-config") or "") == {"publisher": "zmq", "endpoint": "ipc:///dev/shm/x"}
    assert said(second, "kv-events-config") is None
    assert said(first, "page-size") == said(second, "page-size") == "64"
    assert said(plan(kv_events=True, engine_args={"page-size": 32})[0], "page-size") == "32"
    assert said(plan(kv_events=True, device="cpu")[0], "page-size") is None  # 0.5.15 dies of it
    assert said(plan()[0], "page-size") is None


def test_kv_events_that_are_set_twice_are_refused() -> None:
    mine = {"publisher": "zmq", "endpoint": "tcp://*:5557"}
    with pytest.raises(ConfigError, match=r"engine_args.kv_events_config contradicts engine.kv_events; keep one"):
        plan(kv_events=True, engine_args={"kv_events_config": mine})
    assert json.loads(said(plan(engine_args={"kv_events_config": mine})[0], "kv-events-config") or "") == mine


def test_kv_events_are_refused_if_they_do_not_separate_adapters_from_the_model() -> None:
    with pytest.raises(
        ConfigError, match=r"KV events of SGLang 0.5.15 do not .*; leave out engine.kv_events, or .* --enable-lora"
    ):
        plan(kv_events=True, version="0.5.15", engine_args={"enable_lora": True})
    assert plan(kv_events=True, version="0.5.15")
    assert plan(kv_events=True, version="0.5.23", engine_args={"enable_lora": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ("http://a:1",)}, "it is not known where an engine at urls publishes"),
        ({"dp_size": 2}, "set replicas instead"),
    ],
)
def test_kv_events_that_could_not_be_read_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SGLangEngineConfig(kind="sglang", kv_events=True, **settings)


@pytest.mark.parametrize("known", sorted(SETTINGS))
def test_a_setting_that_is_set_twice_is_refused_with_both_names(known: str) -> None:
    name = known.removeprefix("--").replace("-", "_")
    setting = f"engine.{SETTINGS[known]}"
    with pytest.raises(ConfigError) as error:
        plan(engine_args={name: 2})
    assert str(error.value) == f"engine.engine_args.{name} contradicts {setting}; set only {setting}"


@pytest.mark.parametrize("known", sorted(OTHERS))
def test_an_argument_that_only_millrace_sets_is_refused(known: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.engine_args.{known} contradicts "):
        plan(engine_args={known: "x"})


@pytest.mark.parametrize(
    ("abbreviation", "setting"), [("tp", "tp_size"), ("dp", "dp_size"), ("tens", "tp_size"), ("log-l", "log_level")]
)
def test_an_abbreviation_that_sglangs_parser_accepts_is_refused(abbreviation: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"engine_args.{abbreviation} contradicts engine.{setting}"):
        plan(engine_args={abbreviation: 2})


@pytest.mark.parametrize("name", ["skip_tokenizer_init", "log_level_http", "tokenizer_path", "device_x", "max_total"])
def test_other_arguments_pass(name: str) -> None:
    if name == "max_total":  # the beginning of a setting's option counts as that option
        with pytest.raises(ConfigError):
            plan(engine_args={name: True})
    else:
        assert option(name) in plan(engine_args={name: True})[0].arguments


def test_one_argument_in_two_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine_args.lora-paths and engine.engine_args.lora_paths are the same"):
        plan(engine_args={"lora_paths": "a=/x", "lora-paths": "b=/y"})


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE", VISION_CACHE])
def test_a_variable_that_repeats_a_setting_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.env.{name} contradicts "):
        plan(env={name: "1"})


def test_each_node_on_this_host_gets_its_share_of_the_gpus() -> None:
    planned = plan(nnodes=2, tp_size=8, base_gpu_id=2, ports=Ports((4000, 4001), 5000, "127.0.0.1:6000"))
    assert [said(node, "node-rank") for node in planned] == ["0", "1"]
    assert [said(node, "base-gpu-id") for node in planned] == ["2", "6"]
    assert [said(node, "port") for node in planned] == ["4000", "4001"]
    assert {said(node, "dist-init-addr") for node in planned} == {"127.0.0.1:6000"}
    assert {said(node, "random-seed") for node in planned} == {"100"}


def test_on_several_hosts_each_starts_its_own_node() -> None:
    ports = Ports((4000,), 5000, "10.0.0.1:6000")
    (node,) = plan(nnodes=2, tp_size=8, node_rank=1, dist_init_addr="10.0.0.1:6000", ports=ports)
    assert node.rank == 1
    assert said(node, "node-rank") == "1"
    assert said(node, "base-gpu-id") == "0"
    assert said(node, "dist-init-addr") == "10.0.0.1:6000"


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({"tp_size": 2, "dp_size": 2}, 4),
        ({"tp_size": 2, "dp_size": 2, "engine_args": {"enable_dp_attention": True}}, 2),
        ({"tp_size": 2, "dp_size": 2, "engine_args": {"attn-dp-size": 2}}, 2),
        ({"tp_size": 2, "pp_size": 3}, 6),
        ({"tp_size": 2, "engine_args": {"gpu_id_step": 2}}, 4),
    ],
)
def test_the_second_replica_starts_after_the_gpus_of_the_first(settings: dict[str, Any], gpus: int) -> None:
    (node,) = plan(replica=1, replicas=2, **settings)
    assert said(node, "base-gpu-id") == str(gpus)


@pytest.mark.parametrize(
    ("visible", "settings", "expected"),
    [
        (None, {}, ("1",)),
        (None, {"tp_size": 2, "base_gpu_id": 1}, ("3", "4")),
        (None, {"tp_size": 2, "engine_args": {"gpu_id_step": 2}}, ("4", "6")),
        (None, {"tp_size": 2, "dp_size": 2, "engine_args": {"enable_dp_attention": True}}, ("2", "3")),
        ("4,5, 6,7", {"tp_size": 2}, ("6", "7")),
        ("4,5", {"cuda_visible_devices": "GPU-a,GPU-b"}, ("GPU-b",)),
        ("4", {}, ()),  # the server will find that there are too few
        (None, {"dp_size": 2}, ()),
        (None, {"pp_size": 2}, ()),
        (None, {"device": "cpu"}, ()),
    ],
)
def test_the_gpu_of_each_rank_of_the_second_replica(
    visible: str | None, settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    config = SGLangEngineConfig(kind="sglang", replicas=2, **settings)
    assert rank_gpus(config, 1, visible) == expected


def test_the_gpus_of_an_engine_over_several_nodes() -> None:
    config = SGLangEngineConfig(kind="sglang", nnodes=2, tp_size=4, base_gpu_id=2)
    assert rank_gpus(config, 0, None) == ("2", "3", "4", "5")
    there = config.model_copy(update={"node_rank": 0, "dist_init_addr": "10.0.0.1:6000"})
    assert rank_gpus(there, 0, None) == ()


def test_on_the_cpu_every_replica_has_the_same_numa_nodes() -> None:
    (node,) = plan(replica=1, replicas=2, device="cpu")
    assert said(node, "base-gpu-id") == "0"


def test_host_memory_for_kv_cache_is_of_each_rank() -> None:
    (node,) = plan(kv_offload_gb=40, tp_size=2, engine_args={"hicache_write_policy": "write_back"})
    assert {"--enable-hierarchical-cache", "--hicache-size=40", "--hicache-write-policy=write_back"} <= {
        *node.arguments
    }
    assert not [argument for argument in plan()[0].arguments if "hi" in argument and "cache" in argument]


@pytest.mark.parametrize("name", ["hicache_storage_backend", "enable_lmcache", "enable_flexkv"])
def test_caches_that_a_flush_does_not_reach_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} contradicts the publishes, which can't drop the prefixes"):
        plan(engine_args={name: "file"})


@pytest.mark.parametrize("port", [1024, 55_535, 55_536, 65_535])
def test_every_port_of_0515_leaves_one_for_grpc(port: int) -> None:
    (node,) = plan(ports=Ports((port,), 5000, None), version="0.5.15")
    assert 1 <= int(node.environment.get(GRPC_PORT, port + 10_000)) <= 65_535


def test_a_port_for_grpc_in_the_config_is_kept() -> None:
    (node,) = plan(ports=Ports((60_000,), 5000, None), version="0.5.15", env={GRPC_PORT: "4711"})
    assert node.environment[GRPC_PORT] == "4711"


def test_no_variable_switches_grpc_on_in_0523() -> None:
    (node,) = plan(ports=Ports((60_000,), 5000, None), version="0.5.23")
    assert GRPC_PORT not in node.environment
