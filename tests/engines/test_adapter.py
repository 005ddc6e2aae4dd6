"""Parts of the adapter's contract that a fleet does not use yet: buckets from disk and from a process group."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import torch.distributed as dist
from safetensors import safe_open

from millrace import EmbeddedEngineConfig, open_fleet
from millrace.buckets import DiskBucket, ProcessGroup, ProcessGroupBucket
from millrace.checksum import checksum
from millrace.config.sources import TinyModelConfig
from millrace.engines.base import Engine
from millrace.errors import EngineRefused
from millrace.launch.ports import free_port
from millrace.train.tiny import make_tiny_model
from millrace.types import Health, PauseMode
from millrace.weights.folder import folder_checksums
from millrace.weights.plan import layout

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet.engines["embedded-0"]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 1, folder)
    return folder


async def test_a_folder_is_a_bucket_like_another(engine: Engine, other_model: Path, tiny_model: Path) -> None:
    before = await engine.checksums()
    await engine.begin_update(1)
    await engine.load(DiskBucket(str(other_model)), deadline=30)
    assert await engine.checksums() == folder_checksums(other_model)
    assert (await engine.info()).weight_version == 0  # the version is not set before the commit
    await engine.rollback()
    assert await engine.checksums() == before == folder_checksums(tiny_model)

    await engine.begin_update(2)
    await engine.load(DiskBucket(str(other_model)), deadline=30)
    await engine.commit()
    assert (await engine.info()).weight_version == 2
    assert await engine.checksums() == folder_checksums(other_model)
    with pytest.raises(EngineRefused, match="commit without begin_update"):
        await engine.commit()


async def test_a_bucket_is_broadcast_over_a_group(engine: Engine, tiny_model: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in shapes(tiny_model).items()}
    port = free_port("127.0.0.1")
    group = ProcessGroup("weights", "gloo", "127.0.0.1", port, rank_offset=1, world_size=2)
    joining = asyncio.create_task(engine.join_group(group, deadline=30))
    sender = await asyncio.to_thread(join_as_sender, port)
    await joining
    specs = layout([(name, "float32", tuple(t.shape), t.nbytes) for name, t in tensors.items()])
    await engine.begin_update(3)
    loading = asyncio.create_task(engine.load(ProcessGroupBucket("weights", specs), deadline=30))
    await asyncio.to_thread(broadcast, sender, list(tensors.values()))
    await loading
    await engine.commit()
    assert (await engine.info()).weight_version == 3
    zeros = {name: checksum(tensor.numpy().data) for name, tensor in tensors.items()}
    assert await engine.checksums() == zeros
    await engine.leave_group("weights")
    sender.shutdown()


def shapes(model: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def join_as_sender(port: int) -> Any:
    """Joins as rank 0, by torch's own helper for a group of this name."""
    deadline = timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=deadline)
    prefixed = dist.PrefixStore("weights", store)
    backend = dist.Backend("gloo")
    make = dist.distributed_c10d._new_process_group_helper
    group, _ = make(2, 0, [], backend, prefixed, group_name="weights", timeout=deadline)
    return group


def broadcast(group: Any, tensors: list[torch.Tensor]) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    for tensor in tensors:
        group.broadcast([tensor], options).wait()


async def test_paused_is_neither_ready_nor_dead(engine: Engine) -> None:
    assert await engine.health() is Health.READY
    for mode in PauseMode:
        await engine.pause(mode)
        await engine.pause(mode)  # a second pause does nothing
        assert await engine.health() is Health.PAUSED
        await engine.resume()
        await engine.resume()
    await engine.sleep()
    assert await engine.health() is Health.ASLEEP
    await engine.wake()
    await engine.flush_cache(deadline=5)
