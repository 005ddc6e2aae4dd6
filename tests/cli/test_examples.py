"""`millrace examples` lists and copies what comes with Millrace."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from millrace.cli import app
from millrace.cli.examples import CLONED
from millrace.config.loading import load_config
from millrace.errors import ConfigError


def test_examples_are_listed_with_their_first_sentence() -> None:
    listed = CliRunner().invoke(app, ["examples"]).output
    names = sorted(path.name for path in CLONED.iterdir() if path.is_dir())
    assert [line.split()[0] for line in listed.splitlines() if line[:1] not in ("", " ")][: len(names)] == names
    assert "GRPO with rewards of your own" in listed


def test_a_copy_has_what_its_settings_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["examples", "own_reward", "--to", str(tmp_path)])
    copy = tmp_path / "own_reward"
    assert f"millrace train {copy / 'run.yaml'}" in done.output.splitlines()
    assert load_config(copy / "run.yaml").name
    assert {path.name for path in copy.iterdir()} == {path.name for path in (CLONED / "own_reward").glob("*.*")}


def test_what_can_not_be_copied_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "trl").mkdir()
    for name, says in (("trl", "trl exists; name another folder by --to"), ("none", "there is no example 'none'")):
        with pytest.raises(ConfigError, match=says):
            CliRunner().invoke(app, ["examples", name, "--to", str(tmp_path)], catch_exceptions=False)
