"""The weight loader writes what has changed between two versions on its host, and compares parameters with a folder."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors import safe_open

from millrace.checksum import sampled_checksums
from millrace.engines.answers import AnswerFiles
from millrace.engines.sglang.loading import LoaderUpdate, in_files
from millrace.engines.stock.launching import EXTENSION
from millrace.engines.stock.state import InvalidStateError
from millrace.weights.building import build
from millrace.weights.chain import CHECKSUMS, FullCheckpoint
from millrace.weights.delta import read_delta, write_delta
from millrace.weights.folder import write_folder
from tests.engines.sglang.test_loader import Deriving, Model, loaded, require_same, weights

Tensors = Mapping[str, torch.Tensor]
CHANGED = (3, 6, 7, 12, 28, 35, 36, 44, 53, 62)  # elements of a tensor, in both halves of its rows and its columns


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module, Any], None]:
    monkeypatch.syspath_prepend(str(EXTENSION))
    import millrace_sglang  # type: ignore[import-not-found]

    loader: Callable[[torch.nn.Module, Any], None] = millrace_sglang.load
    return loader


def version(number: int) -> Tensors:
    """The first version, or a later one in which some tensors have changed in part, as a whole, or not at all."""
    tensors = weights(0)
    for step in range(1, number):
        for index, (name, tensor) in enumerate(tensors.items()):
            if (index + step) % 3 == 0:
                tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
            elif (index + step) % 3 == 1:
                flat = tensor.reshape(-1)
                flat[list(CHANGED[step % 2 :: 2])] += 1.0
    return tensors


class Host:
    """Versions in folders, as a sidecar builds them, and a model whose loader reads them."""

    def __init__(self, load: Callable[[torch.nn.Module, Any], None], place: Path) -> None:
        self.place, self.load, self.files = place, load, AnswerFiles(1)
        self.model: torch.nn.Module = Model()
        (place / "model").mkdir()
        self._written(write_folder(place / "1", iter([list(version(1).items())]), place / "model").checksums, 1)
        for number in (2, 3, 4):
            before, delta = FullCheckpoint(place / str(number - 1)), place / f"{number}.delta"
            pairs = ((name, before.get(name), tensor) for name, tensor in version(number).items())
            write_delta(delta, number - 1, number, pairs)
            opened = read_delta(delta)
            build(place / str(number), before, [opened], 1000, place / f"{number}.changes")
            self._written({name: tensor.checksum for name, tensor in opened.tensors.items()}, number)

    def _written(self, checksums: Mapping[str, str], number: int) -> None:
        (self.place / str(number) / CHECKSUMS).write_bytes(orjson.dumps(dict(checksums)))

    def order(self, number: int, *, changes: bool = False) -> LoaderUpdate:
        """Let the loader write the changes of a version, or only compare. Raises as the adapter does."""
        update, file = LoaderUpdate("sglang-0"), str(self.place / f"{number}.changes") if changes else None
        [order] = update.orders_of_folder(str(self.place / str(number)), file, in_files(self.files.answers()))
        self.load(self.model, [(order, torch.empty(0))])
        texts = self.files.read()
        self.why_not = update.why_no_folder(texts)
        if self.why_not is None:
            update.take_parts(texts)
        return update


@pytest.fixture
def host(load: Callable[[torch.nn.Module, Any], None], tmp_path: Path) -> Iterator[Host]:
    host = Host(load, tmp_path)
    yield host
    host.files.close()


def test_changes_make_the_next_version(host: Host) -> None:
    assert isinstance(host.model, Model)
    host.model.load_weights(version(1).items())
    host.order(1)
    for number in (2, 3, 4):
        update, sent = host.order(number, changes=True), version(number)
        require_same(host.model, loaded(sent))
        assert update.samples == dict(zip(sent, sampled_checksums(list(sent.values())), strict=True))
    assert host.model.loads == 2  # one of them was the dry run


def test_a_few_changes_are_positions_and_values(host: Host) -> None:
    for number in (2, 3, 4):
        before, after = version(number - 1), version(number)
        with safe_open(host.place / f"{number}.changes", framework="pt") as file:
            whole = json.loads(file.metadata()["whole"])
            few = {name.removeprefix("at/") for name in file.keys() if name.startswith("at/")}  # noqa: SIM118
            for name in few:
                old, at = before[name].reshape(-1).clone(), file.get_tensor(f"at/{name}")
                old[at.long()] = file.get_tensor(f"to/{name}")
                assert torch.equal(old, after[name].reshape(-1))
        assert whole
        assert few
        unchanged = after.keys() - {*whole, *few}
        assert all(torch.equal(before[name], after[name]) for name in unchanged)


def test_other_weights_are_found(host: Host) -> None:
    assert isinstance(host.model, Model)
    host.model.load_weights(version(1).items())
    host.order(1)
    with pytest.raises(InvalidStateError, match="do not hold what is in"):
        host.order(3, changes=True)  # the model holds version 1, and they change version 2
    with pytest.raises(InvalidStateError, match="do not hold what is in"):
        host.order(4)


def test_a_model_that_computes_something_is_read_whole(host: Host) -> None:
    host.model = Deriving()
    host.order(1)
    assert host.why_not is not None
    assert "more than copy" in host.why_not
    host.model = Model()  # its parameters are not the folder's, as if SGLang had made something of them
    host.order(2)
    assert "do not hold what is in" in host.why_not
    with pytest.raises(InvalidStateError, match="could not load the tensors"):
        host.order(3, changes=True)
