"""Prefill and decode servers as one replica on GPUs, with NIXL as it is: both servers on one GPU, and on two.

The engine's environment needs NIXL: both engines import `nixl._api` and `nixl._bindings`. The wheel `nixl` has these
names only, and takes the package of torch's CUDA. For CUDA 13 and Python 3.12, without dependencies:

    pip install --no-deps nixl==1.5.1 nixl-cu13==1.5.1

SGLang 0.5.15 and vLLM 0.23.0 need the same two wheels (12 kB and 59 MB). `nixl_ep_cu13` of the second (two thirds of
it) is never imported, nor are its plugins other than `libplugin_UCX.so`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from millrace.config.engines import PrefillDecodeConfig, SGLangEngineConfig
from millrace.engines.stock.interpreter import StockConfig
from millrace.fleet.local import open_fleet
from millrace.types import Capability
from tests.fleet.prefill_decode import (
    Bounds,
    Made,
    check_generates_as_a_lone_server,
    check_pause_and_abort,
    check_publish,
    check_recovery,
    engine_of,
    generated_alone,
    make_models,
    on_cpu,
)

# In half precision, another batch gives other logprobs, and now and then another token.
HALF = Bounds(alike=0.6, logprobs=0.25, long=3000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def small(config: StockConfig, tmp_path_factory: pytest.TempPathFactory) -> StockConfig:
    """The engine with little memory, so that several servers have room on one GPU."""
    if config.device == "cpu":
        return on_cpu(config, tmp_path_factory.mktemp("nixl"))
    if isinstance(config, SGLangEngineConfig):
        return config.model_copy(update={"mem_fraction_static": 0.3, "max_total_tokens": 32768})
    return config.model_copy(update={"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 256 * 1024 * 1024})


@pytest.fixture(scope="module")
def alone(small: StockConfig, models: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> Sequence[Made]:
    """What a lone server makes with each model."""
    return asyncio.run(generated_alone(small, models, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(
    "places",
    [
        pytest.param({"cuda_visible_devices": "0,0"}, id="on one GPU"),
        pytest.param({}, id="on two GPUs"),
        pytest.param({"tp_size": 2, "cuda_visible_devices": "0,1,0,1"}, id="over two GPUs each"),
    ],
)
def test_it_is_one_replica(
    small: StockConfig,
    places: Mapping[str, object],
    models: Sequence[Path],
    alone: Sequence[Made],
    tmp_path: Path,
) -> None:
    one_gpu = places == {"cuda_visible_devices": "0,0"}
    if not one_gpu and (small.device == "cpu" or torch.cuda.device_count() < 2):
        pytest.skip("it takes two GPUs")
    bounds = HALF if small.device == "cuda" else Bounds()
    pair = small.model_copy(update={"prefill_decode": PrefillDecodeConfig(), **places})

    async def hold() -> None:
        async with open_fleet(pair, models[0], log_dir=tmp_path, folder=tmp_path / "versions", restarts=2) as fleet:
            assert (Capability.SLEEP in fleet.capabilities) == (pair.device == "cpu")
            print([(server.url, (await server.info()).gpus) for server in engine_of(fleet).servers])
            await check_generates_as_a_lone_server(fleet, alone, bounds)
            print("it generates as a lone server")
            await check_publish(fleet, models, alone, bounds)
            print("publishes reach both sides")
            await check_pause_and_abort(fleet, bounds)
            print("pauses and aborts reach both sides")
            await check_recovery(fleet, alone[0], bounds)
            print("it comes back as a whole")

    asyncio.run(hold())
