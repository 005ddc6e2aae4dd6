"""The Python API, called wrongly as a newcomer might. Each mistake is one clear error, without a traceback from
inside."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from millrace import EmbeddedEngineConfig, GenerateRequest, LoraConfig, RoutingContext, SamplingParams, open_fleet, sync
from millrace.errors import ArgumentError, ConfigError, MillraceError, NoEngineError, PublishError

REQUEST = GenerateRequest((5, 17, 42), SamplingParams(4, ignore_eos=True), request_id="r")
ADAPTER = LoraConfig(8, 16.0, ("q_proj",))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"config": {"kind": "embeded"}},
            ConfigError,
            "config.kind: .*'embeded'; .*'embedded'. .an example",
        ),
        (
            {"config": {"kind": "embedded", "replicsa": 2}},
            ConfigError,
            "unknown setting config.replicsa; did you mean 'replicas'. .an example",
        ),
        (
            {"config": {"kind": "vllm", "ports": [1, 2]}},
            ConfigError,
            "^config: ports names 2 ports for 1 replicas[^{]*$",
        ),
        ({"config": "embedded"}, ConfigError, "config.*an example of config is EmbeddedEngineConfig"),
        ({"config": None}, ConfigError, "config must be a config such as EmbeddedEngineConfig.*None"),
        ({"model_path": None}, ArgumentError, "model_path must be a path, and is None"),
        ({"model_path": "/nowhere"}, MillraceError, "/nowhere"),
        ({"log_dir": 3}, ArgumentError, "log_dir must be a path"),
        ({"version": "0"}, ArgumentError, "version must be an integer"),
        ({"seed": 0.5}, ArgumentError, "seed must be an integer"),
        ({"restarts": None}, ArgumentError, "restarts must be an integer"),
        ({"sidecars": "http://host:1"}, ArgumentError, "sidecars must be a list"),
        ({"router": "nginx"}, ConfigError, "router.*nginx"),
        ({"router": 3}, ConfigError, "router must be a config"),
        ({"transport": "pigeon"}, ConfigError, "pigeon"),
    ],
)
async def test_wrong_arguments_open_no_fleet(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    given: dict[str, Any] = {"config": EmbeddedEngineConfig(kind="embedded"), "model_path": tiny_model, **changes}
    with pytest.raises(error, match=says):
        async with open_fleet(given.pop("config"), given.pop("model_path"), **{"log_dir": tmp_path, **given}):
            raise AssertionError("it was opened")


async def test_a_fleet_takes_right_arguments_and_names_wrong_ones(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    config = {"kind": "embedded", "threads": 1}
    nan: Any = float("nan")
    wrong: Any
    zero: Any = np.int64(0)
    one: Any = np.int64(1)
    async with open_fleet(config, str(tiny_model), log_dir=str(tmp_path), version=zero) as fleet:
        await fleet.publish(tensors, one)
        assert {span.version for span in (await fleet.generate(REQUEST, deadline=30)).version_spans} == {1}
        for wrong, says in (("hello", "request must be a GenerateRequest, and is 'hello'"), (None, "request must be")):
            with pytest.raises(ArgumentError, match=says):
                await fleet.generate(wrong, deadline=30)
        for wrong in (nan, None, "5"):
            with pytest.raises(ArgumentError, match="deadline must be a number"):
                await fleet.generate(REQUEST, deadline=wrong)
            with pytest.raises(ArgumentError, match="deadline must be a number"):
                await fleet.publish(tensors, 2, deadline=wrong)
        for passed in (0, -1, np.float64(-5.0)):
            with pytest.raises(MillraceError, match="within"):
                await fleet.generate(REQUEST, deadline=passed)
        with pytest.raises(ArgumentError, match="routing must be a RoutingContext"):
            await fleet.generate(REQUEST, deadline=30, routing="session")  # type: ignore[arg-type]
        for wrong in (1.5, "2", True):
            with pytest.raises(PublishError, match="version must be an integer"):
                await fleet.publish(tensors, wrong)
        for wrong in (model, dict(tensors), None, "weights"):
            with pytest.raises(PublishError):
                await fleet.publish(wrong, 2)
        with pytest.raises(ArgumentError, match="config must be a LoraConfig"):
            await fleet.publish_lora(tensors, 2, config={"rank": 8})  # type: ignore[arg-type]
        with pytest.raises(MillraceError, match="JSON"):
            await fleet.generate(
                GenerateRequest((5,), SamplingParams(1), request_id="j", extra={"x": object()}), deadline=30
            )
        assert all(state.routable for state in fleet.snapshot.replicas)

    calls: dict[str, tuple[Any, ...]] = {
        "generate": (REQUEST,), "generate_all": ([REQUEST],), "serving": (), "reached": (1,), "awake": (), "slept": (),
        "resumed": (),
        "publish": (tensors, 3), "publish_lora": (tensors, 3), "restart": ("embedded-0",), "add": (),
        "remove": ("embedded-0",), "preempt": ("embedded-0",), "sleep": (), "wake": (), "restore": (),
    }  # fmt: skip
    public = {name for name, _ in inspect.getmembers(type(fleet), inspect.iscoroutinefunction) if name[0] != "_"}
    assert public == calls.keys() | {"attest"}
    further: dict[str, dict[str, Any]] = {name: {"deadline": 1} for name in ("generate", "serving", "reached")}
    further["generate_all"] = {"deadline": 1}
    further["publish_lora"] = {"config": ADAPTER}
    for name, given in calls.items():
        with pytest.raises(NoEngineError, match="the fleet is closed"):
            await getattr(fleet, name)(*given, **further.get(name, {}))


def test_a_closed_blocking_fleet_says_so(tiny_model: Path, tmp_path: Path) -> None:
    with sync.open_fleet({"kind": "embedded", "threads": 1}, str(tiny_model), log_dir=str(tmp_path)) as fleet:
        assert fleet.generate(REQUEST, deadline=30, routing=RoutingContext(session="s")).output_ids
    for call in (lambda: fleet.generate(REQUEST, deadline=30), lambda: fleet.publish([], 1), fleet.sleep):
        with pytest.raises(NoEngineError, match="the fleet is closed"):
            call()
