"""Which environments there are: their places, the mark of a finished one, the lock while one is worked on."""

import fcntl
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

MARKER = "millrace.json"
LOCK_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of one engine; `device` is cpu or cuda. `path` is where it is or would be."""

    engine: str
    version: str
    device: str
    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def marker(self) -> Path:
        """Written last: the environment counts as installed when this is there and tells of the same packages."""
        return self.path / MARKER

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def arguments(self) -> str:
        """What names it on the command line of `millrace engines`."""
        return f"{self.engine} --version {self.version}" + (" --cpu" if self.device == "cpu" else "")

    def __str__(self) -> str:
        return f"{self.engine} {self.version} ({self.device})"


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment that has a folder. whole: it was finished, with the packages that its lock names today."""

    environment: Environment
    whole: bool


def environments_home() -> Path:
    """$MILLRACE_HOME/engines, else $XDG_CACHE_HOME/millrace/engines, else ~/.cache/millrace/engines. Raises ConfigError
    where none of these is known."""
    try:
        if home := os.environ.get("MILLRACE_HOME"):
            return Path(expand(home)).absolute() / "engines"
    except ValueError as error:
        raise ConfigError(f"MILLRACE_HOME: {error}") from error
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or expand("~/.cache"))
    except ValueError as error:
        raise ConfigError("this user has no home folder for engines' environments; set MILLRACE_HOME") from error
    return cache.absolute() / "millrace" / "engines"


def environment(engine: str, version: str, device: str) -> Environment:
    return Environment(engine, version, device, environments_home() / f"{engine}-{version}-{device}")


def is_whole(environment: Environment, sha256: str | None) -> bool:
    """Whether it was finished with the packages of this hash (None: whichever), and its interpreter still runs."""
    try:
        marker = json.loads(environment.marker.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    return sha256 in (None, marker["packages_sha256"]) and environment.python.exists()


def find(engine: str, version: str, device: str, *, recipes: Recipes = RECIPES) -> Environment:
    """The finished environment. Raises LaunchError with the command to run where there is none, ConfigError where
    there can't be one."""
    wanted = requirements(engine, version, device, recipes)
    found = environment(engine, version, device)
    if not is_whole(found, wanted.sha256):
        state = "is unfinished or outdated" if found.path.exists() else "is not installed"
        raise LaunchError(f"{found} {state} in {found.path}; run: millrace engines install {found.arguments}")
    return found


def installed(*, recipes: Recipes = RECIPES) -> list[Installed]:
    """Every environment that has a folder, unfinished ones too, by name."""
    home, found = environments_home(), []
    for path in sorted(home.iterdir()) if home.is_dir() else ():
        rest, _, device = path.name.rpartition("-")
        engine, _, version = rest.rpartition("-")
        if path.is_dir() and engine and device in ("cpu", "cuda"):
            one = Environment(engine, version, device, path)
            try:
                sha256 = requirements(engine, version, device, recipes).sha256
            except ConfigError:
                sha256 = None  # from another Millrace, which knew this engine or version
            found.append(Installed(one, is_whole(one, sha256)))
    return found


def size(environment: Environment) -> int:
    """Bytes on disk, by the files' lengths."""
    return sum(
        (Path(folder) / name).lstat().st_size for folder, _, names in os.walk(environment.path) for name in names
    )


def remove(engine: str, version: str, device: str) -> None:
    """Deletes the environment, finished or not. Raises LaunchError when it is not there or is being installed."""
    there = [one.environment for one in installed()]
    gone = environment(engine, version, device)
    if gone not in there:
        others = "; there are: " + ", ".join(map(str, there)) if there else ""
        raise LaunchError(f"{gone} is not in {environments_home()}{others}")
    with locked(gone, deadline=0, waiting=lambda: None):
        clear(gone)
        gone.log.unlink(missing_ok=True)


def clear(environment: Environment) -> None:
    """Deletes the folder; its mark first, so that what is left when this is interrupted does not pass for whole."""
    try:
        environment.marker.unlink(missing_ok=True)
        if environment.path.exists():
            shutil.rmtree(environment.path)
    except OSError as error:
        raise LaunchError(f"{environment.path} can't be deleted: {error}") from error


@contextmanager
def locked(environment: Environment, *, deadline: float, waiting: Callable[[], None]) -> Iterator[int]:
    """Holds the environment's lock, whose file descriptor this yields: a child that inherits it holds the lock too.

    `waiting` is called once where another process has the lock. Raises LaunchError when it still has it after
    `deadline` seconds. The lock's file stays, because to delete it would let two processes lock two files of one name.
    """
    try:
        environment.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(environment.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise LaunchError(
            f"environments can't be kept in {environments_home()} ({error}); set MILLRACE_HOME"
        ) from error
    try:
        end, told = time.monotonic() + deadline, False
        while not _try_lock(descriptor):
            if time.monotonic() >= end:
                raise LaunchError(f"another process is installing {environment} in {environment.path}")
            if not told:
                waiting()
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
