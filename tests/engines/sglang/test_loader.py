"""The weight loader that SGLang's processes run, on models that load as SGLang's do: fused, cut, padded and tied."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.buckets import TensorSpec
from millrace.checksum import sampled_checksums
from millrace.engines.answers import AnswerFiles
from millrace.engines.sglang.loading import LoaderUpdate, in_files
from millrace.engines.stock.launching import EXTENSION
from millrace.engines.stock.state import InvalidStateError
from millrace.errors import EngineFailed
from millrace.weights.transports.layouts import layout_of

Tensors = Mapping[str, torch.Tensor]
VOCAB, PADDED, HIDDEN = 10, 16, 8


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module, Any], None]:
    monkeypatch.syspath_prepend(str(EXTENSION))
    import millrace_sglang  # type: ignore[import-not-found]

    assert Path(millrace_sglang.__file__).is_relative_to(EXTENSION)
    loader: Callable[[torch.nn.Module, Any], None] = millrace_sglang.load
    return loader


class Model(torch.nn.Module):
    """Rank 1 of 2: half of each matrix's rows, or of its columns. q, k and v are one parameter, and so are the experts.
    loads: how often its own loader ran."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(PADDED, HIDDEN), requires_grad=False)
        self.qkv = torch.nn.Parameter(torch.zeros(3 * HIDDEN // 2, HIDDEN), requires_grad=False)
        self.out = torch.nn.Parameter(torch.zeros(HIDDEN, HIDDEN // 2), requires_grad=False)
        self.experts = torch.nn.Parameter(torch.zeros(2, HIDDEN, HIDDEN), requires_grad=False)
        self.loads = 0

    def load_weights(self, weights: Any) -> None:
        self.loads += 1
        half = HIDDEN // 2
        for name, tensor in weights:
            match name.split("."):
                case ["embed"]:
                    self.embed.data[:VOCAB].copy_(tensor)
                    self.embed.data[VOCAB:].fill_(0)
                case ["q" | "k" | "v" as part]:
                    place = "qkv".index(part) * half
                    self.qkv.data.narrow(0, place, half).copy_(tensor.narrow(0, half, half))
                case ["out"]:
                    self.out.data.copy_(tensor.narrow(1, half, half))
                case ["experts", number]:
                    self.experts.data[int(number)].copy_(tensor.t())
                case _:
                    raise KeyError(name)


class Deriving(Model):
    """A model that computes something from its weights when they are loaded."""

    norm = torch.zeros(())

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.norm = self.qkv.data.abs().sum()


def weights(seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    square = ("q", "k", "v", "out", "experts.0", "experts.1")
    shapes = {"embed": (VOCAB, HIDDEN), **dict.fromkeys(square, (HIDDEN, HIDDEN))}
    return {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}


def packed(tensors: Tensors) -> torch.Tensor:
    """The bytes of a bucket, with some that belong to no tensor."""
    specs = layout_of(list(tensors.items())).specs
    bucket = torch.zeros(specs[-1].offset + specs[-1].nbytes + 3, dtype=torch.uint8)
    for spec, tensor in zip(specs, tensors.values(), strict=True):
        bucket[spec.offset : spec.offset + spec.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return bucket


class Sender:
    """Sends buckets to the loader of a model, as the adapter does."""

    def __init__(self, load: Callable[[torch.nn.Module, Any], None], model: torch.nn.Module) -> None:
        self.load, self.model, self.files = load, model, AnswerFiles(1)
        self.begin()

    def begin(self) -> None:
        self.update = LoaderUpdate("sglang-0")

    def send(self, tensors: Tensors) -> Mapping[str, Any]:
        """Send one bucket, and return the answer."""
        return self.order(layout_of(list(tensors.items())).specs, packed(tensors))

    def order(self, specs: tuple[TensorSpec, ...], bucket: torch.Tensor) -> Mapping[str, Any]:
        [order] = self.update.orders(specs, in_files(self.files.answers()))
        self.load(self.model, [(order, bucket)])
        [text] = self.files.read()
        answer: Mapping[str, Any] = json.loads(text)
        self.update.take(specs, [text])
        return answer


@pytest.fixture
def sender(load: Callable[[torch.nn.Module, Any], None]) -> Iterator[Sender]:
    sender = Sender(load, Model())
    yield sender
    sender.files.close()


def layouts_of(model: torch.nn.Module) -> list[Any]:
    """Those that the loader keeps."""
    return list(sys.modules["millrace_sglang.loader"].LOADERS[model].layouts.values())


def loaded(tensors: Tensors) -> Model:
    model = Model()
    model.load_weights(tensors.items())
    return model


def require_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_later_buckets_are_loaded_without_the_models_own_loader(sender: Sender) -> None:
    assert isinstance(sender.model, Model)
    for seed in range(3):
        sender.begin()
        tensors = weights(seed)
        answer = sender.send(tensors)
        require_same(sender.model, loaded(tensors))
        assert answer["samples"] == "".join(sampled_checksums(list(tensors.values())))
        assert (answer["missing"], sender.update.missing) == (0, "")
    assert sender.model.loads == 1


def test_constants_are_written_again(sender: Sender) -> None:
    """A parameter loses its padding too when its memory is released."""
    sender.send(weights(0))
    assert isinstance(sender.model, Model)
    sender.model.embed.data.fill_(7)
    sender.begin()
    sender.send(weights(1))
    assert sender.model.loads == 1
    require_same(sender.model, loaded(weights(1)))


def test_a_constant_over_a_copy_makes_no_plan(load: Callable[[torch.nn.Module, Any], None]) -> None:
    class Erasing(Model):
        def load_weights(self, weights: Any) -> None:
            super().load_weights(weights)
            self.embed.data[VOCAB - 1 :].fill_(0)

    sender = Sender(load, Erasing())
    assert sender.send(weights(0))["unplanned"] == "a constant over a copy into embed"
    sender.files.close()


def test_layouts_that_are_not_used_again_are_forgotten(sender: Sender) -> None:
    for start in range(4):  # in buckets that are others each time
        sender.begin()
        items = list(weights(0).items())
        sender.send(dict(items[start:]))
        assert len(layouts_of(sender.model)) == min(start + 1, 2)


def test_an_update_in_several_buckets_is_complete_with_the_last(sender: Sender) -> None:
    items = list(weights(0).items())
    for _ in range(2):
        sender.begin()
        counts = [sender.send(dict(items[start : start + 2]))["missing"] for start in (0, 2, 4, 6)]
        assert counts == [3, 2, 1, 0]
    sender.begin()
    sender.send(dict(items[:3]))
    assert sender.update.missing == "3 of its parameters lack content of this version, such as experts, out, qkv"


def test_a_model_that_computes_something_is_loaded_by_its_own_loader(
    load: Callable[[torch.nn.Module, Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = Deriving()
    sender = Sender(load, model)
    for seed in range(3):
        sender.begin()
        tensors = weights(seed)
        answer = sender.send(tensors)
        assert "of qkv" in answer["unplanned"]
        assert torch.equal(model.norm, loaded(tensors).qkv.data.abs().sum())
        assert answer["samples"] == "".join(sampled_checksums(list(tensors.values())))
    assert model.loads == 3
    assert len([record for record in caplog.records if "more than copy" in record.message]) == 1


def test_a_source_that_is_no_part_of_the_bucket_makes_no_plan(load: Callable[[torch.nn.Module, Any], None]) -> None:
    class Casting(Model):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, tensor * 2) for name, tensor in weights)

    sender = Sender(load, Casting())
    for seed in range(2):
        sender.begin()
        assert "not from the bucket" in sender.send(weights(seed))["unplanned"]
        require_same(sender.model, loaded({name: tensor * 2 for name, tensor in weights(seed).items()}))


def test_a_tensor_may_go_to_several_parameters(load: Callable[[torch.nn.Module, Any], None]) -> None:
    """As a head of keys does that several ranks' heads of queries share, or a cast of it in a parameter of its own."""

    class Copying(Model):
        def __init__(self) -> None:
            super().__init__()
            self.twice = torch.nn.Parameter(torch.zeros(2, HIDDEN, HIDDEN), requires_grad=False)
            self.cast = torch.nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16), requires_grad=False)

        def load_weights(self, weights: Any) -> None:
            super().load_weights(weights := dict(weights).items())
            for parameter in (*self.twice.data, self.cast.data):
                parameter.copy_(dict(weights)["q"])

    sender, plain = Sender(load, Copying()), Copying()
    for seed in range(3):
        sender.begin()
        assert sender.send(weights(seed))["missing"] == 0
        plain.load_weights(weights(seed).items())
        require_same(sender.model, plain)
    assert isinstance(sender.model, Model)
    assert sender.model.loads == 1
    sender.files.close()


def test_parameters_with_new_memory_get_a_new_plan(sender: Sender) -> None:
    assert isinstance(sender.model, Model)
    sender.send(weights(0))
    sender.model.qkv.data = torch.zeros_like(sender.model.qkv)
    sender.begin()
    sender.send(weights(1))
    require_same(sender.model, loaded(weights(1)))
    assert sender.model.loads == 2


def test_content_that_does_not_arrive_is_found(sender: Sender) -> None:
    """Something changes a parameter behind the copies."""
    assert isinstance(sender.model, Model)
    sender.send(weights(0))
    [layout] = layouts_of(sender.model)
    plan = layout.plan
    bucket = packed(weights(0))
    assert plan.compare(bucket)() == []
    sender.model.out.data[3, 1] += 1
    assert plan.compare(bucket)() == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "unknown"}, "could not load the tensors: KeyError: 'unknown'"),
        ({"offset": 1 << 20}, "can't be at offset 1048576 of a bucket of"),
        ({"offset": 2}, "can't be at offset 2 of a bucket of"),
        ({"shape": (3, 3)}, "could not load the tensors: "),
    ],
)
def test_what_can_not_be_loaded_is_the_answer(sender: Sender, change: dict[str, Any], message: str) -> None:
    spec = TensorSpec(**{"name": "q", "dtype": "float32", "shape": (8, 8), "offset": 0, "nbytes": 256, **change})
    with pytest.raises(InvalidStateError, match="its rank 0") as error:
        sender.order((spec,), torch.zeros(1024, dtype=torch.uint8))
    assert message in str(error.value)
    sender.begin()
    assert sender.send(weights(1))["missing"] == 0  # it goes on


def test_a_loader_that_does_not_answer_is_an_error(sender: Sender) -> None:
    [order] = sender.update.orders((), in_files(sender.files.answers()))
    sender.load(sender.model, [(order.replace("/proc/", "/nowhere/"), torch.zeros(1, dtype=torch.uint8))])
    with pytest.raises(EngineFailed, match="rank 0 has not answered"):
        sender.update.take((), sender.files.read())


def test_an_answer_is_written_to_no_other_file(sender: Sender, tmp_path: Path) -> None:
    """In another container, the number of the sender's process can be another one's."""
    other = tmp_path / "other"
    other.write_text("content")
    order = json.dumps({"update": "one", "file": str(other)}) + "\n[]"
    sender.load(sender.model, [(order, torch.zeros(1, dtype=torch.uint8))])
    assert other.read_text() == "content"


def test_an_order_that_can_not_be_read_raises_nothing(sender: Sender) -> None:
    for text in ("", "[]", "{}", '{"update": 1}\n[[1]]', '{"update": 1, "file": ""}\n[[1]]'):
        sender.load(sender.model, [(text, torch.zeros(1, dtype=torch.uint8))])
