"""A trainer of two ranks sends parts of its tensors to engines that are apart, and an engine fails meanwhile."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from millrace.weights.publisher import ROLLBACK_DEADLINE
from tests.torchrun import run_apart
from tests.weights.apart_ranks import DEADLINE
from tests.weights.test_exchange import make_folder


@pytest.mark.slow
def test_engines_that_fail_do_not_affect_others_and_the_next_version_comes(
    sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = {"kind": "sglang", "version": "0.5.23", "python": str(sglang_python("0.5.23")), "threads": 1}
    check_engines_that_fail({**engine, "device": "cpu"}, tmp_path)


def check_engines_that_fail(engine: Mapping[str, Any], place: Path) -> None:
    """Runs the trainer in `place` with two engines of these settings, and checks what it found."""
    first, second = f"{engine['kind']}-0", f"{engine['kind']}-1"
    folder, log = place / "model", place / "ranks.log"
    make_folder("dense", folder)
    arguments = str(folder), str(place), json.dumps({**engine, "replicas": 2}), engine.get("device", "cuda")
    assert run_apart("weights/apart_ranks.py", *arguments, log=log) == [0, 0], log.read_text()[-8000:]
    found = json.loads((place / "found.json").read_text())
    both = found["1"]["exchanged"]
    assert [found[version]["exchanged"] for version in "3468"] == [both // 2, both, both, both // 2]
    assert found["cancelled"]
    for version in "146":
        assert found[version]["failed"] == {}
        assert found[version]["routable"] == [first, second]
    for version in "27":
        assert found[version]["failed"].keys() == {second}
        assert found[version]["routable"] == [first]
    assert both // 2 <= found["2"]["exchanged"] < both  # nothing is sent to it when it is dead
    assert found["2"]["seconds"] < DEADLINE
    assert found["7"]["seconds"] < DEADLINE + ROLLBACK_DEADLINE
    assert found["3"]["members"] == 1
    assert found["held"][0] == found["held"][1]
    assert all(json.loads((place / f"left-{rank}.json").read_text()) == [] for rank in (0, 1))
