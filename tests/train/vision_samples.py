"""Samples with images, and the script of each rank in test_vision.py: `torchrun vision_samples.py MODEL OUT`."""

import sys
from pathlib import Path

import numpy as np
import torch

from millrace.rollout.vision import Vision, load_vision
from millrace.train.batch import TrainSample
from millrace.train.world import end_rank, join_world
from tests.train.small_models import make_config, make_trainer
from tests.vision import make_image, png

IMAGES = tuple(png(make_image(n, width=w, height=h)) for n, (w, h) in enumerate([(56, 56), (150, 70), (60, 200)]))


def make_samples(folder: Path) -> list[TrainSample]:
    """Makes conversations without, with one and with two images, of different sizes."""
    vision, rng = load_vision(str(folder)), np.random.default_rng(3)
    assert isinstance(vision, Vision)
    samples = []
    for images in ((), IMAGES[:1], IMAGES[1:], IMAGES[2:], ()):
        ids = rng.integers(1, 200, 5).tolist()
        for image in images:
            ids += [vision.placeholder] * vision.tokens(image) + rng.integers(1, 200, 3).tolist()
        mask = np.zeros(len(ids), np.bool_)
        mask[-3:] = True
        logprobs = rng.normal(-5, 0.5, len(ids)).astype(np.float32)
        samples.append(TrainSample(np.asarray(ids), mask, logprobs, float(rng.normal()), images))
    return samples


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    with join_world("cpu", timeout=60) as world:
        samples = make_samples(folder)
        trainer = make_trainer(folder, make_config(tokens_per_microbatch=64), world)
        stats = trainer.train_step(samples[:4] if world.rank == 0 else samples[4:], 1.0)
        torch.save({"loss": stats.loss, "grad_norm": stats.grad_norm}, out / f"rank-{world.rank}.pt")
    end_rank()


if __name__ == "__main__":
    main()
