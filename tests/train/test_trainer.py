import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.models import LossConfig, TrainConfig
from millrace.train.batch import TrainSample, plan_minibatches, supervised_sample
from millrace.train.optimizer import learning_rate
from millrace.train.trainer import Trainer, TrainingError
from tests.train.small_models import (
    PLAIN,
    VOCABULARY,
    largest_difference,
    make_config,
    make_model,
    make_policy,
    make_samples,
    make_trainer,
    plain_logprobs,
    same,
    weights,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def plain_training(
    folder: Path, config: TrainConfig, samples: list[TrainSample], temperature: float
) -> dict[str, torch.Tensor]:
    """Takes one step as the papers write it: a loop over samples without padding, torch's own AdamW and clipping."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    options = config
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    lr = learning_rate(options, 0, config.steps)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=options.betas, eps=options.eps, foreach=False)
    with torch.no_grad():
        old = [plain_logprobs(model, s.token_ids.tolist(), temperature) for s in samples]
        frozen = [plain_logprobs(reference, s.token_ids.tolist(), temperature) for s in samples]
    loss_config = config.loss
    for indices in plan_minibatches(len(samples), config.minibatches):
        tokens = sum(samples[i].trained_tokens for i in indices)
        sequences = sum(samples[i].trained_tokens > 0 for i in indices)
        total = torch.zeros(())
        for i in indices:
            sample, mask = samples[i], torch.from_numpy(samples[i].loss_mask[1:])
            if sample.trained_tokens == 0:
                continue
            logprobs = plain_logprobs(model, sample.token_ids.tolist(), temperature)[mask]
            ratio = (logprobs - old[i][mask]).exp()
            clipped = ratio.clamp(1 - loss_config.clip_low, 1 + loss_config.clip_high)
            loss = -torch.min(ratio * sample.advantage, clipped * sample.advantage)
            if loss_config.importance_cap is not None:
                engine = torch.from_numpy(sample.logprobs[1:])[mask]
                loss = loss * (old[i][mask] - engine).exp().clamp(max=loss_config.importance_cap)
            difference = frozen[i][mask] - logprobs
            loss = loss + loss_config.kl_coefficient * (difference.exp() - difference - 1)
            total = total + (loss.sum() / tokens if loss_config.average == "token" else loss.mean() / sequences)
        adamw.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("minibatches", [1, 3])
def test_a_step_returns_each_samples_logprobs_before_it_in_their_order(folder: Path, minibatches: int) -> None:
    samples = make_samples(12)
    trainer = make_trainer(folder, make_config(minibatches=minibatches))
    model = AutoModelForCausalLM.from_pretrained(folder)
    stats = trainer.train_step(samples, temperature=0.8)
    assert [one.shape for one in stats.logprobs] == [sample.token_ids.shape for sample in samples]
    gaps = []
    for sample, logprobs in zip(samples, stats.logprobs, strict=True):
        with torch.no_grad():
            plain = np.concatenate([[0], plain_logprobs(model, sample.token_ids.tolist(), 0.8).numpy()])
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, np.where(sample.loss_mask, plain, 0), rtol=0, atol=2e-5)
        gaps += np.abs(sample.logprobs - logprobs)[sample.loss_mask].tolist()
    assert stats.logprob_gap == pytest.approx(float(np.mean(gaps)), rel=1e-4)
    assert trainer.train_step([], 1.0).logprobs == ()


@pytest.mark.parametrize(
    ("loss", "minibatches"),
    [
        (LossConfig(importance_cap=1.5), 1),
        (LossConfig(importance_cap=None, kl_coefficient=0.5, average="sequence"), 3),
        (LossConfig(importance_cap=0.8, clip_low=0.01, clip_high=0.01), 3),
    ],
)
def test_a_step_is_what_the_papers_write(folder: Path, loss: LossConfig, minibatches: int) -> None:
    config = make_config(loss=loss, minibatches=minibatches)
    samples = make_samples(12)
    trainer = make_trainer(folder, config)
    before = weights(trainer.policy)
    stats = trainer.train_step(samples, temperature=0.8)
    after = weights(trainer.policy)
    assert largest_difference(before, after) > 3e-4
    # Adam's first steps have the size of the rate, whatever the gradient's size. So rounding shows if the gradient is
    # near 0.
    assert largest_difference(after, plain_training(folder, config, samples, 0.8)) < 2e-5
    assert stats.tokens == sum(sample.trained_tokens for sample in samples)
    assert (stats.clip_fraction > 0) == (minibatches > 1)


@pytest.mark.parametrize("limit", [1, 33, 10_000])
def test_microbatches_do_not_change_the_step(folder: Path, limit: int) -> None:
    samples = make_samples(12)
    reference = make_trainer(folder, make_config(tokens_per_microbatch=64))
    expected = reference.train_step(samples, 1.0)
    trainer = make_trainer(folder, make_config(tokens_per_microbatch=limit))
    stats = trainer.train_step(samples, 1.0)
    assert stats.microbatches == {1: 12, 10_000: 1}.get(limit, stats.microbatches)
    for name in ("loss", "kl", "logprob_gap", "largest_logprob_gap", "entropy", "grad_norm"):
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert largest_difference(weights(trainer.policy), weights(reference.policy)) < 2e-5


def test_a_rewarded_token_becomes_likelier(folder: Path) -> None:
    """The samples have one token after one prompt, drawn by the policy itself. The reward is 1 for an even token."""
    config = make_config(**PLAIN, lr=5e-3, loss=LossConfig())
    trainer = make_trainer(folder, config)
    generator = torch.Generator().manual_seed(0)
    prompt = [3, 1, 4]
    even: list[float] = []
    for _ in range(12):
        with torch.no_grad():
            logprobs_V = torch.log_softmax(trainer.policy.model(torch.tensor([prompt])).logits[0, -1], dim=-1)
        even.append(logprobs_V.exp()[::2].sum().item())
        tokens = torch.multinomial(logprobs_V.exp(), 32, replacement=True, generator=generator).tolist()
        mask = np.array([False, False, False, True])
        samples = [
            TrainSample(
                np.array([*prompt, token]),
                mask,
                np.array([0, 0, 0, logprobs_V[token].item()], dtype=np.float32),
                1.0 if token % 2 == 0 else -1.0,
            )
            for token in tokens
        ]
        stats = trainer.train_step(samples, temperature=1.0)
        assert stats.largest_logprob_gap < 1e-4
    assert even[0] < 0.7
    assert even[-1] > 0.95


def test_without_advantage_nothing_moves(folder: Path) -> None:
    trainer = make_trainer(folder, make_config(**PLAIN, lr=1e-2))
    before = weights(trainer.policy)
    stats = trainer.train_step([replace(sample, advantage=0.0) for sample in make_samples(6)], 1.0)
    assert stats.grad_norm == 0
    assert same(before, weights(trainer.policy))


def test_the_kl_term_pulls_back_to_the_reference(folder: Path) -> None:
    config = make_config(**PLAIN, lr=1e-3, loss=LossConfig(kl_coefficient=1.0))
    trainer = make_trainer(folder, config)
    samples = make_samples(10)
    away = [trainer.train_step(samples, 1.0).kl_reference for _ in range(5)]
    assert away[0] == pytest.approx(0, abs=1e-9)
    assert away[-1] > 1e-3
    still = [replace(sample, advantage=0.0) for sample in samples]
    back = [trainer.train_step(still, 1.0).kl_reference for _ in range(15)]
    assert back[-1] < 0.3 * max(away[-1], *back)


def test_a_supervised_warm_up_and_then_reinforcement_on_one_policy(folder: Path) -> None:
    config = make_config(loss=LossConfig(kl_coefficient=0.1))
    policy = make_policy(folder, config)
    trainer = Trainer(policy, config)
    warm_up = Trainer(policy, config.model_copy(update={**PLAIN, "lr": 1e-2, "steps": 30}))
    samples = [supervised_sample([1, 2, 3, 4, 5], [False, True, True, True, True])]
    losses = [warm_up.supervised_step(samples).loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.5)
    assert losses[-1] < 0.1
    stats = trainer.train_step(make_samples(4), 1.0)
    assert stats.step == 1
    assert stats.kl_reference == pytest.approx(0, abs=1e-9)  # the reference is the policy after its warm-up


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_names_the_step_and_leaves_the_weights(folder: Path, bad: float) -> None:
    trainer = make_trainer(folder, make_config())
    samples = make_samples(6)
    trainer.train_step(samples, 1.0)
    before = weights(trainer.policy)
    with pytest.raises(TrainingError, match="step 2: loss"):
        trainer.train_step([replace(samples[0], advantage=bad), *samples[1:]], 1.0)
    assert same(before, weights(trainer.policy))
    assert trainer.train_step(samples, 1.0).step == 2
    assert not same(before, weights(trainer.policy))


def test_a_token_outside_the_vocabulary_is_refused_before_the_model_sees_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"the model has 0 to {VOCABULARY - 1}"):
        make_trainer(folder, make_config()).supervised_step([supervised_sample([1, VOCABULARY], [False, True])])


def test_a_step_without_samples_counts_and_changes_nothing(folder: Path) -> None:
    trainer = make_trainer(folder, make_config(minibatches=2))
    before = weights(trainer.policy)
    stats = trainer.train_step([], 1.0)
    assert (stats.step, stats.tokens, stats.loss, stats.microbatches) == (1, 0, 0.0, 0)
    assert trainer.supervised_step([supervised_sample([1, 2], [False, False])]).loss == 0.0
    assert same(before, weights(trainer.policy))


def test_bfloat16_trains_float32_weights(folder: Path) -> None:
    samples = make_samples(8)
    exact = make_trainer(folder, make_config()).train_step(samples, 1.0)
    trainer = make_trainer(folder, make_config(dtype="bfloat16", gradient_checkpointing=True))
    stats = trainer.train_step(samples, 1.0)
    assert stats.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)
    assert stats.logprob_gap == pytest.approx(exact.logprob_gap, rel=0.05)
    assert {p.dtype for p in trainer.policy.parameters().values()} == {torch.float32}
