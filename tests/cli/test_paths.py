"""Paths on the command line and in calls: `~` and variables are expanded as in the settings."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from millrace import arguments
from millrace.cli import app
from millrace.errors import ArgumentError

MODEL, STORE, FOLDER = ("--model", "{}"), ("--store", "{}"), ("--folder", "{}")
COMMANDS = {
    "train": ("train", "{}"),
    "doctor --model": ("doctor", "http://127.0.0.1:1", *MODEL),
    "doctor --other": ("doctor", "http://127.0.0.1:1", "--other", "{}"),
    "sidecar --store": ("sidecar", *STORE, "--folder", "x"),
    "sidecar --folder": ("sidecar", "--store", "x", *FOLDER),
    "join CONFIG": ("engines", "join", "{}", "--model", "/"),
    "join --model": ("engines", "join", "run.yaml", *MODEL),
    "install --python": ("engines", "install", "sglang", "--cpu", "--python", "{}"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_an_unset_variable_is_reported(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    ended = CliRunner().invoke(app, [part.format("$NOT_SET/x") for part in command], env={"COLUMNS": "200"})
    assert ended.exit_code == 2
    assert "the environment variable NOT_SET in $NOT_SET/x is not set" in ended.output


@pytest.mark.parametrize("written", ["~/my run.yaml", "$PLACE/my run.yaml", "${PLACE}/my run.yaml"])
def test_a_config_path_may_have_a_home_a_variable_and_spaces(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "my run.yaml").write_text("name: found\nengine: {kind: embedded}\ntypo: 1\n")
    ended = CliRunner().invoke(app, ["train", written, "--dry-run"])
    assert f"{tmp_path}/my run.yaml:3: unknown setting typo" in str(ended.exception)


def test_the_python_api_takes_the_same_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("NOT_SET", raising=False)
    for written in ("~/model", Path("~/model"), "$PLACE/model", Path("${PLACE}/model")):
        assert arguments.path("model_path", written) == tmp_path / "model"
    with pytest.raises(ArgumentError, match=r"^model_path: the environment variable NOT_SET in \$NOT_SET/x is not set"):
        arguments.path("model_path", "$NOT_SET/x")
    with pytest.raises(ArgumentError, match="^model_path: the home folder ~no-such-user in .* is not known"):
        arguments.path("model_path", "~no-such-user/x")
