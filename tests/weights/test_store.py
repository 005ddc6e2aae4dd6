"""Stored versions outlive a run, and engines that come back load them."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import DataError, NoEngineError, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.model_folder import stored_tensors
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.plan import buckets
from millrace.weights.store import VersionStore
from tests.fleet.signals import kill_engine
from tests.weights.variants import louder

Tensors = list[tuple[str, torch.Tensor]]
SMALL = 64 * 1024


@pytest.fixture
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


@pytest.fixture(params=["path", "URL"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "versions") if request.param == "path" else f"memory://{uuid4()}"


def times(tensors: Tensors, factor: float) -> Tensors:
    return [(name, tensor * factor) for name, tensor in tensors]


def put(store: VersionStore, tensors: Tensors, version: int) -> None:
    store.write(version, buckets(times(tensors, version), SMALL))
    store.secure(version)


def same(held: Iterator[tuple[str, torch.Tensor]], tensors: Tensors) -> bool:
    found = dict(held)
    return found.keys() == dict(tensors).keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors)


def test_the_last_versions_stay_and_come_back_as_they_were(url: str, tensors: Tensors, tiny_model: Path) -> None:
    store = VersionStore(url, tiny_model, keep=2)
    assert not store.versions
    for version in (1, 2, 3):
        put(store, tensors, version)
    assert store.versions == (2, 3)
    store.write(4, buckets(times(tensors, 4), SMALL))  # this version is never made safe
    store.close()
    again = VersionStore(url, tiny_model, keep=2)
    assert again.versions == (2, 3)
    assert same(again.tensors(2), times(tensors, 2))
    assert same(again.tensors(3), times(tensors, 3))
    with pytest.raises(PublishError, match="has no version 4"):
        list(again.tensors(4))
    # A run that resumes from before version 3 writes another version 3.
    put(again, times(tensors, 0.5), 3)
    assert again.versions == (2, 3)
    assert same(again.tensors(3), times(tensors, 1.5))
    put(again, tensors, 1)
    assert list(again.versions) == [1]
    again.close()


def test_damaged_tensors_are_not_handed_on(tensors: Tensors, tiny_model: Path, tmp_path: Path) -> None:
    store = VersionStore(str(tmp_path / "versions"), tiny_model, keep=2)
    put(store, tensors, 1)
    folder = tmp_path / "versions" / "version-00000001"
    name, tensor = max(stored_tensors(folder).items(), key=lambda item: item[1].end - item[1].begin)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.begin)
        byte = file.read(1)
        file.seek(tensor.begin)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PublishError, match=f"{name} is not what was written"):
        list(store.tensors(1))
    tensor.file.unlink()
    with pytest.raises(PublishError, match="has lost"):
        list(store.tensors(1))


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(DataError, match=r"index\.json is not a store's index"):
        VersionStore(str(tmp_path), tiny_model, keep=2)


def config(replicas: int = 2) -> EmbeddedEngineConfig:
    return EmbeddedEngineConfig(kind="embedded", replicas=replicas, threads=1)


async def greedy(fleet: Fleet, name: str) -> tuple[int | None, tuple[int, ...]]:
    request = GenerateRequest((5, 17, 300), SamplingParams(8, temperature=0.0, ignore_eos=True), request_id="one")
    generation = await fleet.engines[name].generate(request, deadline=20)
    return generation.version_spans[-1].version, generation.output_ids


async def test_an_engine_that_died_catches_up(tensors: Tensors, tiny_model: Path, tmp_path: Path) -> None:
    async with open_fleet(config(), tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        one, two = fleet.engines
        kill_engine(fleet, one)
        await fleet.restart(one)  # nothing was published yet
        assert await greedy(fleet, one) == await greedy(fleet, two)
        first = await greedy(fleet, two)
        for version, weights in enumerate((times(tensors, 2), louder(tensors)), 1):
            assert (await fleet.publish(weights, version, bucket_bytes=SMALL)).unstored is None
        kill_engine(fleet, one)
        await fleet.restart(one, bucket_bytes=SMALL)
        assert fleet.snapshot.get(one).routable
        assert await greedy(fleet, one) == await greedy(fleet, two)
        served, made = await greedy(fleet, one)
        assert served == 2
        assert made != first[1]
        assert not (await fleet.publish(tensors, 3, bucket_bytes=SMALL)).failed


async def test_without_a_store_it_serves_after_the_next_publish(
    tensors: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    async with open_fleet(config(1), tiny_model, log_dir=tmp_path) as fleet:
        (one,) = fleet.engines
        await fleet.publish(tensors, 1)
        await fleet.restart(one)
        request = GenerateRequest((5, 17, 300), SamplingParams(8), request_id="one")
        with pytest.raises(NoEngineError, match="without weights; publish a version"):
            await fleet.generate(request, deadline=0.2)
        await fleet.publish(tensors, 2)
        assert (await fleet.generate(request, deadline=20)).version_spans[-1].version == 2


async def test_a_version_that_can_not_be_stored_is_reported(tensors: Tensors, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    async with open_fleet(config(1), tiny_model, log_dir=tmp_path, folder=folder) as fleet:
        with pytest.raises(PublishError, match="an iterator can be read only once"):
            await fleet.publish(iter(tensors), 1)
        folder.write_text("in the way")
        report = await fleet.publish(tensors, 1)
        assert not report.failed
        assert report.unstored is not None
        assert "can't be written" in report.unstored
        folder.unlink()
        assert (await fleet.publish(tensors, 2)).unstored is None
    assert VersionStore(str(folder), tiny_model, keep=2).versions == (2,)


@pytest.mark.parametrize("nuls", [0, 9])
def test_an_index_cut_anywhere_starts_an_empty_store_and_a_foreign_file_is_refused(
    nuls: int, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "index.json"
    whole = b'{"versions":[{"version":1,"digest":"d"}]}'
    for cut in range(len(whole)):
        caplog.clear()
        index.write_bytes(whole[:cut] + b"\0" * nuls)
        assert VersionStore(str(tmp_path), tiny_model, keep=2).versions == ()
        assert "index.json is torn" in caplog.text
    index.write_bytes(whole + b"\0" * nuls)
    assert VersionStore(str(tmp_path), tiny_model, keep=2).versions == (1,)
    for other in (b'{"pages": [', b'{"versions":[3]}'):
        index.write_bytes(other)
        with pytest.raises(DataError, match="not a store's index"):
            VersionStore(str(tmp_path), tiny_model, keep=2)
