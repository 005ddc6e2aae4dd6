"""A trainer of two ranks with FSDP2 publishes to SGLangs without a gather: to one of two ranks, and to two of one."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import OVER_TWO, make_moe_folder
from tests.torchrun import run_two_ranks
from tests.weights.exchanging_ranks import TOKENS
from tests.weights.variants import PROMPTS, louder

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def make_folder(kind: str, folder: Path) -> None:
    make_moe_folder(folder, architecture="qwen3_moe" if kind == "moe" else "qwen3", **OVER_TWO)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(dict(louder(model.state_dict().items())))
    model.save_pretrained(folder)


OF_TWO_RANKS = {"tp_size": 2, "env": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("moe", OF_TWO_RANKS, id="experts, one engine of two ranks"),
        pytest.param("dense", OF_TWO_RANKS, id="one engine of two ranks", marks=pytest.mark.slow),
        pytest.param("moe", {"replicas": 2}, id="experts, two engines of one rank", marks=pytest.mark.slow),
    ],
)
def test_each_rank_gets_the_parts_that_it_needs(
    kind: str, settings: Mapping[str, Any], sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    make_folder(kind, folder)
    run_two_ranks(
        "weights/exchanging_ranks.py", str(folder), str(sglang_python("0.5.23")), str(tmp_path), json.dumps(settings)
    )
    found = json.loads((tmp_path / "found.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    for version in ("1", "2", "4"):
        model.load_state_dict(torch.load(tmp_path / f"{version}.pt"), strict=False)
        expected_tokens = [greedy_tokens(model, prompt) for prompt in PROMPTS[:2]]
        assert all(made == expected_tokens for made in found["tokens"][version]), version
    tensors, needs = found["needs"]
    expected = not_local(tensors, needs)
    elements = sum(math.prod(shape) for _, _, shape in tensors)
    assert 0 < expected < found["nbytes"]["1"]
    shares = [
        sum(math.prod(end - start for start, end in box) for boxes in of for box in boxes) / elements for of in needs
    ]
    assert shares == [1] if "replicas" in settings else max(shares) < 0.6
    assert found["exchanged"] == {"1": expected, "2": expected, "4": None}
    # The spoilt part may be one that both ranks of the engine need, and they compare.
    assert re.search(r"tensors are not what was sent|its ranks received different values", found["spoilt"])
    (line,) = found["log"]
    assert re.fullmatch(
        r"the trainer's ranks gather the weights, because .* is the sum of its shards \(Partial\)", line
    )


def greedy_tokens(model: Any, prompt: Sequence[int]) -> list[int]:
    made = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


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
