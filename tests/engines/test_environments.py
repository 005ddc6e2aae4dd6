"""Engines' environments, made by the real pip. A folder of small packages takes the place of the package index."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.engines.environments import (
    Environment,
    Installed,
    Recipe,
    environments_home,
    find,
    install,
    installed,
    remove,
    size,
)
from millrace.errors import ConfigError, LaunchError

# The build of a source package that waits for a file. It stops an installation at a known point.
BACKEND = """
import os, shutil, signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a compiler's children may

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with open({started!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    while not os.path.exists({gate!r}):
        time.sleep(0.02)
    return os.path.basename(shutil.copy({wheel!r}, wheel_directory))
"""


def write_wheel(folder: Path, name: str, version: str, code: str = "") -> Path:
    info, path = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Shelf:
    """The available packages, the lists that name them, and the gate of the package whose build waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gate, self.started = folder / "gate", folder / "started"
        write_wheel(folder, "toy", "1.0", "answer = 42\n")
        self.write_gated("gated", "1.0")
        self.write_lock("1.0", "toy==1.0\n")
        self.write_lock("2.0", "toy==1.0\ngated==1.0\n")

    def write_lock(self, version: str, text: str) -> None:
        (self.folder / f"{version}.txt").write_text(text)

    def write_gated(self, name: str, version: str) -> None:
        """Puts a source package on the shelf whose build waits for the gate."""
        built, source = self.folder / "built", self.folder / f"{name}-{version}"
        for folder in (built, source):
            folder.mkdir(exist_ok=True)
        wheel = write_wheel(built, name, version)
        backend = BACKEND.format(started=str(self.started), gate=str(self.gate), wheel=str(wheel))
        (source / "backend.py").write_text(backend)
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (source / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        with tarfile.open(self.folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)

    def recipes(self, check: str = "") -> dict[tuple[str, str], Recipe]:
        locks = {path.stem: path for path in self.folder.glob("*.txt")}
        return {("toy", "cpu"): Recipe(locks=locks, check=check, hint="hang it up elsewhere")}

    def builds(self) -> list[int]:
        """Returns the process ids of the builds that began, in order."""
        return [int(line) for line in self.started.read_text().split()] if self.started.exists() else []

    def start_install(self, version: str) -> subprocess.Popen[str]:
        """Runs `install` in a process of its own, which prints its progress."""
        code = textwrap.dedent(f"""
            from pathlib import Path
            from millrace.engines.environments import Recipe, install
            recipes = {{("toy", "cpu"): Recipe(locks={{{version!r}: Path({str(self.folder / f"{version}.txt")!r})}})}}
            install("toy", {version!r}, "cpu", progress=lambda *step: print(*step, flush=True), recipes=recipes)
        """)
        return subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path / "home"))
    (tmp_path / "shelf").mkdir()
    return Shelf(tmp_path / "shelf")


def quiet(what: str, done: int, total: int) -> None: ...


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], deadline: float = 60) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def answer(environment: Environment) -> str:
    command = [str(environment.python), "-c", "import toy; print(toy.answer)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_is_made_once_and_again_when_its_packages_change(shelf: Shelf) -> None:
    recipes = shelf.recipes(check="import toy")
    with pytest.raises(
        LaunchError, match="is not installed in .*; run: millrace engines install toy --version 1.0 --cpu"
    ):
        find("toy", "1.0", "cpu", recipes=recipes)

    (other := environments_home() / "toy-1.0-cuda").mkdir(parents=True)
    with pytest.raises(LaunchError, match="--cpu; or set device to cuda, for which it is installed"):
        find("toy", "1.0", "cpu", recipes=recipes)
    other.rmdir()

    steps: list[tuple[str, int, int]] = []
    made = install("toy", "1.0", "cpu", progress=lambda *step: steps.append(step), recipes=recipes)

    assert made.path == environments_home() / "toy-1.0-cpu"
    assert answer(made) == "42"
    # The modules are compiled, for a quick start.
    assert list(made.path.glob("lib/python*/site-packages/__pycache__/toy.*.pyc"))
    assert ("collecting toy", 1, 1) in steps
    assert "installing" in {what for what, _, _ in steps}
    marker = json.loads(made.marker.read_bytes())
    assert marker["python"] == sys.version.split()[0]
    assert marker["seconds"] > 0

    assert find("toy", "1.0", "cpu", recipes=recipes) == made
    steps.clear()
    assert install("toy", "1.0", "cpu", progress=lambda *step: steps.append(step), recipes=recipes) == made
    assert steps == []  # nothing was done, since it was there already
    assert installed(recipes=recipes) == [Installed(made, whole=True)]
    assert size(made) > 42

    write_wheel(shelf.folder, "toy", "1.1", "answer = 43\n")
    shelf.write_lock("1.0", "toy==1.1\n")
    with pytest.raises(LaunchError, match="unfinished or outdated"):
        find("toy", "1.0", "cpu", recipes=recipes)
    assert installed(recipes=recipes) == [Installed(made, whole=False)]
    recipes = shelf.recipes(check="raise SystemExit('the ceiling is too low')")
    with pytest.raises(LaunchError, match=r"(?s)hang it up elsewhere.*the ceiling is too low"):
        install("toy", "1.0", "cpu", progress=quiet, recipes=recipes)
    assert answer(made) == "43"
    # An environment that fails its check is not finished.
    assert installed(recipes=recipes) == [Installed(made, whole=False)]


@pytest.mark.slow
def test_one_of_many_processes_installs_and_the_next_takes_over_when_it_is_killed(shelf: Shelf) -> None:
    """The guard holds the lock of a killed process until its pip has ended. No other installation begins before
    that."""
    processes = [shelf.start_install("2.0")]
    try:
        wait_until(shelf.builds)
        processes.append(shelf.start_install("2.0"))
        assert "waiting for another process that installs toy 2.0 (cpu)" in next_line(processes[1])
        with pytest.raises(LaunchError, match="another process is installing toy 2.0"):
            remove("toy", "2.0", "cpu")

        processes[0].kill()
        assert "making a virtual environment" in next_line(processes[1])
        assert not alive(shelf.builds()[0])
        with pytest.raises(LaunchError, match="unfinished"):
            find("toy", "2.0", "cpu", recipes=shelf.recipes())

        processes.append(shelf.start_install("2.0"))
        assert "waiting" in next_line(processes[2])
        wait_until(lambda: len(shelf.builds()) == 2)
        shelf.gate.touch()
        assert [process.wait(60) for process in processes] == [-signal.SIGKILL, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(shelf.builds()) == 2  # the third process used what the second had made
    assert answer(find("toy", "2.0", "cpu", recipes=shelf.recipes())) == "42"


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_an_interpreter_that_is_not_there_is_a_clear_error(shelf: Shelf) -> None:
    with pytest.raises(LaunchError, match="/no/such/python could not be started"):
        install("toy", "1.0", "cpu", python="/no/such/python", progress=quiet, recipes=shelf.recipes())


def test_a_home_that_is_no_folder_is_a_clear_error(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_HOME", os.devnull)
    with pytest.raises(LaunchError, match="set MILLRACE_HOME"):
        install("toy", "1.0", "cpu", progress=quiet, recipes=shelf.recipes())


def test_removing_takes_only_what_is_named(shelf: Shelf) -> None:
    for name in ("toy-1.0-cpu", "toy-1.0-cuda", "toy-1.1-cpu", "notes"):
        (environments_home() / name / "bin").mkdir(parents=True)
    remove("toy", "1.0", "cpu")
    assert {path.name for path in environments_home().iterdir() if path.is_dir()} == {
        "toy-1.0-cuda", "toy-1.1-cpu", "notes",
    }  # fmt: skip
    with pytest.raises(
        LaunchError, match=r"toy 1.0 \(cpu\) is not in .*; there are: toy 1.0 \(cuda\), toy 1.1 \(cpu\)"
    ):
        remove("toy", "1.0", "cpu")


@pytest.mark.parametrize("version", ["../../elsewhere", "1.0-cpu", "", "1.0\nother"])
def test_an_invalid_version_is_refused(shelf: Shelf, version: str) -> None:
    recipes = {("toy", "cuda"): Recipe(locks=None)}
    with pytest.raises(ConfigError, match="is not a version"):
        install("toy", version, "cuda", progress=quiet, recipes=recipes)
    with pytest.raises(LaunchError, match="is not in"):
        remove("toy", version, "cuda")


def test_the_home_follows_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MILLRACE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert environments_home() == Path("/home/someone/.cache/millrace/engines")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert environments_home() == Path("/cache/millrace/engines")
    monkeypatch.setenv("MILLRACE_HOME", "/mill")
    assert environments_home() == Path("/mill/engines")
