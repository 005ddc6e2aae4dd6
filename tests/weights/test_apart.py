"""A trainer of two ranks sends parts of its tensors to engines that are apart, and an engine fails meanwhile."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.weights.publisher import ROLLBACK_DEADLINE
from tests.torchrun import run_apart
from tests.weights.apart_ranks import DEADLINE, SECOND
from tests.weights.test_exchange import make_folder

FIRST = "sglang-0"


@pytest.mark.slow
def test_engines_that_fail_do_not_affect_others_and_the_next_version_comes(
    sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    make_folder("dense", folder)
    engine = {"kind": "sglang", "version": "0.5.23", "python": str(sglang_python("0.5.23")), "replicas": 2}
    log = tmp_path / "ranks.log"
    assert run_apart("weights/apart_ranks.py", str(folder), str(tmp_path), json.dumps(engine), log=log) == [0, 0], (
        log.read_text()[-8000:]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    both = found["1"]["exchanged"]
    assert [found[version]["exchanged"] for version in "3468"] == [both // 2, both, both, both // 2]
    assert found["cancelled"]
    for version in "146":
        assert found[version]["failed"] == {}
        assert found[version]["routable"] == [FIRST, SECOND]
    for version in "27":
        assert found[version]["failed"].keys() == {SECOND}
        assert found[version]["routable"] == [FIRST]
    assert both // 2 <= found["2"]["exchanged"] < both  # nothing is sent to it when it is dead
    assert found["2"]["seconds"] < DEADLINE
    assert found["7"]["seconds"] < DEADLINE + ROLLBACK_DEADLINE
    assert found["3"]["members"] == 1
    assert found["held"][0] == found["held"][1]
    assert all(json.loads((tmp_path / f"left-{rank}.json").read_text()) == [] for rank in (0, 1))
