"""Servers for benchmarks, as their settings say, and the requests of a bare client."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from millrace.config.engines import EngineConfig
from millrace.engines.kinds import ENGINE_KINDS, launch
from millrace.engines.sglang_wire import encode_generate
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.interpreter import StockConfig
from millrace.engines.vllm.wire import COMPLETIONS, GENERATE, encode
from millrace.types import GenerateRequest

Body = Callable[[GenerateRequest], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask a server for tokens: a route and the body of the request."""

    path: str
    body: Body


def engine_config(settings: str, *, tokenizer: bool = False) -> StockConfig:
    """Reads an engine's config from JSON, which has the settings under `engine` in a config file. The weights are
    random unless it says otherwise."""
    given = {"kind": "sglang", "max_running_requests": 1024, **json.loads(settings)}
    random = {"load_format": "dummy", "skip_tokenizer_init": not tokenizer}
    given["engine_args"] = {**random, **given.get("engine_args", {})}
    config: EngineConfig = TypeAdapter(EngineConfig).validate_python(given)
    assert isinstance(config, StockConfig)
    return config


@asynccontextmanager
async def served(config: StockConfig, folder: Path, logs: Path) -> AsyncIterator[tuple[Launched, StockEngine[Any]]]:
    """Starts a server of the model in `folder` and yields its adapter. The server ends with the context. After an
    error, the end of the server's log is printed."""
    launched = await launch(config, LaunchSpec(model_path=folder, log_dir=logs))
    assert launched.url is not None
    engine = ENGINE_KINDS[config.kind].client(
        launched.name, launched.url, api_key=launched.api_key, admin_key=launched.admin_key, model_path=folder
    )
    assert isinstance(engine, StockEngine)
    try:
        await engine.initialize(0)
        yield launched, engine
    except BaseException:
        print(launched.process.log_tail(), flush=True)
        raise
    finally:
        await engine.close()
        await launched.process.end()


def forms(kind: str) -> Mapping[str, Form]:
    """The ways in which a bare client can ask. `bare` is the one that Millrace itself uses."""
    if kind == "sglang":
        return {"bare": Form("/generate", encode_generate)}
    return {
        "bare": Form(GENERATE, lambda request: encode(GENERATE, request)),
        "bare, completions": Form(COMPLETIONS, lambda request: encode(COMPLETIONS, request)),
        "bare, without logprobs": Form(GENERATE, _without_logprobs),
    }


def _without_logprobs(request: GenerateRequest) -> Mapping[str, object]:
    body = encode(GENERATE, request)
    sampling = body["sampling_params"]
    assert isinstance(sampling, dict)
    return {**body, "sampling_params": {**sampling, "logprobs": None}}
