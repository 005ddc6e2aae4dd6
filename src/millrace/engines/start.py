"""Start a replica from its settings: launch a server, or attach to one."""

import asyncio
import os
from dataclasses import dataclass, replace
from pathlib import Path

from millrace.config.engines import EmbeddedEngineConfig, EngineConfig
from millrace.engines.base import Engine
from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS, launch
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import given
from millrace.engines.stock.kv_events import require_packages
from millrace.engines.stock.model import read_model
from millrace.engines.stock.pair_launch import launch_pair
from millrace.errors import ConfigError, EngineError, EngineRefused, LaunchError
from millrace.launch.process import Server
from millrace.model_config import read_quantization
from millrace.quantisation import quantisation_of
from millrace.types import Capability, EngineInfo

# Environment variables with the keys of attached servers. Not settings: every run writes its config to its folder.
API_KEY, ADMIN_KEY = "MILLRACE_ENGINE_API_KEY", "MILLRACE_ENGINE_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True, repr=False)
class Replica:
    """An engine that answers.

    process: None if the server is attached to. kv_events: the endpoint at which the server publishes the contents of
    its KV cache. found: the server ran before: it is attached to, or taken over from an earlier owner. held: the
    version that it held then, by the earlier owner's record.
    """

    engine: Engine
    info: EngineInfo
    process: Server | None
    kv_events: str | None = None
    found: bool = False
    held: int | None = None

    def __repr__(self) -> str:
        return f"<Replica {self.engine.name} at {self.engine.url}>"

    async def end(self) -> None:
        """Close the connections, and end the process that was started here."""
        await self.engine.close()
        if self.process is not None:
            await self.process.end()


async def start(config: EngineConfig, spec: LaunchSpec) -> Replica:
    """Launch a replica, or attach to its server if the config has `urls`.

    Raises what `millrace.engines.kinds.launch` raises, and LaunchError if the server can't be attached to.
    """
    if config.urls is not None:
        return await _attach(config, config.urls[spec.replica], spec)
    if not isinstance(config, EmbeddedEngineConfig) and config.kv_events:
        require_packages()
    await _require_experts(config, spec.model_path)
    pair, launched = await _launched(config, spec)
    try:
        if launched.url is None:
            assert not isinstance(config, EmbeddedEngineConfig)
            raise LaunchError(
                f"node {config.node_rank} answers no HTTP; start it by `millrace engines join`, and the trainer on the "
                "host whose engine.node_rank is 0"
            )
        engine = pair or ENGINE_KINDS[config.kind].client(
            launched.name,
            launched.url,
            api_key=launched.api_key,
            admin_key=launched.admin_key,
            model_path=spec.model_path,
        )
        replica = await initialized(engine, spec.version, launched.process)
        if lacking := _lacks_experts(config, replica.info):
            await engine.close()
            raise ConfigError(f"{lacking}; leave out what disables that from engine.engine_args")
        replica = _asked(config, replica, spec.model_path)
        gpus = launched.gpus if len(launched.gpus) == replica.info.ranks else ()
        return replace(replica, info=replace(replica.info, gpus=gpus), kv_events=launched.kv_events)
    except BaseException:
        await launched.process.end()
        raise


async def _launched(config: EngineConfig, spec: LaunchSpec) -> tuple[HttpEngine | None, Launched]:
    """Launch a replica. Return its engine too, if that is more than one server."""
    pair = ENGINE_KINDS[config.kind].pair
    if not isinstance(config, EmbeddedEngineConfig) and config.prefill_decode is not None and pair is not None:
        return await launch_pair(config, spec, pair)
    return None, await launch(config, spec)


async def _attach(config: EngineConfig, url: str, spec: LaunchSpec) -> Replica:
    engine = ENGINE_KINDS[config.kind].client(
        spec.name(config.kind),
        url,
        api_key=os.environ.get(API_KEY),
        admin_key=os.environ.get(ADMIN_KEY),
        model_path=spec.model_path,
    )
    try:
        replica = replace(await initialized(engine, None, None), found=True)
    except EngineError as error:
        raise LaunchError(f"can't attach to {url}: {error}{about_keys(error)}") from error
    if lacking := _lacks_experts(config, replica.info):
        await replica.end()
        raise ConfigError(f"{lacking}; start the server with --enable-return-routed-experts")
    if config.dtype not in ("auto", replica.info.dtype):
        await replica.end()
        has = replica.info.dtype or "a dtype that it does not report (it was started with `--dtype auto`)"
        raise ConfigError(
            f"engine.dtype is {config.dtype}, and the server at {url} computes in {has}; leave engine.dtype out, or "
            f"start the server with --dtype {config.dtype}"
        )
    return _asked(config, replica, spec.model_path)


def _asked(config: EngineConfig, replica: Replica, model: Path) -> Replica:
    """Return the replica, with the quantisation that the config asks for, whatever the server reports."""
    option = None if isinstance(config, EmbeddedEngineConfig) else given(config).get("--quantization")
    if not isinstance(option, str):
        return replica
    asked = quantisation_of(option, read_quantization(model))
    return replace(replica, info=replace(replica.info, quantisation=asked))


async def _require_experts(config: EngineConfig, model: Path) -> None:
    """Raise ConfigError if routed experts are wanted of a model without experts, of which servers die obscurely."""
    if isinstance(config, EmbeddedEngineConfig) or not config.return_routed_experts:
        return
    if (await asyncio.to_thread(read_model, model)).experts is None:
        raise ConfigError(
            f"engine.return_routed_experts is for a mixture of experts, and {model} has no experts; leave it out"
        )


def _lacks_experts(config: EngineConfig, info: EngineInfo) -> str | None:
    """Return what is wrong if routed experts are wanted of a server that does not return them; otherwise None."""
    wanted = not isinstance(config, EmbeddedEngineConfig) and config.return_routed_experts
    if not wanted or Capability.ROUTED_EXPERTS in info.capabilities:
        return None
    return f"engine.return_routed_experts is set, and {info.kind} {info.engine_version} does not return them correctly"


def about_keys(error: EngineError) -> str:
    """Return a hint on where the server's keys are read from, if it refused a call because of its key."""
    wanted = isinstance(error, EngineRefused) and any(f"HTTP {status}" in str(error) for status in (401, 403))
    return f"; its keys are read from {API_KEY} and {ADMIN_KEY}" if wanted else ""


async def initialized(engine: HttpEngine, version: int | None, process: Server | None) -> Replica:
    """Prepare a server, and return its replica. `version`: as for `HttpEngine.initialize`."""
    try:
        await engine.initialize(version)
        return Replica(engine, await engine.info(), process)
    except BaseException:
        await engine.close()
        raise
