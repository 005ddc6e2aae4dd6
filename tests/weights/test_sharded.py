"""A trainer of two ranks with sharded tensors publishes them to an engine."""

import json
from pathlib import Path

from tests.torchrun import run_two_ranks


def test_rank_0_publishes_all_shards_and_the_other_ranks_follow_it(tiny_model: Path, tmp_path: Path) -> None:
    """This also holds if rank 0 goes through the tensors twice, or gives up half-way."""
    run_two_ranks("weights/two_shards.py", str(tiny_model), str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["share"] < 0.9
    assert found["shapes"].keys() == found["sent"].keys()
    assert found["first"] == found["sent"]
    assert "no engine took version 2" in found["refused"]
    assert found["third"] == found["sent"]
    assert found["version"] == 3
    assert found["not finite"].startswith(f"{found['spoilt']} has NaN")
