"""`millrace engines ...` as a user runs it. A folder with an engine of one file takes the place of the package
index."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.test_environments import Shelf, alive, shelf, wait_until, write_wheel

__all__ = ["shelf"]  # a fixture


def millrace(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "millrace", "engines", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_install_list_remove(shelf: Shelf, tmp_path: Path) -> None:
    assert "no environment in" in millrace("list")[1]
    status, _, err = millrace("install", "sglang", "--version", "9.9.9")
    assert status == 1
    assert err.startswith("error: sglang 9.9.9 (cuda) could not be installed\n")
    assert "No matching distribution found for sglang==9.9.9" in err.splitlines()[-1]
    log = tmp_path / "home" / "engines" / "sglang-9.9.9-cuda.log"
    assert str(log) in err
    assert "No matching distribution found" in log.read_text()
    assert "unfinished" in millrace("list")[1]

    write_wheel(shelf.folder, "sglang", "9.9.9")
    status, out, err = millrace("install", "sglang", "--version", "9.9.9")
    assert status == 0, err
    path = tmp_path / "home" / "engines" / "sglang-9.9.9-cuda"
    assert "collecting sglang" in out  # without a terminal, the output is plain lines
    assert f"sglang 9.9.9 (cuda) is ready in {path}" in out

    (tmp_path / "home" / "engines" / "sglang-0.5.23-cpu").mkdir()
    status, out, _ = millrace("list")
    rows = [line for line in out.splitlines() if "sglang" in line]
    assert "unfinished" in rows[0]
    assert all(word in rows[1] for word in ("9.9.9", "cuda", "complete", str(path)))

    assert millrace("remove", "sglang", "--version", "9.9.9")[0] == 0
    assert not path.exists()
    assert not log.exists()
    status, _, err = millrace("remove", "sglang", "--version", "9.9.9")
    assert status == 1
    assert "error: sglang 9.9.9 (cuda) is not in" in err
    assert "there are: sglang 0.5.23 (cpu)" in err


def test_an_impossible_install_is_one_message(shelf: Shelf) -> None:
    for arguments, words in (
        (("sglang", "--version", "0.4.0", "--cpu"), "these versions have one: 0.5.15, 0.5.23"),
        (("slang",), "there is no engine slang; valid engines: sglang"),
        (("slang", "--version", "1.0"), "there is no environment for slang (cuda); there are: sglang (cpu)"),
    ):
        status, _, err = millrace("install", *arguments)
        assert status == 1
        assert err.startswith("error: ")
        assert words in err
        assert "Traceback" not in err


def test_ctrl_c_ends_the_installation(shelf: Shelf) -> None:
    shelf.write_gated("sglang", "9.9.9")
    process = subprocess.Popen(
        [sys.executable, "-m", "millrace", "engines", "install", "sglang", "--version", "9.9.9"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        wait_until(shelf.builds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: the installation has been ended" in err
    assert not any(alive(pid) for pid in shelf.builds())


@pytest.mark.parametrize("arguments", [["engines", "--help"], ["--help"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['millrace', *{arguments}]\nfrom millrace.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
