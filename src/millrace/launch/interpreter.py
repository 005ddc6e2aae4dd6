"""Whether an interpreter that somebody named can run an engine: asked before a server is started with it, whose log
would otherwise end in a traceback about something else."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from millrace.errors import LaunchError

DEADLINE = 60.0  # seconds; Python starts in one even from a slow disk
# Nothing is imported, since that takes an engine many seconds. The current folder, which -c puts first, is left out:
# the server does not look there. What has no origin is a folder that an uninstalled package left behind.
FIND = """\
import importlib.util, sys
sys.path = [entry for entry in sys.path if entry]
found = importlib.util.find_spec(sys.argv[1])
print("found" if found is not None and found.origin is not None else "missing")
"""


async def require_module(
    python: Path, module: str, *, setting: str, env: Mapping[str, str] | None = None, deadline: float = DEADLINE
) -> None:
    """Raises LaunchError, which names `setting`, unless `python` is an interpreter that has the top-level `module`,
    with `env` added to its environment."""
    interpreter, *_ = command = _command(python, module)
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **(env or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise LaunchError(f"{setting}: {interpreter} can't be run: {os.strerror(error.errno or 0)}") from error
    try:
        async with asyncio.timeout(deadline):
            out, err = await child.communicate()
    except TimeoutError:
        raise LaunchError(f"{setting}: {interpreter} did not answer within {deadline:g} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    answer = out.decode(errors="replace").strip()
    if child.returncode != 0 or answer not in ("found", "missing"):
        said = (err or out).decode(errors="replace").strip().splitlines()
        raise LaunchError(
            f"{setting}: {interpreter} is no Python interpreter that works: it ended with status {child.returncode}"
            + (f", saying: {said[-1]}" if said else "")
        )
    if answer == "missing":
        raise LaunchError(
            f"{setting}: {interpreter} has no module {module}; install it there, or name another interpreter"
        )


def _command(python: Path, module: str) -> list[str]:
    return [str(python.absolute()), "-c", FIND, module]
