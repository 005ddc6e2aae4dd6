"""Attaches `millrace doctor` to the engine at a URL, and checks the model folders given for it."""

import asyncio
import os
from collections.abc import Mapping, Set
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from millrace.conformance.check import Subject
from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS
from millrace.engines.start import ADMIN_KEY, API_KEY, about_keys
from millrace.errors import DataError, EngineError, EngineRefused, EngineUnreachable, LaunchError
from millrace.http import HttpClient
from millrace.model_folder import StoredTensor, has_weights, stored_tensors


class Kind(StrEnum):
    """The kind of engine at a URL."""

    SGLANG = "sglang"
    VLLM = "vllm"
    EMBEDDED = "embedded"


ASK_DEADLINE = 10.0  # seconds
# A route of each stock engine that the other does not have.
ROUTES: Mapping[Kind, str] = {Kind.SGLANG: "/flush_cache", Kind.VLLM: "/version"}
_SGLANG_ROUTES = (
    "/resume_memory_occupation if it sleeps, /update_weights_from_disk with the model's folder as model_path, and "
    "/continue_generation"
)
# The POST requests that restore a server by hand after interrupted checks. They need its control key.
BY_HAND: Mapping[Kind, str] = {
    Kind.SGLANG: _SGLANG_ROUTES,
    Kind.VLLM: '/wake_up, /collective_rpc {"method": "reload_weights"}, /reset_prefix_cache and /resume',
    Kind.EMBEDDED: _SGLANG_ROUTES,
}


async def find_kind(url: str) -> Kind:
    """Return the kind of engine at `url`, by the server's routes.

    Raises LaunchError if no engine answers there, or the server refuses the key."""
    server = HttpClient(urlsplit(url).netloc or url, url, api_key=os.environ.get(API_KEY))
    try:
        paths = await _routes(server)
        for kind, route in ROUTES.items():
            if route in paths:
                return kind
        info = await server.control("GET", "/server_info", deadline=ASK_DEADLINE, repeatable=True)
    except EngineError as error:
        keys = about_keys(error)
        raise LaunchError(f"{'the key is refused' if keys else 'no engine answers'} at {url}: {error}{keys}") from error
    finally:
        await server.close()
    if not (isinstance(info, Mapping) and "capabilities" in info):
        raise LaunchError(f"the server at {url} is neither SGLang, nor vLLM, nor the embedded engine")
    return Kind.EMBEDDED


async def _routes(server: HttpClient) -> Set[str]:
    """Return the routes in the server's OpenAPI description. The embedded engine has none."""
    try:
        api = await server.control("GET", "/openapi.json", deadline=ASK_DEADLINE, repeatable=True)
    except EngineRefused:
        return frozenset()
    return api["paths"].keys() if isinstance(api, Mapping) and isinstance(api.get("paths"), Mapping) else frozenset()


async def attach(url: str, *, folder: Path | None, other: Path | None) -> Subject:
    """Attach to the server at `url`, and return it as the subject of the checks. The caller must close its engine.

    The keys come from the environment. If `folder` is None, the folder that the server reports is used, if this process
    can read it.

    Raises DataError if `folder` or `other` is not suitable (see `require_folders`), and LaunchError if the server does
    not answer as an engine. If both folders are given, they are checked before the first call to the server.
    """
    await asyncio.to_thread(require_folders, folder, other)
    kind = await find_kind(url)
    engine = _engine(kind, url, folder)
    try:
        await engine.initialize()
        info = await engine.info()
        if folder is None and (folder := _readable(info.model_path)) is not None:
            await asyncio.to_thread(require_folders, folder, other)
        return Subject(engine, info, folder, other)
    except BaseException as error:
        await engine.close()
        if not isinstance(error, EngineError):
            raise
        raise LaunchError(_why_not(kind, url, error)) from error


def require_folders(folder: Path | None, other: Path | None) -> None:
    """Raise DataError unless `folder` holds a model, and `other` holds different weights of the same names and shapes.

    The weights are compared only if both folders are given and the model's weights are in the safetensors format.
    """
    if folder is not None and not (folder / "config.json").is_file():
        raise DataError(f"--model: {folder} is not a model's folder, it has no config.json")
    if other is None:
        return
    try:
        theirs = stored_tensors(other)
    except DataError as error:
        raise DataError(f"--other: {error}") from error
    if folder is None or not has_weights(folder):
        return
    ours = stored_tensors(folder)
    hint = "give other weights of the same model, such as a fine-tune"
    if odd := sorted(ours.keys() ^ theirs.keys()):
        reason = f"it does not have {odd[0]}" if odd[0] in ours else f"the model does not have {odd[0]}"
        raise DataError(f"--other: {other} is of another model than {folder}: {reason}; {hint}")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape:
            reason = f"{name} has the shape {theirs[name].shape} instead of {tensor.shape}"
            raise DataError(f"--other: {other} is of another model than {folder}: {reason}; {hint}")
    if all(_content(tensor) == _content(theirs[name]) for name, tensor in ours.items()):
        raise DataError(f"--other: {other} has the same weights as {folder}; {hint}")


def _content(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)


def _why_not(kind: Kind, url: str, error: EngineError) -> str:
    if isinstance(error, EngineUnreachable) and not error.sent:
        return str(error)
    if isinstance(error.__cause__, DataError):  # the adapter needs the model's folder, and can't name the option
        return f"the model that {url} serves is not available here: {error.__cause__}; give its folder with --model"
    return f"the {kind} engine at {url} can't be checked: {error}{about_keys(error)}"


def _engine(kind: Kind, url: str, folder: Path | None) -> HttpEngine:
    keys = {"api_key": os.environ.get(API_KEY), "admin_key": os.environ.get(ADMIN_KEY)}
    return ENGINE_KINDS[kind].client(kind, url, model_path=folder, **keys)


def _readable(path: str) -> Path | None:
    return Path(path) if Path(path).is_dir() else None
