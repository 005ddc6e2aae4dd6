"""The records that a resumed run keeps."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.config import dump_config, load_config
from millrace.errors import ConfigError, DataError
from millrace.fleet.event_log import EventLog
from millrace.jsonl import drop_torn_tail, read_objects
from millrace.train.changes import changed_settings
from millrace.train.record import RunFolder, model_of, settings_of
from millrace.train.sample_files import file_name, sample_files
from tests.config.test_loading import VALID


def test_one_rank_alone_drops_the_records_after_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}", "name=run"])
    run = tmp_path / "run"
    run.mkdir()
    names = ("metrics.jsonl", "advice.jsonl")
    for name in names:
        (run / name).write_bytes(b"".join(orjson.dumps({"step": step}) + b"\n" for step in (1, 2, 3)))
    (run / "samples").mkdir()
    files = [file_name(step, rank) for step in (1, 2, 3) for rank in (0, 1)]
    for file in (*files, "step-000002.partial", "my notes.txt"):
        (run / "samples" / file).touch()

    def steps() -> list[list[int]]:
        return [[orjson.loads(line)["step"] for line in (run / name).read_bytes().splitlines()] for name in names]

    # If two ranks rewrote one file at once, they would leave it empty: one reads what the other has just truncated.
    RunFolder(config, resume=True, rank=1).forget_after(2)
    assert steps() == [[1, 2, 3]] * 2
    assert [path.name for path in sample_files(run)] == files
    RunFolder(config, resume=True).forget_after(2)
    assert steps() == [[1, 2]] * 2
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["my notes.txt", *sorted(files[:4])]


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


RECORDS = b"".join(orjson.dumps({"step": step, "text": "ü" * 5}) + b"\n" for step in (1, 2, 3))


@given(cut=st.integers(0, len(RECORDS)), nuls=st.integers(0, 5000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_torn_tail_is_dropped_and_nothing_before_it(cut: int, nuls: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(RECORDS[:cut] + b"\0" * nuls)
    drop_torn_tail(path)
    kept = path.read_bytes()
    assert RECORDS.startswith(kept)
    assert len(kept) >= RECORDS.rfind(b"\n", 0, cut) + 1
    assert [record["step"] for _, record in read_objects(path, "step")] == [1, 2, 3][: kept.count(b"\n")]
    before = path.stat().st_mtime_ns
    drop_torn_tail(path)
    assert path.stat().st_mtime_ns == before


def test_a_run_goes_on_with_torn_files_and_says_what_it_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}", "name=run"])
    (tmp_path / "run").mkdir()
    names = ("metrics.jsonl", "advice.jsonl", "events.jsonl")
    for name in names:
        (tmp_path / "run" / name).write_bytes(RECORDS + b'{"step": 3, "w' + b"\0" * 9)
    with RunFolder(config, resume=True).create(), closing(EventLog(tmp_path / "run" / "events.jsonl")):
        RunFolder(config, resume=True).forget_after(3)
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == RECORDS
        assert any(f"{name}: the end of the file was torn; dropped 23 bytes" in text for text in caplog.messages)


@pytest.mark.parametrize("damage", [b'{"step": 2, "te', b"\0\0\0", b"[1]", b'{"no": 1}'])
def test_a_damaged_middle_is_an_error_with_its_place(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}", "name=run"])
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=rf"{path}:2: the line is damaged"):
        RunFolder(config, resume=True).forget_after(3)
    assert path.read_bytes() == b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'


def test_settings_cut_anywhere_give_the_right_model_or_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    content = dump_config(load_config(tmp_path / "run.yaml")).encode()
    model = model_of(settings_of(content))
    assert isinstance(model, dict)
    assert model["kind"] == "tiny"
    cuts = [*range(0, len(content) - 1, 13), len(content) - 1]  # reading all 3,000 takes a minute
    found = [model_of(settings_of(content[:cut] + nuls)) for cut in cuts for nuls in (b"", b"\0" * 7)]
    assert all(one is None or one == model for one in found)
    assert found[0] is None
    assert found[-1] == model


def resumed(folder: Path, *overrides: str) -> Sequence[str]:
    (folder / "run.yaml").write_text(VALID)
    config = load_config(folder / "run.yaml", [f"output_dir={folder}", "name=run", *overrides])
    exists = (folder / "run").exists()
    with RunFolder(config, resume=exists).create() as changed:
        (folder / "run" / "metrics.jsonl").touch()
        return changed


def test_a_resumed_run_names_each_changed_setting(tmp_path: Path) -> None:
    assert resumed(tmp_path, "engine={kind: vllm, env: {KEY: SECRET, SAME: a}}") == ()
    assert resumed(tmp_path, "engine={kind: vllm, env: {KEY: SECRET, SAME: a}}") == []
    other = ["engine={kind: vllm, env: {KEY: OTHER, SAME: a}}", "train.lr=2e-3", "trackers=[wandb]"]
    said = resumed(tmp_path, *other)
    assert said == ["engine.env.KEY: *** -> ***", "train.lr: 0.001 -> 0.002", 'trackers.kinds: [] -> ["wandb"]']
    assert resumed(tmp_path, *other) == []  # it is asked what changed since the last start
    back = resumed(tmp_path)
    assert "engine.kind: vllm -> embedded" in back
    assert "engine.env.KEY: *** -> not set" in back
    assert not any("SECRET" in line or "OTHER" in line for line in [*said, *back])


def test_passwords_in_urls_are_not_shown() -> None:
    before = {"folder": "s3://me:SECRET@host/a", "urls": ["http://u:SECRET@h:1"], "long": "x" * 999}
    now = {"folder": "s3://me:SECRET@host/b", "urls": ["http://h:1"], "long": "y" * 999}
    folder, urls, long = changed_settings(before, now)
    assert folder == "folder: s3://***@host/a -> s3://***@host/b"
    assert urls == 'urls: ["http://***@h:1"] -> ["http://h:1"]'
    assert len(long) < 500


def test_a_run_goes_on_without_its_torn_copy_of_the_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}", "name=run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "config.yaml").write_bytes(b"name: run\nmodel:\n  kind: ti")
    with RunFolder(config, resume=True).create():
        assert load_config(tmp_path / "run" / "config.yaml") == config
    assert "config.yaml is torn" in caplog.text
