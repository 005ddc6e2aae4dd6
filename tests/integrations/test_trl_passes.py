"""Short forward passes give TRL the same logprobs and gradients as its padded batch, from fewer positions."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from millrace.imports import without_collecting
from tests.integrations.trl_settings import ON_CPU

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with without_collecting():
    from trl import GRPOConfig, GRPOTrainer

    from millrace.integrations.trl.passes import ShortPasses, shorten_passes

LENGTHS = [(3, 2), (5, 20), (2, 1), (7, 9), (3, 0)]  # of prompts and completions


@pytest.fixture
def make_trainer(tiny_model: Path, tmp_path: Path) -> Callable[..., GRPOTrainer]:
    def make(**settings: Any) -> GRPOTrainer:
        return GRPOTrainer(
            model=str(tiny_model),
            args=GRPOConfig(output_dir=str(tmp_path), **ON_CPU, num_generations=2, **settings),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "Anna has 3 apples"}]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )

    return make


def batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return token ids, their mask and the width of the completions, padded on both sides as by TRL."""
    widest = [max(lengths) for lengths in zip(*LENGTHS, strict=True)]
    ids, mask = torch.zeros(2, len(LENGTHS), sum(widest), dtype=torch.int64)
    for row, (prompt, completion) in enumerate(LENGTHS):
        own = slice(widest[0] - prompt, widest[0] + completion)
        ids[row, own] = torch.arange(prompt + completion) + 10 * row
        mask[row, own] = 1
    return ids, mask, widest[1]


def gradients(model: Any, scores: tuple[torch.Tensor, torch.Tensor | None, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    (scores[0] * torch.linspace(0.5, 2, scores[0].numel()).view_as(scores[0])).sum().backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("tokens", "most", "computed"),
    [(1, None, 25 + 16 + 5 + 3 + 4), (30, None, 25 + 16 + 3 * 5), (1000, 2, 2 * 27 + 2 * 5 + 4), (None, None, 5 * 27)],
)
def test_short_passes_change_nothing_but_the_padding(
    make_trainer: Callable[..., GRPOTrainer], tokens: int | None, most: int | None, computed: int
) -> None:
    trainer, positions = make_trainer(), list[int]()
    score, model = trainer._get_per_token_logps_and_entropies, trainer.model
    ids, mask, width = batch()
    wanted = score(model, ids, mask, width, compute_entropy=True)
    wanted_gradients = gradients(model, wanted)
    model.register_forward_pre_hook(lambda _, __, given: positions.append(given["input_ids"].numel()), with_kwargs=True)

    made = ShortPasses(score, tokens)(model, ids, mask, width, batch_size=most, compute_entropy=True, pixel_values=None)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(model, made), wanted_gradients, atol=1e-4, rtol=1e-3)
    assert sum(positions) == computed


def test_a_batch_with_other_inputs_stays_as_it_is() -> None:
    ids, mask, width = batch()

    def score(model: object, *given: Any, **others: Any) -> tuple[torch.Tensor, None, None]:
        assert given[:2] == (ids, mask)
        assert list(others) == ["token_type_ids"]
        return ids, None, None

    assert ShortPasses(score, 1)(None, ids, mask, width, token_type_ids=ids, num_images=None)[0] is ids


def test_fixed_shapes_stay_fixed(make_trainer: Callable[..., GRPOTrainer]) -> None:
    fixed, free = make_trainer(pad_to_multiple_of=16), make_trainer()
    for trainer in (fixed, free):
        shorten_passes(trainer, 64)
    assert isinstance(free._get_per_token_logps_and_entropies, ShortPasses)
    assert not isinstance(fixed._get_per_token_logps_and_entropies, ShortPasses)
