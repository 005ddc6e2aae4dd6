"""Two ranks under torchrun, sharded over gloo, compared with one process on the same samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.train.checkpoint import latest, load
from tests.torchrun import run_two_ranks
from tests.train.small_models import largest_difference, make_config, make_model, make_trainer, same, weights
from tests.train.two_ranks import CONFIG, STEPS, SUPERVISED

EQUAL_STATS = ("loss", "kl", "kl_reference", "clip_fraction", "logprob_gap", "entropy", "grad_norm", "lr", "tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run_two_ranks("train/two_ranks.py", str(folder), str(out), "cpu")
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank-{rank}.pt") for rank in (0, 1)]


def test_two_ranks_take_the_steps_of_one(folder: Path, ranks: list[dict[str, Any]]) -> None:
    one = make_trainer(folder, CONFIG)
    for step, samples in enumerate(STEPS):
        expected = one.train_step(samples, 0.9)
        for rank in ranks:
            for name in EQUAL_STATS:
                assert rank["stats"][step][name] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), name
        logprobs = [one for rank in ranks for one in rank["stats"][step]["logprobs"]]  # in the order of the samples
        assert len(logprobs) == len(samples)
        for own, one_by_one in zip(logprobs, expected.logprobs, strict=True):
            torch.testing.assert_close(own, torch.from_numpy(one_by_one), rtol=1e-3, atol=1e-4)
    for rank in ranks:
        assert largest_difference(rank["three_steps"], weights(one.policy)) < 5e-5
        assert largest_difference(rank["three_steps"], rank["two_steps"]) > 1e-4


def test_ranks_run_the_same_number_of_passes_whatever_their_samples(ranks: list[dict[str, Any]]) -> None:
    passes = [[stats["microbatches"] for stats in rank["stats"]] for rank in ranks]
    assert passes[0] == passes[1]
    assert min(passes[0]) >= 1


def test_the_weights_are_sharded_and_named_tensors_whole(ranks: list[dict[str, Any]]) -> None:
    total = sum(tensor.numel() for tensor in ranks[0]["three_steps"].values())
    assert sum(rank["local_elements"] for rank in ranks) == total
    assert all(rank["local_elements"] < 0.6 * total for rank in ranks)
    assert same(ranks[0]["three_steps"], ranks[1]["three_steps"])


def test_two_ranks_take_the_supervised_steps_of_one(folder: Path, ranks: list[dict[str, Any]]) -> None:
    one = make_trainer(folder, make_config())
    expected = one.supervised_step(SUPERVISED)
    for rank in ranks:
        assert rank["supervised"]["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert rank["supervised"]["tokens"] == expected.tokens
        assert largest_difference(rank["supervised_weights"], weights(one.policy)) < 2e-5


def test_bfloat16_shards_keep_float32_weights(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["bfloat16_dtypes"] == {"torch.float32"}
        assert rank["bfloat16"]["logprob_gap"] == pytest.approx(rank["stats"][0]["logprob_gap"], rel=0.05)
        assert rank["bfloat16"]["entropy"] == pytest.approx(rank["stats"][0]["entropy"], rel=0.05)


def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(
    folder: Path, out: Path, ranks: list[dict[str, Any]]
) -> None:
    assert all(rank["resumed_like_never_stopped"] for rank in ranks)
    assert all(rank["extra"] == {"by": "two ranks"} for rank in ranks)
    one = make_trainer(folder, CONFIG)
    found = latest(out)
    assert found is not None
    assert load(found, one) == {"by": "two ranks"}
    assert same(weights(one.policy), ranks[0]["two_steps"])
    one.train_step(STEPS[2], 0.9)
    assert largest_difference(weights(one.policy), ranks[0]["three_steps"]) < 2e-5


def test_an_export_of_two_ranks_is_whole(out: Path, ranks: list[dict[str, Any]]) -> None:
    exported = dict(AutoModelForCausalLM.from_pretrained(out / "export").named_parameters())
    assert same(ranks[0]["three_steps"], {name: tensor.detach() for name, tensor in exported.items()})


def test_an_error_on_one_rank_ends_both(out: Path, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        not_finite, no_disk = rank["errors"]
        assert "step 4: loss nan" in not_finite
        assert rank["untouched"]
        assert "File too large" in no_disk
        assert rank["latest"].endswith("step-00000002")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
