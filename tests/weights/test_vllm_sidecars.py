"""Publishing by delta to real vLLM: linear layers that vLLM packs for the CPU, and such that it keeps as they were
loaded, as on GPUs (`tests/vllm_unpacked`)."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import EngineFailed
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.deltas import check_a_changed_byte_is_found, check_only_changes_are_written, opened
from tests.weights.deltas import folder as folder
from tests.weights.deltas import logs as logs
from tests.weights.variants import read_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNPACKED = Path(__file__).parents[1] / "vllm_unpacked"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
FUSED = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["packed", "unpacked"])
def unpacked(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(vllm_python: Path, folder: Path, logs: Path, unpacked: bool) -> AsyncIterator[Replica]:
    config = VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        threads=1,
        start_timeout=START_TIMEOUT,
        env={"PYTHONPATH": str(UNPACKED)} if unpacked else {},
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=logs / str(unpacked)))
    yield started
    await started.end()


def written(log: Path) -> list[tuple[int, int]]:
    """Returns for each folder of how many tensors only what had changed was written, and how many there were."""
    found = re.findall(r"of (\d+) of its (\d+) tensors only what has changed", log.read_text())
    return [(int(count), int(every)) for count, every in found]


async def test_a_delta_changes_only_what_has_changed(
    replica: Replica, folder: Path, logs: Path, tmp_path: Path, unpacked: bool
) -> None:
    log = logs / str(unpacked) / "vllm-0.log"
    async with opened(replica, folder, tmp_path) as deltas:
        await check_only_changes_are_written(deltas, log)
    few = [(count, every) for count, every in written(log) if count]
    assert few
    assert all((count == every) is unpacked for count, every in few)


async def test_a_byte_that_was_changed_in_the_engine_is_found(
    replica: Replica, folder: Path, tmp_path: Path, unpacked: bool
) -> None:
    async with opened(replica, folder, tmp_path) as deltas:
        for name in (NORM, FUSED) if unpacked else (NORM,):
            await check_a_changed_byte_is_found(deltas, name)


async def test_changes_from_a_version_that_a_rank_does_not_hold_are_not_written(
    replica: Replica, folder: Path, tmp_path: Path
) -> None:
    engine = replica.engine
    assert isinstance(engine, VLLMEngine)
    async with opened(replica, folder, tmp_path) as deltas:
        checksums = await deltas.step()

        async def load(base: str) -> Any:
            await engine._extension.call("millrace_begin")
            changes = {"path": str(tmp_path / "missing"), "base": base}
            place = {"kind": "disk", "path": str(deltas.folder), "digest": "own", "changes": changes}
            return (await engine._extension.call("millrace_load", json.dumps(place)))[0]

        assert "holds another one" in (await load("another"))["whole"]
        await engine._extension.call("millrace_commit", "own")
        assert await engine.checksums() == checksums
        with pytest.raises(EngineFailed, match=f"could not write what has changed, from {tmp_path / 'missing'}"):
            await load("own")
        with pytest.raises(EngineFailed, match="failed half-way"):
            await engine._extension.call("millrace_commit", "torn")
        assert await engine._extension.call("millrace_abandon") == [{"torn": True}]
        assert "holds another one" in (await load("own"))["whole"]
        await engine._extension.call("millrace_commit", str(deltas.version))
        assert await engine.checksums() == checksums


async def test_a_tied_head_must_be_the_changed_embedding(
    replica: Replica, folder: Path, tmp_path: Path, unpacked: bool
) -> None:
    engine = replica.engine
    assert isinstance(engine, VLLMEngine)
    first = read_folder(folder)
    second = {name: tensor.clone() for name, tensor in first.items()}
    second[EMBEDDING][3, 5] += 1
    second[NORM] += 1
    at, to = torch.tensor([3 * second[EMBEDDING].shape[1] + 5], dtype=torch.int32), second[EMBEDDING][3, 5].reshape(1)
    few = {f"at/{EMBEDDING}": at, f"to/{EMBEDDING}": to}
    save_file(few, tmp_path / "changes", metadata={"whole": json.dumps([NORM])})

    async def load(name: str, weights: Mapping[str, torch.Tensor], head: torch.Tensor) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        save_file({**weights, "lm_head.weight": head.clone()}, tmp_path / name / "model.safetensors")
        changes = {"path": str(tmp_path / "changes"), "base": "first"}
        place = {"kind": "disk", "path": str(tmp_path / name), "digest": name, "changes": changes}
        await engine._extension.call("millrace_begin")
        return (await engine._extension.call("millrace_load", json.dumps(place)))[0]

    await load("first", first, first[EMBEDDING])
    await engine._extension.call("millrace_commit", "0")
    answer = await load("second", second, second[EMBEDDING])
    assert (answer["whole"] == "") is unpacked
    await engine._extension.call("millrace_commit", "0")
    by_changes = await engine.checksums()
    await load("first", first, first[EMBEDDING])
    await engine._extension.call("millrace_commit", "0")
    await load("other", second, first[EMBEDDING])
    with pytest.raises(EngineFailed, match="are one tensor in the model, but differ"):
        await engine._extension.call("millrace_commit", "0")
    assert await engine._extension.call("millrace_abandon") == [{"torn": True}]
    assert "holds another one" in (await load("again", second, second[EMBEDDING]))["whole"]
    await engine._extension.call("millrace_commit", "0")
    assert await engine.checksums() == by_changes
