"""A fleet on this host: starts its engines, proves what they hold, and ends them."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import TypeAdapter, ValidationError

from millrace import arguments
from millrace.config.models import (
    EmbeddedEngineConfig,
    EngineConfig,
    SGLangEngineConfig,
    TransportName,
    VLLMEngineConfig,
)
from millrace.config.routers import RouterConfig, SGLangRouterConfig, VLLMRouterConfig, check_router
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import API_KEY, Replica, start
from millrace.errors import ConfigError, LaunchError, PublishError
from millrace.fleet.event_log import EventLog
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.fleet import Fleet
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.starting import start_all
from millrace.http.hosts import require_known
from millrace.http.local import raise_file_limit
from millrace.imports import needs_extra
from millrace.launch.ports import is_here
from millrace.routers.start import start_router
from millrace.weights.cast import require_one_dtype
from millrace.weights.folder import folder_checksums
from millrace.weights.transports.base import TransportContext
from millrace.weights.transports.choice import TransportCandidate, choose, in_common
from millrace.weights.transports.registry import create

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore
    from millrace.weights.transports.base import Transport

CUMEM = "NCCL_CUMEM_ENABLE"

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_fleet(
    config: EngineConfig | Mapping[str, object],
    model_path: str | Path,
    *,
    log_dir: str | Path,
    version: int = 0,
    seed: int = 0,
    transport: TransportName = "auto",
    folder: str | Path | None = None,
    keep: int = 2,
    sidecars: Sequence[str] = (),
    restarts: int = 0,
    event_log: EventLog | None = None,
    frozen: bool = False,
    prefix: str | None = None,
    router: RouterConfig | None = None,
) -> AsyncIterator[Fleet]:
    """Launches `config.replicas` engines that serve the model in `model_path` as weight version `version`, or attaches
    to those that the config names.

    In rotation are those whose weights have the folder's checksums or, where an engine can't tell, that were started
    from this folder; another serves after its first publish. Logs go to `log_dir`. `transport` is how weights are
    published; in `folder`, a path or a URL of fsspec's, the last `keep` versions stay; `sidecars` are for `delta` and
    `ucx`, and their key is read from MILLRACE_SIDECAR_KEY (docs/weights.md). An engine that dies, hangs or holds other
    weights than it should is started anew up to `restarts` times in a row (docs/faults.md).
    Events go to `event_log` (docs/monitoring.md), which the caller closes. A `frozen` fleet is never published to
    (docs/judges.md). Engines are called `PREFIX-0` and so on, by default after their kind. `router` stands before
    them (docs/routers.md). The soft limit of open files of this process is raised to the hard one (docs/faults.md).

    Raises LaunchError when an engine does not come up (the others are ended), DataError when the folder is not a
    model's or `folder` not a store, PublishError when the engines can't take weights by that transport or compute in
    different dtypes, ConfigError when what it needs is not installed or `config`, which may be a mapping, is not an
    engine's, and ArgumentError for another argument of the wrong type.
    """
    engine, router = engine_config(config), router_config(router)
    model, logs = arguments.path("model_path", model_path), arguments.path("log_dir", log_dir)
    version, seed = arguments.whole("version", version), arguments.whole("seed", seed)
    keep, restarts = arguments.whole("keep", keep), arguments.whole("restarts", restarts)
    sidecars = arguments.texts("sidecars", sidecars)
    place = None if folder is None else arguments.location("folder", folder)
    if transport not in get_args(TransportName):
        raise ConfigError(f"transport {transport!r} is not known; valid here: {', '.join(get_args(TransportName))}")
    if router is not None:
        try:
            check_router(router, engine.kind)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if not isinstance(engine, EmbeddedEngineConfig):
        await require_known("engine.urls", engine.urls or ())
    if router is not None and router.url is not None:
        await require_known("router.url", [router.url])
    await require_known("publish.sidecars", sidecars)
    raise_file_limit()
    checksums = await asyncio.to_thread(folder_checksums, model)
    store = None
    if place is not None:
        with needs_extra(f"a store of versions ({place})"):
            from millrace.weights.store import ANCHOR_EVERY, VersionStore  # imports torch

        anchor_every = ANCHOR_EVERY if transport == "delta" else 1
        store = VersionStore(place, model, keep=keep, anchor_every=anchor_every)

    key = _shared_key(engine, router)
    if transport == "nccl" and isinstance(engine, SGLangEngineConfig):
        engine = engine.model_copy(update={"env": {**agreeing_on_memory(os.environ), **engine.env}})

    spec = LaunchSpec(model_path=model, log_dir=logs, version=version, seed=seed, prefix=prefix, api_key=key)

    async def start_one(replica: int) -> Replica:
        require_place(engine, replica)
        return await start(engine, replace(spec, replica=replica))

    starts = {f"{prefix or engine.kind}-{replica}": start_one(replica) for replica in range(engine.replicas)}
    started = await start_all(starts, logs)
    try:
        if not frozen:
            require_one_dtype(started)
        chosen = None if frozen else transport_for(transport, started, store, sidecars)
    except BaseException:
        await asyncio.gather(*(one.end() for one in started))
        raise
    before = None if router is None else partial(_before, router, key, logs)
    async with Fleet.open(
        started, chosen, store, start_one, restarts, event_log, seed, frozen=frozen, router=before
    ) as fleet:
        await fleet.attest(checksums, version, model)
        if frozen:  # who was started by somebody else may hold anything, and no publish will change that
            await fleet.restore(deadline=engine.start_timeout)
        yield fleet


def engine_config(config: object) -> EngineConfig:
    """The config, made of a mapping where it is one. Raises ConfigError where it is no engine's."""
    if isinstance(config, EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig):
        return config
    engine: EngineConfig = _validated(
        "config", TypeAdapter(EngineConfig), config, "EmbeddedEngineConfig(kind='embedded')"
    )
    return engine


def router_config(router: object) -> RouterConfig | None:
    """The same for a router's, which may be its name."""
    if router is None or isinstance(router, SGLangRouterConfig | VLLMRouterConfig):
        return router
    found: RouterConfig = _validated("router", TypeAdapter(RouterConfig), router, "'sglang' or 'vllm'")
    return found


def _validated(name: str, lora: "TypeAdapter[Any]", value: object, example: str) -> Any:
    if not isinstance(value, str | Mapping):
        raise ConfigError(f"{name} must be a config such as {example}, and is {arguments.shown(value)}")
    try:
        return lora.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ConfigError(f"{where}: {first['msg']}; {name} is such as {example}") from None


def agreeing_on_memory(environment: Mapping[str, str]) -> Mapping[str, str]:
    """What an SGLang is told so that it opens what this process, which has this environment, gives it by NCCL on the
    same host. It goes without NCCL's cuMem allocator unless it is told, and NCCL here goes by its own default, -2."""
    return {} if CUMEM in environment else {CUMEM: "-2"}


def require_place(config: EngineConfig, replica: int) -> None:
    """Raises LaunchError where the config says where each engine is to be, and nothing of this one."""
    named = {"urls": None if isinstance(config, EmbeddedEngineConfig) else config.urls, "ports": config.ports}
    for setting, places in named.items():
        if places is not None and replica >= len(places):
            raise LaunchError(f"engine.{setting} names {len(places)} engines; one more has no place there")


def _before(
    config: SGLangRouterConfig | VLLMRouterConfig,
    engine_key: str | None,
    log_dir: Path,
    members: ReplicaSet,
    event_log: EventLog,
) -> AbstractAsyncContextManager[ExternalRouter]:
    """The router before these engines."""
    return ExternalRouter.open(
        members,
        event_log,
        partial(start_router, config, log_dir=log_dir, engine_key=engine_key),
        fallback=config.fallback == "direct",
        restarts=config.restarts,
    )


def _shared_key(config: EngineConfig, router: SGLangRouterConfig | VLLMRouterConfig | None) -> str | None:
    """What opens every engine, where the router knows no key of each."""
    if not isinstance(router, VLLMRouterConfig):
        return None
    attached = not isinstance(config, EmbeddedEngineConfig) and config.urls is not None
    return os.environ.get(API_KEY) if attached else secrets.token_urlsafe(24)


def transport_for(
    wanted: TransportName, engines: Sequence[Replica], store: "VersionStore | None", sidecars: Sequence[str] = ()
) -> "Transport | None":
    """How this process hands tensors to these engines, which it logs; None where there is no way that all of them have.
    Raises PublishError where the one that is wanted is not possible."""
    if wanted == "auto" and store is None and not sidecars and find_spec("torch") is None:
        logger.info("weights can't be published from here: torch is not installed (pip install 'millrace[train]')")
        return None
    with needs_extra("publishing weights"):
        import torch

    candidates = [
        TransportCandidate(one.engine.name, is_here(one.engine.url), one.info.capabilities) for one in engines
    ]
    if wanted == "auto" and sidecars and store is not None:
        raise PublishError("sidecars can bring weights by delta, from the store, and by ucx; say which it is to be")
    choice = choose(
        wanted,
        candidates,
        trainer_has_gpu=torch.cuda.is_available(),
        folder=store is not None and store.shared,
        sidecars=bool(sidecars),
    )
    logger.info("weights go by %s: %s", choice.name, choice.why)
    if choice.name is None:
        return None
    if choice.name not in ("delta", "ucx"):
        if sidecars:
            raise PublishError(f"sidecars bring weights by delta or ucx, and they go by {choice.name}")
        here = all(candidate.here for candidate in candidates)
        context = TransportContext(capabilities=in_common(candidates), here=here, store=store)
        return create(choice.name, context)
    from millrace.weights.sidecar.server import SIDECAR_KEY
    from millrace.weights.transports.sidecars import assign

    context = TransportContext(
        capabilities=in_common(candidates),
        store=store,
        sidecars=assign({one.engine.name: one.engine.url for one in engines}, sidecars),
        sidecar_key=os.environ.get(SIDECAR_KEY),
    )
    return create(choice.name, context)
