"""Versions as deltas: which of them the store keeps, and how a replica makes folders from them."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from fsspec import url_to_fs
from transformers import AutoModelForCausalLM

from millrace.errors import DataError, PublishError
from millrace.model_folder import stored_tensors
from millrace.weights.chain import Entry, Index, kept, way_to
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.plan import buckets
from millrace.weights.store import VersionStore

Tensors = list[tuple[str, torch.Tensor]]
SMALL = 64 * 1024


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


@pytest.fixture(params=["path", "URL"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "versions") if request.param == "path" else f"memory://{uuid4()}"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "versions")


@pytest.fixture
def stores(tiny_model: Path) -> "Iterator[Stores]":
    opened = Stores(tiny_model)
    yield opened
    for store in opened.opened:
        store.close()


class Stores:
    def __init__(self, model: Path) -> None:
        self.model = model
        self.opened: list[VersionStore] = []

    def __call__(self, url: str, keep: int = 2) -> VersionStore:
        self.opened.append(VersionStore(url, self.model, keep=keep, anchor_every=3))
        return self.opened[-1]


def stepped(tensors: Tensors, version: int, run: int = 0) -> Tensors:
    """Returns the tensors as after that many optimizer steps: a few elements of each have changed."""
    stepped = []
    for name, tensor in tensors:
        changed = tensor.clone().reshape(-1)
        changed[run::64] += version / 128
        stepped.append((name, changed.reshape(tensor.shape)))
    return stepped


def put(store: VersionStore, tensors: Tensors, *versions: int, run: int = 0) -> None:
    for version in versions:
        store.write(version, buckets(stepped(tensors, version, run), SMALL))
        store.secure(version)


def same(held: dict[str, torch.Tensor], tensors: Tensors) -> bool:
    return held.keys() == dict(tensors).keys() and all(torch.equal(held[name], tensor) for name, tensor in tensors)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Loads the folder as a program that knows nothing of Millrace."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def damage(folder: Path) -> None:
    tensor = max(stored_tensors(folder).values(), key=lambda tensor: tensor.end - tensor.begin)
    flip(tensor.file, tensor.begin)


def test_every_kept_version_can_be_made() -> None:
    entries = [Entry(version=n, base=None if n in (1, 4, 7) else n - 1, digest="") for n in range(1, 9)]
    Index(versions=tuple(entries))
    assert [e.version for e in kept(entries, 2)] == [7, 8]
    assert [e.version for e in kept(entries, 3)] == [4, 5, 6, 7, 8]
    start, deltas = way_to(entries, 6, frozenset())
    assert (start.version, [e.version for e in deltas]) == (4, [5, 6])
    start, deltas = way_to(entries, 6, {5, 8})
    assert (start.version, [e.version for e in deltas]) == (5, [6])
    for wrong in (entries[::-1], entries[1:], [*entries, entries[-1]]):
        with pytest.raises(ValueError, match="version"):
            Index(versions=tuple(wrong))


def test_a_replica_makes_each_version_of_what_it_has(
    url: str, tensors: Tensors, stores: Stores, tmp_path: Path
) -> None:
    store, folder = stores(url), tmp_path / "replica"
    replica = CheckpointMirror(url, folder)
    put(store, tensors, 1, 2, 3)
    for version in (1, 3):  # version 2 was never asked for
        path, _ = replica.bring(version)
        assert same(loaded(path), stepped(tensors, version))
    assert names(folder) == ["version-00000001", "version-00000003"]
    put(store, tensors, 4, 5)
    path, _ = replica.bring(5)
    assert same(loaded(path), stepped(tensors, 5))
    assert {"config.json", "tokenizer.json"} <= set(names(path))
    put(store, tensors, 6, 7, 8)
    # Made from version 7, an anchor, and not from version 5.
    assert same(loaded(replica.bring(8)[0]), stepped(tensors, 8))
    assert names(folder) == [".version-00000008.changes", "version-00000007", "version-00000008"]

    files, root = url_to_fs(url)
    files.invalidate_cache()
    listed = {entry["name"].rpartition("/")[2]: entry["size"] for entry in files.ls(root, detail=True)}
    assert sorted(listed) == ["index.json", "version-00000007", "version-00000008.delta"]
    assert listed["version-00000008.delta"] < sum(tensor.nbytes for _, tensor in tensors) / 20
    for version in (7, 8):
        assert same(dict(store.tensors(version)), stepped(tensors, version))
        assert same(dict(stores(url).tensors(version)), stepped(tensors, version))  # read by a new store object
    replica.close()


def test_a_version_that_changes_everything_is_kept_whole(path: str, tensors: Tensors, stores: Stores) -> None:
    store = stores(path)
    put(store, tensors, 1)
    for version in (2, 3):
        noise = [(name, torch.randint(-(2**31), 2**31 - 1, t.shape).to(torch.int32)) for name, t in tensors]
        store.write(version, buckets(noise, SMALL))
        store.secure(version)
    assert names(path) == ["index.json", "version-00000002", "version-00000003"]
    half = [(name, tensor.to(torch.complex64)) for name, tensor in tensors]  # no delta can hold this dtype
    store.write(4, buckets(half, SMALL))
    store.secure(4)
    assert same(dict(store.tensors(4)), half)


def test_the_base_of_a_delta_is_a_secured_version(path: str, tensors: Tensors, stores: Stores, tmp_path: Path) -> None:
    store, replica = stores(path), CheckpointMirror(path, tmp_path / "replica")
    put(store, tensors, 1)
    store.write(2, buckets(stepped(tensors, 20), SMALL))  # this version is never made safe
    put(store, tensors, 3)
    assert store.versions == (1, 3)
    assert "version-00000003.delta" in names(path)
    assert same(loaded(replica.bring(3)[0]), stepped(tensors, 3))
    replica.close()


def test_another_run_has_other_versions(url: str, tensors: Tensors, stores: Stores, tmp_path: Path) -> None:
    replica = CheckpointMirror(url, tmp_path / "replica")
    put(stores(url), tensors, 1, 2, 3)
    first = [replica.bring(version)[1] for version in (2, 3)]
    resumed = stores(url)
    put(resumed, tensors, 2, 3, run=1)  # it does not have version 1 of the first run, and begins with an anchor
    assert same(dict(resumed.tensors(3)), stepped(tensors, 3, run=1))
    for version in (3, 2):
        folder, digest = replica.bring(version)
        assert digest not in first
        assert same(loaded(folder), stepped(tensors, version, run=1))
    replica.close()


def test_damage_is_reported_or_repaired(path: str, tensors: Tensors, stores: Stores, tmp_path: Path) -> None:
    folder, store = tmp_path / "replica", stores(path)
    with pytest.raises(PublishError, match=r"has no version 1; it has \(\)"):
        CheckpointMirror(path, tmp_path / "other").bring(1)
    put(store, tensors, 1, 2)
    replica = CheckpointMirror(path, folder)
    with pytest.raises(DataError, match="in use by another sidecar"):
        CheckpointMirror(path, folder)
    assert same(loaded(replica.bring(1)[0]), stepped(tensors, 1))

    delta = Path(path) / "version-00000002.delta"
    whole = delta.read_bytes()
    for offset in (len(whole) - 1, 200):
        flip(delta, offset)
        with pytest.raises(DataError, match=r"version-00000002\.delta is"):
            replica.bring(2)
        delta.write_bytes(whole)
    assert names(folder) == ["version-00000001"]

    damage(folder / "version-00000001")  # the replica's own copy, which it makes again
    assert same(loaded(replica.bring(2)[0]), stepped(tensors, 2))
    replica.close()

    damage(folder / "version-00000002")  # between two processes
    (folder / "version-00000001" / "checksums.json").unlink()
    (folder / ".making").mkdir()
    (folder / ".version-00000003.delta").touch()
    again = CheckpointMirror(path, folder)
    assert names(folder) == ["version-00000002"]
    assert same(loaded(again.bring(2)[0]), stepped(tensors, 2))
    again.close()

    damage(Path(path) / "version-00000001")
    with pytest.raises(DataError, match="version 1 is damaged in"):
        CheckpointMirror(path, tmp_path / "third").bring(2)
    assert not names(tmp_path / "third")


def test_a_full_disk_leaves_the_existing_versions(path: str, tensors: Tensors, stores: Stores, tmp_path: Path) -> None:
    replica = CheckpointMirror(path, tmp_path / "replica")
    put(stores(path), tensors, 1, 2)
    replica.bring(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(PublishError, match=r"version 2 can't be copied from .*File too large"):
            replica.bring(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "replica") == ["version-00000001"]
    assert same(loaded(replica.bring(2)[0]), stepped(tensors, 2))
    replica.close()


def test_many_may_ask_at_once(path: str, tensors: Tensors, stores: Stores, tmp_path: Path) -> None:
    replica = CheckpointMirror(path, tmp_path / "replica")
    put(stores(path), tensors, 1, 2)
    brought: list[tuple[Path, str]] = []
    threads = [threading.Thread(target=lambda: brought.append(replica.bring(2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(brought) == 4
    assert len(set(brought)) == 1
    replica.close()
