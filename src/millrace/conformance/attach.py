"""The engine behind a URL, and the folders that `millrace doctor` was given for it."""

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
    """What runs at a URL."""

    SGLANG = "sglang"
    VLLM = "vllm"
    EMBEDDED = "embedded"


ASK_DEADLINE = 10.0  # seconds
# A route of each stock engine that the other has not.
ROUTES: Mapping[Kind, str] = {Kind.SGLANG: "/flush_cache", Kind.VLLM: "/version"}
_SGLANG_ROUTES = (
    "/resume_memory_occupation where it sleeps, /update_weights_from_disk with the model's folder as model_path, and "
    "/continue_generation"
)
# What brings a server back by hand, whose checks were broken off: POSTs, with its control key.
BY_HAND: Mapping[Kind, str] = {
    Kind.SGLANG: _SGLANG_ROUTES,
    Kind.VLLM: '/wake_up, /collective_rpc {"method": "reload_weights"}, /reset_prefix_cache and /resume',
    Kind.EMBEDDED: _SGLANG_ROUTES,
}


async def find_kind(url: str) -> Kind:
    """What runs at `url`, by the routes that the server has. Raises LaunchError where no engine answers there."""
    server = HttpClient(urlsplit(url).netloc or url, url, api_key=os.environ.get(API_KEY))
    try:
        paths = await _routes(server)
        for kind, route in ROUTES.items():
            if route in paths:
                return kind
        said = await server.control("GET", "/server_info", deadline=ASK_DEADLINE, repeatable=True)
    except EngineError as error:
        raise LaunchError(f"no engine answers at {url}: {error}{about_keys(error)}") from error
    finally:
        await server.close()
    if not (isinstance(said, Mapping) and "capabilities" in said):
        raise LaunchError(f"what answers at {url} is neither SGLang, nor vLLM, nor the embedded engine")
    return Kind.EMBEDDED


async def _routes(server: HttpClient) -> Set[str]:
    """As the server describes them; the embedded engine does not."""
    try:
        api = await server.control("GET", "/openapi.json", deadline=ASK_DEADLINE, repeatable=True)
    except EngineRefused:
        return frozenset()
    return api["paths"].keys() if isinstance(api, Mapping) and isinstance(api.get("paths"), Mapping) else frozenset()


async def attach(url: str, *, folder: Path | None, other: Path | None) -> Subject:
    """The server at `url`, as somebody else started it; its keys come from the environment. Without `folder`, the one
    that the server names is taken, if it can be read here. The caller closes the engine.

    Raises DataError for folders that are not what they should be, before the server is asked anything where both are
    given, and LaunchError when it does not answer as an engine.
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
    """Raises DataError unless `folder` is a model's, and `other` has other weights of the same names and shapes. Where
    one of them is None, or the model's weights are in another format than safetensors, less is asked."""
    if folder is not None and not (folder / "config.json").is_file():
        raise DataError(f"--model: {folder} is no model's folder, it has no config.json")
    if other is None:
        return
    try:
        theirs = stored_tensors(other)
    except DataError as error:
        raise DataError(f"--other: {error}") from error
    if folder is None or not has_weights(folder):
        return
    ours = stored_tensors(folder)
    wanted = "give other weights of the same model, as those of a fine-tune"
    if odd := sorted(ours.keys() ^ theirs.keys()):
        how = f"it has no {odd[0]}" if odd[0] in ours else f"{odd[0]} is not there"
        raise DataError(f"--other: {other} is of another model than {folder}: {how}; {wanted}")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape:
            how = f"{name} has the shape {theirs[name].shape}, there {tensor.shape}"
            raise DataError(f"--other: {other} is of another model than {folder}: {how}; {wanted}")
    if all(_content(tensor) == _content(theirs[name]) for name, tensor in ours.items()):
        raise DataError(f"--other: {other} has the same weights as {folder}; {wanted}")


def _content(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)


def _why_not(kind: Kind, url: str, error: EngineError) -> str:
    if isinstance(error, EngineUnreachable) and not error.sent:
        return str(error)
    if isinstance(error.__cause__, DataError):  # the adapter needs the model's folder, and knows no command line
        return f"the model that {url} serves is not known here: {error.__cause__}; give its folder by --model"
    return f"the {kind} engine at {url} can't be examined: {error}{about_keys(error)}"


def _engine(kind: Kind, url: str, folder: Path | None) -> HttpEngine:
    keys = {"api_key": os.environ.get(API_KEY), "admin_key": os.environ.get(ADMIN_KEY)}
    return ENGINE_KINDS[kind].client(kind, url, model_path=folder, **keys)


def _readable(path: str) -> Path | None:
    return Path(path) if Path(path).is_dir() else None
