"""Each rank of an SGLang says which parts of the tensors it needs, and loads only these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.buckets import PartsBucket, RankBucket, TensorPart, TensorSpec, TorchStorageBucket
from millrace.checksum import sampled_checksums
from millrace.config.engines import SGLangEngineConfig
from millrace.engines.answers import AnswerFiles
from millrace.engines.base import Engine
from millrace.engines.sglang.loading import LoaderUpdate, in_files
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.stock.launching import EXTENSION
from millrace.engines.stock.state import InvalidStateError
from millrace.extension.millrace_boxes import Box, label
from millrace.model_folder import stored_tensors
from millrace.weights.folder import FolderTensors
from millrace.weights.transports.torch_storage import SharedStorage
from tests.architectures import OVER_TWO, make_moe_folder
from tests.conformance.run_checks import START_TIMEOUT
from tests.engines.sglang.test_loader import Deriving, Model, loaded, require_same, weights
from tests.weights.variants import PROMPTS, greedy, greedy_tokens, louder

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module, Any], None]:
    monkeypatch.syspath_prepend(str(EXTENSION))
    import millrace_sglang  # type: ignore[import-not-found]

    loader: Callable[[torch.nn.Module, Any], None] = millrace_sglang.load
    return loader


def specs(tensors: Tensors) -> list[TensorSpec]:
    return [
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    ]


def packed(tensors: Tensors, boxes: Sequence[tuple[str, Box]]) -> tuple[torch.Tensor, tuple[TensorPart, ...]]:
    """A bucket of these parts of the tensors, and where they are in it."""
    pieces, parts, offset = [], [], 0
    for name, box in boxes:
        piece = tensors[name].detach()[tuple(slice(start, end) for start, end in box)].contiguous()
        parts.append(TensorPart(name, str(piece.dtype).removeprefix("torch."), box, offset))
        pieces.append(piece.reshape(-1).view(torch.uint8))
        offset += piece.nbytes
    return torch.cat(pieces), tuple(parts)


class Sender:
    """Asks the loader of a model for its parts and sends them, as the adapter does."""

    def __init__(self, load: Callable[[torch.nn.Module, Any], None], model: torch.nn.Module) -> None:
        self.load, self.model = load, model
        self.update, self.files = LoaderUpdate("sglang-0"), AnswerFiles(1)

    def begin(self) -> None:
        self.update = LoaderUpdate("sglang-0")

    def needs(self, tensors: Tensors) -> list[tuple[str, Box]]:
        [question] = self.update.questions(specs(tensors), in_files(self.files.answers()))
        self.load(self.model, [(question, torch.empty(0))])
        [of_rank] = self.update.needs(self.files.read())
        return [(name, box) for name, boxes in zip(tensors, of_rank, strict=True) for box in boxes]

    def send(self, tensors: Tensors, boxes: Sequence[tuple[str, Box]]) -> None:
        bucket, parts = packed(tensors, boxes)
        [order] = self.update.orders_of_parts([parts], in_files(self.files.answers()))
        self.load(self.model, [(order, bucket)])
        self.update.take_parts(self.files.read())


@pytest.fixture
def sender(load: Callable[[torch.nn.Module, Any], None]) -> Iterator[Sender]:
    sender = Sender(load, Model())
    yield sender
    sender.files.close()


def test_a_rank_says_which_parts_it_needs_and_changes_nothing(sender: Sender) -> None:
    needs = dict(sender.needs({**weights(0), "experts.1": torch.zeros(8, 8)}))
    assert needs == {
        "embed": ((0, 10), (0, 8)),
        "q": ((4, 8), (0, 8)),
        "k": ((4, 8), (0, 8)),
        "v": ((4, 8), (0, 8)),
        "out": ((0, 8), (4, 8)),
        "experts.0": ((0, 8), (0, 8)),
        "experts.1": ((0, 8), (0, 8)),
    }
    require_same(sender.model, Model())


@pytest.mark.parametrize("cut", [1, 3])
def test_parts_load_what_whole_tensors_load(sender: Sender, cut: int) -> None:
    """The parts come in any cut: here in slabs of `cut` rows, several of them in a bucket."""
    assert isinstance(sender.model, Model)
    needs = sender.needs(weights(0))
    sender.model.embed.data.fill_(7)  # also the padding, as after its memory was released
    slabs = [
        (name, ((first, min(first + cut, box[0][1])), *box[1:])) for name, box in needs for first in range(*box[0], cut)
    ]
    for seed in range(2):
        sender.begin()
        missing = []
        for first in range(0, len(slabs), 4):
            sender.send(weights(seed), slabs[first : first + 4])
            missing.append(sender.update.missing != "")
        assert missing == [True] * (len(missing) - 1) + [False]
        require_same(sender.model, loaded(weights(seed)))
        sent = {label(name, box): packed(weights(seed), [(name, box)])[0].view(torch.float32) for name, box in slabs}
        assert sender.update.samples == dict(zip(sent, sampled_checksums(list(sent.values())), strict=True))
    assert sender.model.loads == 1  # in the dry run


def test_parts_that_are_left_out_are_missing(sender: Sender) -> None:
    needs = sender.needs(weights(0))
    sender.send(weights(0), needs)
    sender.begin()
    sender.send(weights(0), needs[:-1])
    assert sender.update.missing == "1 of its parameters lacks content of this version, such as experts"


def test_a_bucket_may_have_no_part_for_a_rank(sender: Sender) -> None:
    sender.needs(weights(0))
    [order] = sender.update.orders_of_parts([()], in_files(sender.files.answers()))
    sender.load(sender.model, [(order, torch.empty(1, dtype=torch.uint8))])
    sender.update.take_parts(sender.files.read())
    assert sender.update.missing.startswith("4 of its parameters lack content")


def test_parameters_with_new_memory_get_a_new_plan(sender: Sender) -> None:
    assert isinstance(sender.model, Model)
    needs = sender.needs(weights(0))
    sender.send(weights(0), needs)
    sender.model.qkv.data = torch.zeros_like(sender.model.qkv)
    sender.begin()
    sender.send(weights(1), needs)
    require_same(sender.model, loaded(weights(1)))


class Scaling(Model):
    def load_weights(self, weights: Any) -> None:
        super().load_weights((name, tensor * 2) for name, tensor in weights)


class Flattening(Model):
    def load_weights(self, weights: Any) -> None:
        for _, tensor in weights:
            self.out.data.view(-1)[:12].copy_(tensor.reshape(-1)[2:14])


class Reading(Model):
    def load_weights(self, weights: Any) -> None:
        for _, tensor in weights:
            self.out.data.fill_(tensor.flatten()[0].item())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Scaling, "more than copy: a copy into embed of something that was computed"),
        (Flattening, "more than copy: a copy into out that is no rectangular part of embed"),
        (Deriving, "more than copy: aten.abs.default of qkv"),
        (Reading, "can't be tried without content: "),
    ],
)
def test_a_loader_that_does_more_than_copy_says_so(
    load: Callable[[torch.nn.Module, Any], None], model: type[Model], why: str
) -> None:
    sender = Sender(load, model())
    with pytest.raises(InvalidStateError, match="its rank 0 can't say which parts of the tensors it needs: ") as error:
        sender.needs(weights(0))
    assert why in str(error.value)
    require_same(sender.model, Model())
    with pytest.raises(InvalidStateError, match="has not said which parts it needs"):
        sender.send(weights(0), [("embed", ((0, 10), (0, 8)))])


def test_a_part_that_the_rank_does_not_need_is_refused(sender: Sender) -> None:
    sender.needs(weights(0))
    with pytest.raises(InvalidStateError, match=r"this rank does not need other\[0:1\]"):
        sender.send({"other": torch.zeros(1)}, [("other", ((0, 1),))])


def make_folder(kind: str, folder: Path) -> None:
    make_moe_folder(folder, architecture="qwen3_moe" if kind == "moe" else "qwen3", **OVER_TWO)


def changed(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the folder, with other values."""
    make = torch.Generator().manual_seed(3)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=make)
        for name, tensor in louder(FolderTensors(folder, frozenset(stored_tensors(folder))))
    }


async def load_parts(engine: Engine, tensors: Tensors, deadline: float) -> list[int]:
    """Brings the engine these tensors as version 1, each rank from memory of its own. Returns the bytes of each
    rank."""
    needs = await engine.needed_parts(specs(tensors), deadline=deadline)
    buckets, sent = [], []
    for of_rank in needs:
        named = [(name, box) for name, boxes in zip(tensors, of_rank, strict=True) for box in boxes]
        content, parts = packed(tensors, named)
        memory = SharedStorage(content.nbytes)
        memory.bytes.copy_(content)
        memory.promise(1)
        buckets.append(
            (memory, RankBucket(TorchStorageBucket(memory.manager, memory.handle, content.nbytes, ()), parts))
        )
        sent.append({label(part.name, part.box) for part in parts})
    await engine.begin_update(1)
    await engine.load(PartsBucket(tuple(bucket for _, bucket in buckets), tuple(specs(tensors))), deadline=deadline)
    assert (await engine.sampled_checksums()).keys() == set().union(*sent)
    await engine.commit()
    sizes = [memory.bytes.nbytes for memory, _ in buckets]
    for memory, _ in buckets:
        memory.close()
    return sizes


@pytest.mark.slow  # tests/weights/test_exchange.py runs the second case too, beside a trainer
@pytest.mark.parametrize(("kind", "ranks", "version"), [("dense", 1, "0.5.15"), ("moe", 2, "0.5.23")])
async def test_real_ranks_load_their_parts(
    kind: str, ranks: int, version: str, sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    make_folder(kind, tmp_path / "model")
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        tp_size=ranks,
        python=sglang_python(version),
        version=version,
        threads=1,
        start_timeout=START_TIMEOUT,
        dtype="float32",
        env=env,
    )
    tensors = changed(tmp_path / "model")
    started = await start(config, LaunchSpec(model_path=tmp_path / "model", log_dir=tmp_path))
    try:
        sizes = await load_parts(started.engine, tensors, START_TIMEOUT)
        whole = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes == [whole] if ranks == 1 else max(sizes) < 0.6 * whole
        for prompt in PROMPTS[:2]:
            made = await greedy(started.engine, prompt, "after", 12)
            assert made.output_ids == greedy_tokens(tmp_path / "model", tensors, prompt, 12)
        unknown = TensorSpec("model.of.another", "float32", (3,), 0, 12)
        assert await started.engine.needed_parts([unknown], deadline=START_TIMEOUT) == [[[]]] * ranks
        assert (await greedy(started.engine, PROMPTS[0], "again", 12)).version_spans[-1].version == 1
    finally:
        await started.end()
