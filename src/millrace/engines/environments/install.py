"""Install an environment: create a virtual environment, run pip, compile, check, and write the marker.

pip would compile one package after another, so `compileall` compiles them instead, on all cores. Without bytecode, the
server's first start would compile everything, or every start if PYTHONDONTWRITEBYTECODE is set.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from millrace.engines.environments.recipes import RECIPES, Recipes, Requirements, recipe_for, requirements
from millrace.engines.environments.store import Environment, clear, environment, is_whole, locked
from millrace.errors import LaunchError
from millrace.launch.process import guarded

Progress = Callable[[str, int, int], None]  # the current step, the number of packages done, the total (or 0)

DEADLINE = 3600.0  # seconds for each step; a CUDA engine is several GB, and the network may be slow
GRACE_SECONDS = 2.0  # for pip, between SIGTERM and SIGKILL
TICK_SECONDS = 0.5
TAIL_LINES = 20

COLLECTING = re.compile(r"(?:Collecting|Processing) (?:\S*/)?([A-Za-z0-9._]+)")
DOWNLOADING = re.compile(r"\s+Downloading \S*?([A-Za-z0-9_.]+)-\d\S* \((.+)\)")
INSTALLING = "Installing collected packages: "


def install(
    engine: str,
    version: str,
    device: str,
    *,
    python: str = sys.executable,
    progress: Progress,
    recipes: Recipes = RECIPES,
) -> Environment:
    """Install the environment with the interpreter `python`, unless it is installed. One process at a time does so.

    An unfinished or outdated environment is installed again; pip takes earlier downloads from its cache. On the CPU the
    packages are exactly those of the lock file, made for Python 3.11. On CUDA, pip chooses the engine's dependencies
    (not covered by our tests, which have no GPU). pip's own configuration applies. For example, PIP_EXTRA_INDEX_URL can
    name the index of torch's CPU builds.

    progress: called with the current step.

    Raises:
        ConfigError: there is no recipe for this engine, version or device.
        LaunchError: a step failed. The message has the last lines of its output.
    """
    recipe = recipe_for(engine, device, recipes)
    wanted = requirements(engine, version, device, recipes)
    made = environment(engine, version, device)
    if is_whole(made, wanted.sha256):
        return made
    begun = time.monotonic()
    with locked(
        made, deadline=DEADLINE, waiting=lambda: progress(f"waiting for another process that installs {made}", 0, 0)
    ) as lock:
        if is_whole(made, wanted.sha256):
            return made
        progress("making a virtual environment", 0, 0)
        clear(made)
        with made.log.open("wb") as log:
            steps = _Steps(made, log, lock)
            steps.run([python, "-I", "-m", "venv", str(made.path)])
            _install_packages(steps, wanted, progress)
            progress("compiling", 0, 0)
            # Tests are not needed. Status 1: some packages have files for other versions of Python.
            skip = f"^{re.escape(str(made.path))}/.*/tests?/"
            compile_all = ["-m", "compileall", "-q", "-j", "0", "-x", skip, str(made.path / "lib")]
            steps.run([str(made.python), "-I", *compile_all], accept=(0, 1))
            if recipe.check:
                progress("checking", 0, 0)
                steps.run([str(made.python), "-I", "-c", recipe.check], hint=recipe.hint)
        _mark(made, wanted, time.monotonic() - begun)
    return made


def _install_packages(steps: "_Steps", wanted: Requirements, progress: Progress) -> None:
    path = steps.environment.path
    file = path / "requirements.txt"
    file.write_text(wanted.text)
    counter = _Counter(path, wanted.packages or 0, progress)
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-compile"]
    if wanted.complete:
        options.append("--no-deps")
    steps.run(
        [str(steps.environment.python), "-I", "-m", "pip", "install", *options, "-r", str(file)],
        on_line=counter.read,
        on_tick=counter.look,
    )


class _Counter:
    """Reports progress from pip's output and, while pip silently unpacks, from the installed packages."""

    def __init__(self, path: Path, total: int, progress: Progress) -> None:
        self._path, self._total, self._progress = path, total, progress
        self._collected = 0
        self._before: int | None = None  # packages in the environment when pip began to unpack

    def read(self, line: str) -> None:
        if found := COLLECTING.match(line):
            self._collected += 1
            self._progress(f"collecting {found[1]}", self._collected, self._total)
        elif found := DOWNLOADING.match(line):
            self._progress(f"downloading {found[1]} ({found[2]})", self._collected, self._total)
        elif line.startswith(INSTALLING):
            self._total = line.count(",") + 1
            self._before = self._present()
            self.look()

    def look(self) -> None:
        if self._before is not None:
            self._progress("installing", min(self._present() - self._before, self._total), self._total)

    def _present(self) -> int:
        return sum(1 for _ in self._path.glob("lib/python*/site-packages/*.dist-info"))


@dataclass(frozen=True, slots=True)
class _Steps:
    """Runs the commands of one installation, each under a guard process.

    The guard ends the command when this process ends. It holds the lock until then, so that no other installation
    starts beside the remains of a killed one.
    """

    environment: Environment
    log: BinaryIO
    lock: int

    def run(
        self,
        command: Sequence[str],
        *,
        accept: tuple[int, ...] = (0,),
        hint: str = "",
        on_line: Callable[[str], None] = lambda _: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a command to its end. Raises LaunchError for a status that is not in `accept`.

        hint: advice for the error message. on_line: called with each line of output. on_tick: called while there is
        no output.
        """
        self.log.write(f"$ {' '.join(command)}\n".encode())
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def take(line: bytes) -> None:
            self.log.write(line)
            self.log.flush()
            text = line.decode(errors="replace").rstrip()
            tail.append(text)
            on_line(text)

        process = subprocess.Popen(
            guarded(command, grace=GRACE_SECONDS),
            stdin=subprocess.PIPE,  # the lifeline
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the guard
            pass_fds=(self.lock,),
        )
        try:
            in_time = _read_lines(process, take, on_tick)
        finally:
            _end(process)
        if not in_time or process.returncode not in accept:
            what = f"ended with status {process.returncode}" if in_time else f"took longer than {DEADLINE:.0f} s"
            raise LaunchError(
                f"{self.environment} could not be installed{f': {hint}' if hint else ''}\n"
                f"{' '.join(command[:6])} ... {what}; the last lines of {self.log.name}:\n"
                + "\n".join(f"  {line}" for line in tail)
            )


def _read_lines(process: subprocess.Popen[bytes], take: Callable[[bytes], None], on_tick: Callable[[], None]) -> bool:
    """Read lines until the output ends. Return False if the deadline passes first."""
    assert process.stdout is not None
    output, rest, end = process.stdout.fileno(), b"", time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if not select.select([output], [], [], TICK_SECONDS)[0]:
            on_tick()
            continue
        read = os.read(output, 65536)
        if not read:
            if rest:
                take(rest)
            return True
        *lines, rest = (rest + read).splitlines(keepends=True)
        if rest.endswith(b"\n"):
            lines, rest = [*lines, rest], b""
        for line in lines:
            take(line)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the guard, and with it the command, if they are still running."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(GRACE_SECONDS + 8)
    finally:
        process.kill()  # no effect if it has ended
        process.stdout.close()


def _mark(environment: Environment, wanted: Requirements, seconds: float) -> None:
    """Write the marker of a finished environment."""
    settings = dict(
        line.split(" = ", 1) for line in (environment.path / "pyvenv.cfg").read_text().splitlines() if " = " in line
    )
    text = json.dumps(
        {
            "engine": environment.engine,
            "version": environment.version,
            "device": environment.device,
            "python": settings["version"],
            "seconds": round(seconds, 1),
            "packages_sha256": wanted.sha256,
        },
        indent=2,
    )
    new = environment.marker.with_suffix(".new")
    new.write_text(text + "\n")
    new.replace(environment.marker)
