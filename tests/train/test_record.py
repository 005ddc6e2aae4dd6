"""What a run that goes on from a checkpoint keeps of its records."""

from pathlib import Path

import orjson
import pytest

from millrace.config import load_config
from millrace.errors import ConfigError
from millrace.train.record import RunFolder
from tests.config.test_loading import VALID


def test_what_lies_behind_the_checkpoint_is_dropped_by_one_rank_alone(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}", "name=run"])
    run = tmp_path / "run"
    run.mkdir()
    names = ("metrics.jsonl", "samples.jsonl", "samples-1.jsonl")
    for name in names:
        (run / name).write_bytes(b"".join(orjson.dumps({"step": step}) + b"\n" for step in (1, 2, 3)))

    def steps() -> list[list[int]]:
        return [[orjson.loads(line)["step"] for line in (run / name).read_bytes().splitlines()] for name in names]

    # Two ranks that rewrote one file at once would leave it empty: one reads what the other has just truncated.
    RunFolder(config, resume=True, rank=1).forget_after(2)
    assert steps() == [[1, 2, 3]] * 3
    RunFolder(config, resume=True).forget_after(2)
    assert steps() == [[1, 2]] * 3


def test_a_run_that_is_resumed_keeps_its_model(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    same = [f"output_dir={tmp_path}", "name=run"]
    config = load_config(tmp_path / "run.yaml", same)
    with RunFolder(config, resume=False).create():
        (tmp_path / "run" / "metrics.jsonl").touch()
    with RunFolder(config, resume=True).create():
        pass
    other = load_config(tmp_path / "run.yaml", [*same, "model.layers=7"])
    with pytest.raises(ConfigError, match="can't have another .*'layers': 7"), RunFolder(other, resume=True).create():
        pass
    assert "layers: 7" not in (tmp_path / "run" / "config.yaml").read_text()
