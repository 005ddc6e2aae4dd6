"""The settings of an external router."""

from pathlib import Path

import pytest

from millrace.config import load_config
from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig
from millrace.errors import ConfigError
from millrace.routers.start import arguments
from tests.config.test_loading import VALID


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def with_router(path: Path, text: str, engine: str = "embedded") -> Path:
    path.write_text(VALID.replace("kind: embedded", f"kind: {engine}") + text)
    return path


@pytest.mark.parametrize("text", ["router: sglang\n", "router: {kind: sglang}\n", "router:\n  kind: sglang\n"])
def test_a_routers_name_alone_is_enough(path: Path, text: str) -> None:
    assert load_config(with_router(path, text)).router == SGLangRouterConfig(kind="sglang")


def test_a_router_that_drops_what_asks_for_routed_experts_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="router sglang drops the fields that ask for routed experts"):
        load_config(path, ["router=sglang", "engine.kind=sglang", "engine.return_routed_experts=true"])


def test_a_router_may_be_set_by_an_override(path: Path) -> None:
    assert load_config(path, ["router=vllm", "engine.kind=vllm"]).router == VLLMRouterConfig(kind="vllm")
    config = load_config(path, ["router.kind=sglang", "router.fallback=none"]).router
    assert config == SGLangRouterConfig(kind="sglang", fallback="none")


@pytest.mark.parametrize(
    ("engine", "text", "says"),
    [
        ("embedded", "router: vllm\n", "router vllm drops parts of the requests to embedded engines; use sglang"),
        ("vllm", "router: sglang\n",
         "router sglang drops parts of the requests to vllm engines; use vllm, or no router"),
        ("sglang", "router: slang\n", r"router.kind: there is no kind 'slang'.*did you mean 'sglang'\?"),
        ("sglang", "router: {kind: sglang, polcy: manual}\n", r"unknown setting router.polcy; did you mean 'policy'\?"),
        ("sglang", "router: {kind: sglang, policy: kv_aware}\n", "router.policy"),
        ("sglang", "router: {kind: sglang, args: {port: 1}}\n", "args.port is set by Millrace"),
        ("sglang", "router: {kind: sglang, args: {worker-urls: x}}\n", "args.worker_urls is set by Millrace"),
        ("sglang", "router: {kind: sglang, args: {pd_disaggregation: true}}\n",
         "args.pd_disaggregation is not supported: "),
        ("sglang", "router: {kind: sglang, url: 'http://h:1', args: {x: 1}}\n", "url attaches to a running router"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_to_write(path: Path, engine: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(with_router(path, text, engine))


def test_the_config_overrides_our_defaults() -> None:
    config = SGLangRouterConfig(
        kind="sglang", args={"assignment-mode": "random", "disable_retries": False, "cb_failure_threshold": 3}
    )
    line = arguments(config, 81, 82)
    assert line.count("--assignment-mode=random") == 1
    assert "--assignment-mode=min_load" not in line
    assert "--disable-retries" not in line
    assert {"--cb-failure-threshold=3", "--port=81", "--host=127.0.0.1", "--policy=manual"} <= set(line)
    assert "--disable-retries" in arguments(VLLMRouterConfig(kind="vllm"), 81, 82)
