"""The trainer on images: logprobs of padded batches, what a step changes, and what a publish sends."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from millrace.errors import DataError
from millrace.model_folder import stored_tensors
from millrace.rollout.vision import Vision
from millrace.train.batch import TrainSample, collate
from millrace.weights.source import source_of
from millrace.weights.trained import read_trained
from tests.torchrun import run_two_ranks
from tests.train.small_models import make_config, make_policy, make_trainer, weights
from tests.train.vision_samples import IMAGES, make_samples
from tests.vision import KINDS, make_image, make_tiny_vision_model, png


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "model"
    make_tiny_vision_model(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[TrainSample]:
    return make_samples(folder)


def one_by_one(folder: Path, sample: TrainSample) -> torch.Tensor:
    """Returns the logprobs of a sample's tokens but the first, by transformers' own classes: [T - 1]."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(sample.token_ids)[None]
    inputs: dict[str, Any] = {}
    if sample.images:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        inputs = dict(processor([Image.open(BytesIO(image)) for image in sample.images], return_tensors="pt"))
        types = (ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(ids, types, image_grid_thw=inputs["image_grid_thw"])
        inputs["position_ids"] = positions
    with torch.no_grad():
        logprobs: torch.Tensor = model(input_ids=ids, **inputs).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[:, 0]


def test_a_padded_batch_of_mixed_samples_gives_the_logprobs_of_each_alone(
    folder: Path, samples: Sequence[TrainSample]
) -> None:
    policy = make_policy(folder, make_config())
    batch = collate(samples)
    assert [len(sample.images) for sample in samples] == [0, 1, 2, 1, 0]
    with torch.no_grad():
        logprobs_BT = policy.token_logprobs(batch.token_ids_BT, 1.0, batch.images).logprobs_BT
    for row, sample in enumerate(samples):
        expected = one_by_one(folder, sample)
        torch.testing.assert_close(logprobs_BT[row, 1 : len(sample.token_ids)], expected, rtol=1e-4, atol=1e-5)
    width, height = Image.open(BytesIO(batch.images[1])).size
    other = (batch.images[0], png(make_image(9, width=width, height=height)), *batch.images[2:])
    with torch.no_grad():
        other_BT = policy.token_logprobs(batch.token_ids_BT, 1.0, other).logprobs_BT
    rows = (other_BT - logprobs_BT).abs().amax(dim=1)
    assert (rows > 1e-3).tolist() == [False, False, True, False, False]  # the sample with this image


def test_a_step_trains_the_vision_tower_and_a_publish_sends_all_tensors_of_the_folder(
    folder: Path, samples: list[TrainSample]
) -> None:
    trainer = make_trainer(folder, make_config(tokens_per_microbatch=64, minibatches=2))
    before = weights(trainer.policy)
    stats = trainer.train_step(samples, 1.0)
    assert stats.microbatches > 2
    changed = {name for name, tensor in weights(trainer.policy).items() if not torch.equal(tensor, before[name])}
    assert any("visual.blocks.0" in name for name in changed)
    assert any("language_model" in name for name in changed)
    sent = dict(read_trained(folder).tensors(source_of(trainer.policy.named_tensors())))
    stored = stored_tensors(folder)
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }


def test_a_reference_reads_images_too(folder: Path, samples: list[TrainSample]) -> None:
    policy = make_policy(folder, make_config())
    policy.take_reference()
    batch = collate(samples)
    with torch.no_grad():
        own = policy.token_logprobs(batch.token_ids_BT, 1.0, batch.images).logprobs_BT
    assert torch.equal(policy.reference_logprobs(batch.token_ids_BT, 1.0, batch.images), own)


def test_placeholders_that_do_not_fit_the_images(folder: Path, samples: list[TrainSample]) -> None:
    trainer = make_trainer(folder, make_config())
    vision = trainer.policy.vision
    assert isinstance(vision, Vision)
    wrong = samples[1]
    tokens = vision.tokens(wrong.images[0])
    first = int(np.flatnonzero(wrong.token_ids == vision.placeholder)[0])
    short = TrainSample(
        np.delete(wrong.token_ids, first),
        np.delete(wrong.loss_mask, first),
        np.delete(wrong.logprobs, first),
        1.0,
        wrong.images,
    )
    before = weights(trainer.policy)
    with pytest.raises(DataError, match=rf"runs of \[{tokens - 1}\] placeholders .* makes \[{tokens}\] of them"):
        trainer.train_step([samples[0], short], 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.policy).items())
    stray = replace(samples[0], token_ids=np.full_like(samples[0].token_ids, vision.placeholder))
    with pytest.raises(DataError, match=r"runs of \[5\] placeholders .* makes \[\] of them"):
        trainer.train_step([stray, samples[1]], 1.0)


def test_a_text_model_with_images(tiny_model: Path) -> None:
    trainer = make_trainer(tiny_model, make_config())
    sample = TrainSample(np.arange(4), np.array([False, True, True, True]), np.zeros(4, np.float32), 1.0, IMAGES[:1])
    with pytest.raises(DataError, match="the model reads no images: it is a text model"):
        trainer.train_step([sample], 1.0)


def test_two_ranks_of_which_one_has_images(tmp_path: Path) -> None:
    make_tiny_vision_model(tmp_path / "model")
    run_two_ranks("train/vision_samples.py", str(tmp_path / "model"), str(tmp_path))
    one = make_trainer(tmp_path / "model", make_config(tokens_per_microbatch=64))
    expected = one.train_step(make_samples(tmp_path / "model"), 1.0)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-3, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-3)
