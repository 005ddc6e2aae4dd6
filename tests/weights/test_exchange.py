"""A trainer of two ranks with FSDP2 publishes to engines without a gather: to one of two ranks, and to two of one,
beside the trainer and apart from it."""

import json
import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import OVER_TWO, make_moe_folder
from tests.torchrun import run_apart
from tests.weights.exchanging_ranks import TOKENS
from tests.weights.variants import PROMPTS, louder

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def make_folder(kind: str, folder: Path) -> None:
    make_moe_folder(folder, architecture="qwen3_moe" if kind == "moe" else "qwen3", **OVER_TWO)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(dict(louder(model.state_dict().items())))
    model.save_pretrained(folder)


OVER_TWO_CORES = {
    "sglang": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    "vllm": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},  # otherwise it wants a NUMA node for each rank
}
VERSIONS = {"sglang": "0.5.23", "vllm": "0.32.0"}


def run(kind: str, settings: Mapping[str, Any], python: Path, place: Path, transport: str = "auto") -> None:
    """Runs the trainer in `place`, and checks what it found."""
    folder = place / "model"
    make_folder(kind, folder)
    engine = {**settings, "python": str(python), "version": VERSIONS[settings["kind"]]}
    arguments = str(folder), str(place), transport, json.dumps(engine)
    statuses = run_apart("weights/exchanging_ranks.py", *arguments, log=place / "ranks.log")
    assert statuses == [0, -signal.SIGKILL], (place / "ranks.log").read_text()[-8000:]
    found = json.loads((place / "found.json").read_text())
    replicas = settings.get("replicas", 1)
    tensors, needs = found["needs"]
    crossing = replicas * needed(needs) if transport == "gloo" else not_local(tensors, needs)
    check_versions(found, folder, place, crossing, whole="replicas" in settings)
    check_faults(found, [f"{settings['kind']}-{number}" for number in range(replicas)])


sharded = pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("moe", {"tp_size": 2}, id="experts, one engine of two ranks"),
        pytest.param("dense", {"tp_size": 2}, id="one engine of two ranks"),
        pytest.param("moe", {"replicas": 2}, id="experts, two engines of one rank"),
    ],
)


@pytest.mark.slow
@sharded
def test_each_rank_of_sglang_gets_the_parts_that_it_needs(
    kind: str, settings: Mapping[str, Any], sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    run(kind, {"kind": "sglang", **settings, "env": OVER_TWO_CORES["sglang"]}, sglang_python("0.5.23"), tmp_path)


@pytest.mark.slow
@sharded
def test_each_rank_of_an_sglang_that_is_apart_gets_the_parts_that_it_needs(
    kind: str, settings: Mapping[str, Any], sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    given = {"kind": "sglang", **settings, "env": OVER_TWO_CORES["sglang"]}
    run(kind, given, sglang_python("0.5.23"), tmp_path, transport="gloo")


@pytest.mark.slow
@sharded
def test_each_rank_of_a_vllm_that_is_apart_gets_the_parts_that_it_needs(
    kind: str, settings: Mapping[str, Any], vllm_python: Path, tmp_path: Path
) -> None:
    given = {"kind": "vllm", **settings, "env": OVER_TWO_CORES["vllm"]}
    run(kind, given, vllm_python, tmp_path, transport="gloo")


@pytest.mark.slow
@sharded
def test_each_rank_of_vllm_gets_the_parts_that_it_needs(
    kind: str, settings: Mapping[str, Any], vllm_python: Path, tmp_path: Path
) -> None:
    run(kind, {"kind": "vllm", **settings, "env": OVER_TWO_CORES["vllm"]}, vllm_python, tmp_path)


def check_versions(found: Mapping[str, Any], folder: Path, place: Path, crossing: int, *, whole: bool) -> None:
    """Requires the tokens of the published weights, the same content however it came, and that no byte travelled
    without need. crossing: the bytes that must. whole: whether each of the engine's ranks needs all."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for version in ("1", "2", "4"):
        model.load_state_dict(torch.load(place / f"{version}.pt"), strict=False)
        expected_tokens = [greedy_tokens(model, prompt) for prompt in PROMPTS[:2]]
        assert all(made == expected_tokens for made in found["tokens"][version]), version
    tensors, needs = found["needs"]
    elements = sum(math.prod(shape) for _, _, shape in tensors)
    assert crossing > 0
    shares = [
        sum(math.prod(end - start for start, end in box) for boxes in of for box in boxes) / elements for of in needs
    ]
    assert shares == [1] if whole else max(shares) < 0.6
    assert found["exchanged"] == {"1": crossing, "2": crossing, "4": None, "5": crossing}
    groups = found["groups"]
    assert groups["1"] == groups["2"]  # they are kept, and the gather ends them
    assert all(not first or first != last for first, last in zip(groups["1"], groups["5"], strict=True))
    held = found["held"]
    assert held["4"] == held["5"] == held["7"]
    assert all(len(of_engine) > 10 for of_engine in held["4"])


def check_faults(found: Mapping[str, Any], engines: Sequence[str]) -> None:
    # The spoilt part may be one that both ranks of the engine need, and they compare.
    assert re.search(r"tensors are not what was sent|its ranks received different values", found["spoilt"])
    # An engine that has loaded a part of a version serves again after a whole one.
    assert re.fullmatch(
        r"the trainer's ranks could not (exchange|send) the weights: .*; if a rank has ended, start the trainer again",
        found["died"],
    )
    assert found["routable"] == []
    assert found["routable again"] == engines
    (line,) = found["log"]
    assert re.fullmatch(
        r"the trainer's ranks gather the weights, because .* is the sum of its shards \(Partial\)", line
    )


def greedy_tokens(model: Any, prompt: Sequence[int]) -> list[int]:
    made = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def needed(needs: Sequence[Sequence[Any]]) -> int:
    """The bytes that the engine's ranks need. needs: the boxes of each rank and tensor."""
    boxes = (box for of_rank in needs for boxes in of_rank for box in boxes)
    elements: int = sum(math.prod(end - start for start, end in box) for box in boxes)
    return 4 * elements


def not_local(tensors: Sequence[Any], needs: Sequence[Sequence[Any]]) -> int:
    """The bytes that the engine's ranks need, and that the trainer's rank beside them does not have. The trainer's
    ranks have half of the rows each and, where experts are fused, half of the experts.

    tensors: name, dtype and shape of each. needs: the boxes of each rank and tensor.
    """
    elements = 0
    for rank, of_rank in enumerate(needs):
        for (name, dtype, shape), boxes in zip(tensors, of_rank, strict=True):
            assert dtype == "float32"
            expert, half = EXPERT.search(name), -(-shape[0] // 2)
            for (first, last), *columns in boxes:
                if expert is not None:
                    rows = (last - first) * (int(expert[1]) // 2 != rank)
                else:
                    rows = len([row for row in range(first, last) if row // half != rank])
                elements += rows * math.prod(end - start for start, end in columns)
    return 4 * elements
