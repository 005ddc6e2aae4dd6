"""Interpreters as users name them. Each one that can't run the engine ends in one message that names the setting."""

import sys
from pathlib import Path

import pytest

from millrace.errors import LaunchError
from millrace.launch.interpreter import require_module


async def require(python: Path, module: str = "json") -> None:
    await require_module(python, module, setting="engine.python", deadline=30)


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


async def test_an_interpreter_that_has_the_module_is_let_through() -> None:
    await require(Path(sys.executable), "millrace")


async def test_a_module_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_engine.py").write_text("")
    monkeypatch.chdir(tmp_path)  # a folder in which the server would not find the module either
    with pytest.raises(LaunchError, match=r"engine.python: .* has no module no_such_engine; install it there"):
        await require(Path(sys.executable), "no_such_engine")


async def test_the_folder_of_an_uninstalled_module_is_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "removed").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LaunchError, match="has no module removed"):
        await require(Path(sys.executable), "removed")


async def test_the_servers_own_environment_counts(tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("")
    await require_module(
        Path(sys.executable), "only_there", setting="engine.python", env={"PYTHONPATH": str(tmp_path)}, deadline=30
    )


async def test_a_wrong_interpreter_is_reported_with_the_reason(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none", "can't be run: No such file or directory"),
        (tmp_path, "can't be run: Permission denied"),
        (script(tmp_path / "text", "#!/bin/sh\n", mode=0o644), "can't be run: Permission denied"),
        (script(tmp_path / "broken", "#!/bin/sh\necho no libc >&2\nexit 3\n"), "with status 3 and the output: no libc"),
        (Path("/bin/true"), "not a working Python interpreter: it ended with status 0$"),
    ):
        with pytest.raises(LaunchError, match=f"engine.python: .*{says}"):
            await require(path)


async def test_an_interpreter_that_hangs_is_ended(tmp_path: Path) -> None:
    hanging = script(tmp_path / "hanging", "#!/bin/sh\nexec sleep 600\n")
    with pytest.raises(LaunchError, match=r"engine.python: .* did not answer within 0.2 s"):
        await require_module(hanging, "json", setting="engine.python", deadline=0.2)
