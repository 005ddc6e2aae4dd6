"""The engine behind a URL."""

import os
from pathlib import Path
from typing import Literal

from millrace.conformance.check import Subject
from millrace.engines.base import Engine
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.start import ADMIN_KEY, API_KEY
from millrace.errors import EngineError, LaunchError

Kind = Literal["sglang", "embedded"]


async def attach(kind: Kind, url: str, *, folder: Path | None, other: Path | None) -> Subject:
    """The server at `url`, as somebody else started it; its keys come from the environment. Without `folder`, the one
    that the server names is taken, if it can be read here. The caller closes the engine.

    Raises LaunchError when it does not answer as an engine of this kind.
    """
    engine = _engine(kind, url, folder)
    try:
        if isinstance(engine, SGLangEngine):
            await engine.settle()
        info = await engine.info()
        return Subject(engine, info, folder or _readable(info.model_path), other)
    except BaseException as error:
        await engine.close()
        if not isinstance(error, EngineError):
            raise
        raise LaunchError(
            f"no {kind} engine answers at {url}: {error}; its keys are read from {API_KEY} and {ADMIN_KEY}"
        ) from error


def _engine(kind: Kind, url: str, folder: Path | None) -> Engine:
    keys = {"api_key": os.environ.get(API_KEY), "admin_key": os.environ.get(ADMIN_KEY)}
    if kind == "sglang":
        return SGLangEngine(kind, url, model_path=folder, **keys)
    return EmbeddedEngine(kind, url, **keys)


def _readable(path: str) -> Path | None:
    return Path(path) if Path(path).is_dir() else None
