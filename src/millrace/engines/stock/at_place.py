"""The program that a stock engine is started by at a place that is not this host: it becomes the engine's server.

    python -m millrace.engines.stock.at_place KIND VERSION DEVICE PYTHON MODEL [ARGUMENT ...]

It finds on its host what Millrace has installed there: the engine's environment (or PYTHON, unless that is empty) and
the extensions. What is missing it says in one line, which is then the end of the server's log.
"""

import asyncio
import os
import socket
import sys
import tempfile
from pathlib import Path

from millrace.engines import environments
from millrace.engines.stock.launching import EXTENSION, programs_of
from millrace.errors import LaunchError, MillraceError
from millrace.launch.account import account_name
from millrace.launch.interpreter import require_module


def main() -> None:
    kind, version, device, python, model, *arguments = sys.argv[1:]
    try:
        if not Path(model).is_dir():
            raise LaunchError(f"{model} is not a folder here; a model must have the same path on all hosts")
        interpreter, path = programs_of(_interpreter(kind, version, device, python))
    except MillraceError as error:
        sys.exit(f"{socket.gethostname()}: {error}")
    # TMPDIR is the server's own folder, which its guard removes at the end; what torch compiles must outlive it.
    compiled = f"{Path(tempfile.gettempdir()).parent}/torchinductor_{account_name()}"
    paths = [str(EXTENSION), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"TORCHINDUCTOR_CACHE_DIR": compiled, **os.environ, "PATH": path, "PYTHONPATH": ":".join(paths)}
    serve = Path(__file__).parents[1] / kind / "serve.py"
    os.execve(interpreter, [str(interpreter), str(serve), *arguments], environment)  # noqa: S606 # no shell is wanted


def _interpreter(kind: str, version: str, device: str, python: str) -> Path:
    if not python:
        return environments.find(kind, version, device).python
    asyncio.run(require_module(Path(python), kind, setting="engine.python"))
    return Path(python)


if __name__ == "__main__":
    main()
