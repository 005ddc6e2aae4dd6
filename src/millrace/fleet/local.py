"""Open a fleet: start its engines or attach to them, verify their weights, and end them."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import TypeAdapter, ValidationError

from millrace import arguments
from millrace.config.engines import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.config.explain import explain
from millrace.config.models import TransportName
from millrace.config.routers import RouterConfig, SGLangRouterConfig, VLLMRouterConfig, check_router
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import API_KEY, Replica
from millrace.errors import ConfigError, PublishError
from millrace.fleet.event_log import EventLog
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.fleet import Fleet
from millrace.fleet.kept import KeptEngines
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.starting import Starter
from millrace.http.hosts import require_known
from millrace.http.local import raise_file_limit
from millrace.imports import needs_extra
from millrace.launch.claims import claimed_servers
from millrace.launch.launchers import open_launcher
from millrace.launch.ports import is_here
from millrace.routers.start import start_router
from millrace.weights.cast import require_one_dtype
from millrace.weights.folder import folder_checksums
from millrace.weights.transports.base import TransportContext
from millrace.weights.transports.choice import TransportCandidate, choose, in_common
from millrace.weights.transports.gpus import VisibleGpus
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
    keep_running: str | Path | None = None,
    orphan_seconds: float = 600.0,
) -> AsyncIterator[Fleet]:
    """Start the engines of a config, or attach to those at its `urls`, and return them as one fleet.

    An engine enters rotation at once if its weights have the checksums of the model's folder. An engine that reports
    no checksums does if it was started from this folder. Any other engine serves after its first publish. When the
    context ends, the engines that were started here are ended. This process's soft limit of open files is raised to
    its hard limit (docs/faults.md).

    Args:
        config: The engines: a config object, or a mapping with the same settings. `config.replicas` engines are
            started. If it is a range, the fleet chooses their number by its load (docs/clusters.md).
        model_path: The folder of the model.
        log_dir: Where the engines' logs go.
        version: The number of the weight version that the folder contains.
        seed: The engines' seed. It also decides between equal engines when requests are routed.
        transport: How published weights reach the engines (docs/weights.md).
        folder: Where published versions are stored, as a path or an fsspec URL. By default they are not stored.
        keep: The number of versions that stay in `folder`.
        sidecars: The URLs of the sidecars, for the transports `delta` and `ucx`. The environment variable
            MILLRACE_SIDECAR_KEY has their key.
        restarts: How often in a row an engine is restarted that dies, hangs or holds wrong weights (docs/faults.md).
        event_log: The event log, which the caller closes (docs/monitoring.md). By default events are only counted.
        frozen: Refuse every publish, as for a judge (docs/judges.md).
        prefix: The engines are named PREFIX-0, PREFIX-1 and so on. The default is the kind of the engine.
        router: An external router in front of the engines (docs/routers.md).
        keep_running: A folder for the record of the engines. If this process dies, they run on, and the next
            `open_fleet` with this folder takes them over (docs/sharing.md). By default they end with this process.
        orphan_seconds: How long they run without an owner, in seconds.

    Raises:
        LaunchError: An engine or the router does not start. The other engines are ended. Or another process on this
            host owns the engines, those at `urls` or in `keep_running`.
        DataError: `model_path` is not the folder of a model, `folder` is not a version store, or `keep_running` has
            no readable record.
        PublishError: The engines can't take weights by this transport, or compute in different dtypes.
        ConfigError: The config is invalid, or a package that it needs is not installed.
        ArgumentError: Another argument has the wrong type.

    Example:

        async with open_fleet({"kind": "sglang", "replicas": 2}, "models/Qwen3-0.6B", log_dir="logs") as fleet:
            await fleet.publish(lambda: list(model.named_parameters()), label=step)
            generation = await fleet.generate(request, deadline=60.0)
    """
    engine, router = engine_config(config), router_config(router)
    model, logs = arguments.path("model_path", model_path), arguments.path("log_dir", log_dir)
    version, seed = arguments.whole("version", version), arguments.whole("seed", seed)
    keep, restarts = arguments.whole("keep", keep), arguments.whole("restarts", restarts)
    orphan_seconds = arguments.real("orphan_seconds", orphan_seconds)
    sidecars = arguments.texts("sidecars", sidecars)
    place = None if folder is None else arguments.location("folder", folder)
    if transport not in get_args(TransportName):
        raise ConfigError(f"transport {transport!r} is unknown; valid here: {', '.join(get_args(TransportName))}")
    if router is not None:
        try:
            check_router(router, engine)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if keep_running is not None and isinstance(router, VLLMRouterConfig):
        raise ConfigError("keep_running does not work with vllm-router, whose engines get a new key at each start")
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

    async with AsyncExitStack() as owned:
        owned.enter_context(claimed_servers(() if frozen else engine.urls or ()))
        kept = None
        if keep_running is not None:
            record = arguments.path("keep_running", keep_running)
            kept = owned.enter_context(KeptEngines.open(record, orphan_seconds, engine, model))
        launcher = await owned.enter_async_context(open_launcher(engine.launch, engine.cluster))
        event_log = event_log if event_log is not None else EventLog()
        starter = Starter(engine, replace(spec, launcher=launcher), kept, event_log)
        started = await starter.start_all()
        try:
            if not frozen:
                require_one_dtype(started)
            spare = engine.scale is not None  # engines may start on the hosts of sidecars later
            chosen = None if frozen else transport_for(transport, started, store, sidecars, spare=spare)
        except BaseException:
            await asyncio.gather(*(one.end() for one in started))
            raise
        before = None if router is None else partial(_before, router, key, logs)
        fleet = await owned.enter_async_context(
            Fleet.open(
                started,
                chosen,
                store,
                starter.start,
                restarts,
                event_log,
                seed,
                frozen=frozen,
                kept=kept,
                router=before,
                scale=engine.scale,
            )
        )
        await fleet.attest(checksums, version, model)
        if frozen:  # an engine that was not started here may hold other weights, and no publish replaces them
            await fleet.restore(deadline=engine.start_timeout)
        yield fleet


def engine_config(config: object) -> EngineConfig:
    """Return the config of the engines, which may be a mapping. Raises ConfigError if it is invalid."""
    if isinstance(config, EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig):
        return config
    engine: EngineConfig = _validated("config", EngineConfig, config, "EmbeddedEngineConfig(kind='embedded')")
    return engine


def router_config(router: object) -> RouterConfig | None:
    """Return the config of the router, which may be a mapping or a name. Raises ConfigError if it is invalid."""
    if router is None or isinstance(router, SGLangRouterConfig | VLLMRouterConfig):
        return router
    found: RouterConfig = _validated("router", RouterConfig, router, "'sglang' or 'vllm'")
    return found


def _validated(name: str, kinds: Any, value: object, example: str) -> Any:
    """Return `value` as one of the settings models in the union `kinds`. Raises ConfigError, which calls it `name`."""
    if not isinstance(value, str | Mapping):
        raise ConfigError(f"{name} must be a config such as {example}, and is {arguments.shown(value)}")
    try:
        return TypeAdapter(kinds).validate_python(value)
    except ValidationError as error:
        _, message = explain(error.errors()[0], kinds, (name,))
        raise ConfigError(f"{message} (an example of {name} is {example})") from None


def agreeing_on_memory(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables with which SGLang's NCCL allocates memory as NCCL does in this process.

    Otherwise SGLang could not open the memory that this process shares by NCCL on the same host. SGLang disables NCCL's
    cuMem allocator unless the variable is set, and NCCL here uses its own default, -2. `environment` is that of this
    process.
    """
    return {} if CUMEM in environment else {CUMEM: "-2"}


def _before(
    config: SGLangRouterConfig | VLLMRouterConfig,
    engine_key: str | None,
    log_dir: Path,
    replicas: ReplicaSet,
    event_log: EventLog,
) -> AbstractAsyncContextManager[ExternalRouter]:
    """Return a context in which the external router runs."""
    return ExternalRouter.open(
        replicas,
        event_log,
        partial(start_router, config, log_dir=log_dir, engine_key=engine_key),
        fallback=config.fallback == "direct",
        restarts=config.restarts,
    )


def _shared_key(config: EngineConfig, router: SGLangRouterConfig | VLLMRouterConfig | None) -> str | None:
    """Return the API key of all engines, for a router that can't use one key for each. None for other routers."""
    if not isinstance(router, VLLMRouterConfig):
        return None
    return os.environ.get(API_KEY) if config.urls is not None else secrets.token_urlsafe(24)


def transport_for(
    wanted: TransportName,
    engines: Sequence[Replica],
    store: "VersionStore | None",
    sidecars: Sequence[str] = (),
    *,
    spare: bool = False,
) -> "Transport | None":
    """Return the transport by which this process publishes to these engines, and log the choice.

    spare: whether a sidecar may be on a host without an engine.

    Returns None if `wanted` is "auto" and no transport reaches all engines. Raises PublishError if the wanted transport
    is not possible.
    """
    if wanted == "auto" and store is None and not sidecars and find_spec("torch") is None:
        logger.info("weights can't be published from here: torch is not installed (pip install 'millrace[train]')")
        return None
    with needs_extra("publishing weights"):
        import torch

    has_gpu = torch.cuda.is_available()
    visible = VisibleGpus.here() if has_gpu and any(one.info.gpus for one in engines) else None
    candidates = [
        TransportCandidate(
            one.engine.name,
            is_here(one.engine.url),
            one.info.capabilities,
            unseen=visible.unseen(one.info.gpus) if visible is not None else (),
        )
        for one in engines
    ]
    if wanted == "auto" and sidecars and store is not None:
        raise PublishError("with sidecars and a store, both delta and ucx are possible; set transport to one of them")
    choice = choose(
        wanted,
        candidates,
        trainer_has_gpu=has_gpu,
        folder=store is not None and store.shared,
        sidecars=bool(sidecars),
    )
    logger.info("weights go by %s: %s", choice.name, choice.why)
    if choice.name is None:
        return None
    if choice.name not in ("delta", "ucx"):
        if sidecars:
            raise PublishError(f"sidecars can't be used by transport {choice.name}; they are for delta and ucx")
        here = all(candidate.here for candidate in candidates)
        context = TransportContext(capabilities=in_common(candidates), here=here, store=store)
        return create(choice.name, context)
    from millrace.weights.sidecar.server import SIDECAR_KEY
    from millrace.weights.transports.sidecars import assign

    assigned = assign({one.engine.name: one.engine.url for one in engines}, sidecars, spare=spare)
    context = TransportContext(
        capabilities=in_common(candidates),
        store=store,
        sidecars=assigned,
        spare_sidecars=tuple(url for url in sidecars if url not in assigned.values()),
        sidecar_key=os.environ.get(SIDECAR_KEY),
    )
    return create(choice.name, context)
