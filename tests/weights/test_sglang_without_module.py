"""A server that names Millrace's weight loader and can't import it: SGLang ends when it is to load."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import millrace
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.sglang.loading import LOADER
from millrace.errors import EngineError, EnginesLost
from millrace.launch.ports import free_port
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.variants import read_folder

SERVE = Path(millrace.__file__).parent / "engines" / "sglang" / "serve.py"
ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none --dtype float32 "
    "--skip-server-warmup --max-total-tokens 4096"
)


@asynccontextmanager
async def started_by_hand(python: Path, folder: Path, log: Path) -> AsyncIterator[SGLangEngine]:
    """Start the server as docs/sglang.md says, with the loader's name and without its folder."""
    port = free_port("127.0.0.1")
    settings = {"MILLRACE_API_KEY": "", "MILLRACE_ADMIN_API_KEY": "", "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": ""}
    arguments = [str(SERVE), "--model-path", str(folder), "--port", str(port), "--custom-weight-loader", LOADER]
    with log.open("wb") as output:
        server = await asyncio.create_subprocess_exec(
            python, *arguments, *ARGUMENTS.split(), env={**os.environ, **settings}, stdout=output, stderr=output
        )
    engine = SGLangEngine("sglang-0", f"http://127.0.0.1:{port}", model_path=folder)
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                assert server.returncode is None
                try:
                    await engine.initialize()
                    break
                except EngineError:
                    await asyncio.sleep(0.5)
        yield engine
    finally:
        await engine.close()
        if server.returncode is None:
            server.terminate()
        await asyncio.wait_for(server.wait(), 60)


@pytest.mark.slow
async def test_the_error_says_that_the_module_may_be_missing(
    sglang_python: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    async with started_by_hand(sglang_python("0.5.23"), tiny_model, log) as engine:
        target = PublishTarget(engine, await engine.info())
        transport = create("shm", TransportContext(capabilities=target.info.capabilities))
        source = source_of(list(read_folder(tiny_model).items()))
        publish = Publish([target], source, 1, transport, bucket_bytes=2**20, deadline=60)
        with pytest.raises(EnginesLost, match="no module named millrace_sglang, put the folder"):
            await publish.run()
        await transport.close()
    assert "No module named 'millrace_sglang'" in log.read_text()
