"""The installed environments: their folders, the marker of a finished one, and the lock for changing one."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millrace.arguments import expand
from millrace.engines.environments.recipes import RECIPES, Recipes, requirements
from millrace.errors import ConfigError, LaunchError
from millrace.locks import try_lock

MARKER = "millrace.json"
LOCK_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Environment:
    """The virtual environment of one engine, which may not exist. device: cpu or cuda. path: its folder."""

    engine: str
    version: str
    device: str
    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def marker(self) -> Path:
        """The marker, which is written last. An environment is installed if its marker names the same packages."""
        return self.path / MARKER

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def arguments(self) -> str:
        """The arguments of `millrace engines` that name this environment."""
        return f"{self.engine} --version {self.version}" + (" --cpu" if self.device == "cpu" else "")

    def __str__(self) -> str:
        return f"{self.engine} {self.version} ({self.device})"


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment that has a folder. whole: it is finished and has the packages of the current lock file."""

    environment: Environment
    whole: bool


def environments_home() -> Path:
    """Return the folder of all environments.

    It is $MILLRACE_HOME/engines, or $XDG_CACHE_HOME/millrace/engines, or ~/.cache/millrace/engines. Raises ConfigError
    if none of these is known.
    """
    try:
        if home := os.environ.get("MILLRACE_HOME"):
            return Path(expand(home)).absolute() / "engines"
    except ValueError as error:
        raise ConfigError(f"MILLRACE_HOME: {error}") from error
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or expand("~/.cache"))
    except ValueError as error:
        raise ConfigError("this user has no home folder to keep environments in; set MILLRACE_HOME") from error
    return cache.absolute() / "millrace" / "engines"


def environment(engine: str, version: str, device: str) -> Environment:
    """Return the environment, installed or not."""
    return Environment(engine, version, device, environments_home() / f"{engine}-{version}-{device}")


def is_whole(environment: Environment, sha256: str | None) -> bool:
    """Whether the environment is finished, has packages of this hash (None: any), and has its interpreter."""
    try:
        marker = json.loads(environment.marker.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    return sha256 in (None, marker["packages_sha256"]) and environment.python.exists()


def find(engine: str, version: str, device: str, *, recipes: Recipes = RECIPES) -> Environment:
    """Return the finished environment.

    Raises:
        ConfigError: there is no recipe for this engine, version or device.
        LaunchError: it is not installed. The message has the command that installs it.
    """
    wanted = requirements(engine, version, device, recipes)
    found = environment(engine, version, device)
    if not is_whole(found, wanted.sha256):
        state = "is unfinished or outdated" if found.path.exists() else "is not installed"
        hint = f"run: millrace engines install {found.arguments}"
        other = environment(engine, version, "cpu" if device == "cuda" else "cuda")
        if other.path.exists():
            hint += f"; or set device to {other.device}, for which it is installed"
        raise LaunchError(f"{found} {state} in {found.path}; {hint}")
    return found


def installed(*, recipes: Recipes = RECIPES) -> list[Installed]:
    """Return every environment that has a folder, also unfinished ones, sorted by name."""
    home, found = environments_home(), []
    for path in sorted(home.iterdir()) if home.is_dir() else ():
        rest, _, device = path.name.rpartition("-")
        engine, _, version = rest.rpartition("-")
        if path.is_dir() and engine and device in ("cpu", "cuda"):
            one = Environment(engine, version, device, path)
            try:
                sha256 = requirements(engine, version, device, recipes).sha256
            except ConfigError:
                sha256 = None  # installed by another version of Millrace, which has a recipe for it
            found.append(Installed(one, is_whole(one, sha256)))
    return found


def size(environment: Environment) -> int:
    """Return the total size of the files in bytes."""
    return sum(
        (Path(folder) / name).lstat().st_size for folder, _, names in os.walk(environment.path) for name in names
    )


def remove(engine: str, version: str, device: str) -> None:
    """Delete the environment, finished or not. Raises LaunchError if it does not exist or is being installed."""
    there = [one.environment for one in installed()]
    gone = environment(engine, version, device)
    if gone not in there:
        others = "; there are: " + ", ".join(map(str, there)) if there else ""
        raise LaunchError(f"{gone} is not in {environments_home()}{others}")
    with locked(gone, deadline=0, waiting=lambda: None):
        clear(gone)
        gone.log.unlink(missing_ok=True)


def clear(environment: Environment) -> None:
    """Delete the folder, marker first, so that a partly deleted environment does not count as finished."""
    try:
        environment.marker.unlink(missing_ok=True)
        if environment.path.exists():
            shutil.rmtree(environment.path)
    except OSError as error:
        raise LaunchError(f"{environment.path} can't be deleted: {error}") from error


@contextmanager
def locked(environment: Environment, *, deadline: float, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the environment's lock. Yields its file descriptor; a child process that inherits it holds the lock too.

    waiting: called once if another process holds the lock. Raises LaunchError if it still does after `deadline`
    seconds. The lock file is never deleted: otherwise two processes could lock two files of the same name.
    """
    try:
        environment.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(environment.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise LaunchError(f"can't create environments in {environments_home()} ({error}); set MILLRACE_HOME") from error
    try:
        end, told = time.monotonic() + deadline, False
        while not try_lock(descriptor):
            if time.monotonic() >= end:
                raise LaunchError(f"another process is installing {environment} in {environment.path}")
            if not told:
                waiting()
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
