"""Code by path: what is loaded, and the one line for what can't be."""

import sys
from pathlib import Path

import pytest

from millrace.config.tasks import CodeConfig
from millrace.errors import ConfigError
from millrace.rollout.user_code import load_code, place

CODE = """
from dataclasses import dataclass
import neighbour

@dataclass
class Point:
    x: int = neighbour.ONE

def length(answer):
    return len(answer)

def is_short(answer):
    return length(answer) < 10

count = 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(CODE)
    (tmp_path / "neighbour.py").write_text("ONE = 1")
    return tmp_path


def test_a_file_is_loaded_once_with_its_neighbours(folder: Path) -> None:
    path = str(folder / "rewards.py")
    length, short = (load_code(path, name, "reward") for name in ("length", "is_short"))
    assert (length("abc"), short("abc")) == (3, True)
    assert length.__globals__ is short.__globals__
    assert load_code(path, "Point", "reward")().x == 1


def test_a_module_is_imported() -> None:
    config = CodeConfig.model_validate("millrace.rollout.reward:gsm8k")
    assert load_code(config.path, config.name, "reward").__name__ == "gsm8k"
    assert place(config.path, config.name) == "millrace.rollout.reward:gsm8k"


def test_a_module_may_be_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards").mkdir()
    (tmp_path / "own_rewards" / "__init__.py").write_text("def f():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert load_code("own_rewards", "f", "reward")() == 3


@pytest.mark.parametrize(
    ("file", "content", "name", "says"),
    [
        ("none.py", None, "f", "reward: {folder}/none.py: there is no such file beside the config or in the current"),
        (
            "no.such.module",
            None,
            "f",
            "reward: no.such.module is no importable module: it is neither installed nor in the",
        ),
        ("rewards.py", None, "lenght", "reward: {folder}/rewards.py has no 'lenght'; did you mean 'length'?"),
        ("broken.py", "def f(:\n", "f", "reward: {folder}/broken.py:1: invalid syntax"),
        ("raising.py", "\nx = 1 / 0\n", "f", "can't be imported: ZeroDivisionError: division by zero (raising.py:2)"),
        ("needing.py", "import no_such", "f", "ModuleNotFoundError: No module named 'no_such' (needing.py:1)"),
        ("exiting.py", "import sys\nsys.exit(3)", "f", "can't be imported: SystemExit: 3 (exiting.py:2)"),
    ],
)
def test_what_cant_be_loaded_is_one_line(folder: Path, file: str, content: str | None, name: str, says: str) -> None:
    if content is not None:
        (folder / file).write_text(content)
    path = str(folder / file) if file.endswith(".py") else file
    with pytest.raises(ConfigError) as raised:
        load_code(path, name, "reward")
    assert says.format(folder=folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_was_put_right_is_loaded_again(folder: Path) -> None:
    (folder / "late.py").write_text("raise ValueError")
    config = CodeConfig(path=str(folder / "late.py"), name="f")
    with pytest.raises(ConfigError, match="ValueError"):
        load_code(config.path, config.name, "reward")
    (folder / "late.py").write_text("f = len")
    assert load_code(config.path, config.name, "reward") is len
