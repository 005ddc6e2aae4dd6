"""Publishing to real SGLang by sidecars, loaded by Millrace's weight loader.

The server has this machine's own address, as on another host, so the loader does not answer to the trainer's process.
"""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.errors import PublishError
from millrace.types import Capability
from millrace.weights.transports.base import TransportContext
from millrace.weights.transports.registry import create
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.corruption import CorruptingTransport, Corruption
from tests.weights.deltas import (
    KEY,
    check_a_changed_byte_is_found,
    check_only_changes_are_written,
    opened,
    publish,
    sidecar,
)
from tests.weights.deltas import folder as folder
from tests.weights.deltas import logs as logs
from tests.weights.variants import PROMPTS, SHORT, greedy, louder, read_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSION = "0.5.23"
Tokens = list[tuple[int, ...]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(sglang_python: Callable[[str], Path], folder: Path, logs: Path) -> AsyncIterator[Replica]:
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        host=socket.gethostbyname(socket.gethostname()),
        python=sglang_python(VERSION),
        version=VERSION,
        threads=1,
        start_timeout=START_TIMEOUT,
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=logs))
    yield started
    await started.end()


@pytest.fixture(scope="module")
def engine(replica: Replica) -> Engine:
    return replica.engine


async def made(engine: Engine) -> Tokens:
    return [(await greedy(engine, prompt, "one", SHORT)).output_ids for prompt in PROMPTS]


async def test_buckets_over_ucx_are_loaded_and_checked_by_the_loader(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    own, tokens = list(read_folder(folder).items()), await made(engine)
    capabilities = (await engine.info()).capabilities
    assert Capability.SAMPLED_CHECKSUMS in capabilities
    async with AsyncExitStack() as stack:
        url = stack.enter_context(sidecar("--device", "cpu"))
        context = TransportContext(capabilities=capabilities, sidecars={engine.name: url}, sidecar_key=KEY)
        transport = CorruptingTransport(create("ucx", context), tmp_path)
        stack.push_async_callback(transport.close)
        await publish(engine, louder(own), 1, transport)
        assert await made(engine) != tokens
        await publish(engine, own, 2, transport)
        assert await made(engine) == tokens

        transport.corruption = Corruption(None)
        with pytest.raises(PublishError, match="tensors are not what was sent"):
            await publish(engine, louder(own), 3, transport)
        assert transport.done
        await publish(engine, own, 3, transport)
        assert await made(engine) == tokens


async def test_a_delta_changes_only_what_has_changed(
    replica: Replica, folder: Path, logs: Path, tmp_path: Path
) -> None:
    async with opened(replica, folder, tmp_path) as deltas:
        await check_only_changes_are_written(deltas, logs / "sglang-0.log")


async def test_a_byte_that_was_changed_in_the_engine_is_found(replica: Replica, folder: Path, tmp_path: Path) -> None:
    async with opened(replica, folder, tmp_path) as deltas:
        for name in ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
            await check_a_changed_byte_is_found(deltas, name)
