"""The number of engines: fixed, or a range."""

import re
from typing import Any

import pytest

from millrace.config.engines import ReplicaRange
from millrace.errors import ConfigError
from millrace.fleet.local import engine_config


def test_a_number_and_a_range() -> None:
    fixed = engine_config({"kind": "embedded", "replicas": 3})
    assert (fixed.replicas, fixed.first_replicas, fixed.most_replicas, fixed.scale) == (3, 3, 3, None)
    scaled = engine_config({"kind": "sglang", "replicas": {"min": 2, "max": 4}})
    assert scaled.replicas == scaled.scale == ReplicaRange(min=2, max=4, idle_seconds=300.0)
    assert (scaled.first_replicas, scaled.most_replicas) == (2, 4)
    to_zero = engine_config({"kind": "vllm", "replicas": {"min": 0, "max": 1, "idle_seconds": 60}})
    assert (to_zero.first_replicas, to_zero.most_replicas) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 0}, "config.replicas: Input should be greater than 0 (it is 0)"),
        ({"replicas": "many"}, "config.replicas: Input should be a valid integer"),
        ({"replicas": {"min": 3, "max": 1}}, "config.replicas: min is 3 and max is 1; set max to 3 or more"),
        ({"replicas": {"max": 0}}, "config.replicas.max: Input should be greater than 0 (it is 0)"),
        ({"replicas": {"min": -1, "max": 2}}, "config.replicas.min: Input should be greater than or equal to 0"),
        ({"replicas": {"min": 1}}, "the setting config.replicas.max is missing"),
        ({"replicas": {"max": 2, "idle": 5}}, "unknown setting config.replicas.idle; did you mean 'idle_seconds'?"),
        ({"replicas": {"max": 2}, "ports": [1, 2]}, "replicas is a range, and ports is for a fixed number of engines"),
        ({"replicas": {"max": 1}, "urls": ["http://a:1"]}, "leave urls out, or set replicas to a number"),
        ({"kind": "sglang", "replicas": {"max": 2}, "base_gpu_id": 4}, "and base_gpu_id is for a fixed number"),
        ({"kind": "vllm", "replicas": {"max": 2}, "nnodes": 2}, "launched alone; set replicas to 1"),
    ],
)
def test_a_number_that_can_not_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        engine_config({"kind": "embedded"} | changes)
    assert "\n" not in str(refused.value)
