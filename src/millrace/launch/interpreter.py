"""Checks before a start that an interpreter from the settings can run an engine.

Without the check, the server's log would end in an unrelated traceback.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from millrace.errors import LaunchError

DEADLINE = 60.0  # seconds; Python starts within one second, and somewhat later from a slow disk
# The module is not imported, since that takes many seconds for an engine. The current folder, which -c puts first in
# the path, is left out, since the server does not search it. A module without an origin is a folder that an uninstalled
# package left behind.
FIND = """\
import importlib.util, sys
sys.path = [entry for entry in sys.path if entry]
found = importlib.util.find_spec(sys.argv[1])
print("found" if found is not None and found.origin is not None else "missing")
"""


async def require_module(
    python: Path, module: str, *, setting: str, env: Mapping[str, str] | None = None, deadline: float = DEADLINE
) -> None:
    """Check that `python` is an interpreter that has the top-level `module`, with `env` added to its environment.

    Raises LaunchError, which names `setting`, if it is not, or if it does not answer within `deadline` seconds.
    """
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
        output = (err or out).decode(errors="replace").strip().splitlines()
        raise LaunchError(
            f"{setting}: {interpreter} is not a working Python interpreter: it ended with status {child.returncode}"
            + (f" and the output: {output[-1]}" if output else "")
        )
    if answer == "missing":
        raise LaunchError(
            f"{setting}: {interpreter} has no module {module}; install it there, or name another interpreter"
        )


def _command(python: Path, module: str) -> list[str]:
    return [str(python.absolute()), "-c", FIND, module]
