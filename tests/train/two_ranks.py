"""The script of each rank in test_ranks.py: `torchrun two_ranks.py MODEL OUT cpu`. The test checks the files in OUT."""

import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from millrace.config.models import LossConfig
from millrace.errors import CheckpointError
from millrace.train.batch import TrainSample, supervised_sample
from millrace.train.checkpoint import export, latest, load, save
from millrace.train.trainer import StepStats, Trainer, TrainingError
from millrace.train.world import World, end_rank, join_world
from tests.train.small_models import make_config, make_samples, make_trainer, same, weights

CONFIG = make_config(loss=LossConfig(kl_coefficient=0.2, average="sequence"), gradient_checkpointing=True)
STEPS = [make_samples(12, seed=1), make_samples(9, seed=2), make_samples(4, seed=3)]
# How many samples rank 0 has, of how many. The shares are uneven, and at last rank 1 has none.
SHARES = [(9, 12), (1, 9), (4, 4)]
SUPERVISED = [supervised_sample(s.token_ids.tolist(), s.loss_mask.tolist()) for s in make_samples(6, seed=4)]


def share(world: World, step: int) -> list[TrainSample]:
    first, total = SHARES[step]
    return STEPS[step][:first] if world.rank == 0 else STEPS[step][first:total]


def written(stats: StepStats) -> dict[str, object]:
    return asdict(stats) | {"logprobs": [torch.from_numpy(one) for one in stats.logprobs]}


def train(world: World, trainer: Trainer, out: Path) -> dict[str, object]:
    stats = [trainer.train_step(share(world, step), 0.9) for step in (0, 1)]
    two_steps = weights(trainer.policy)
    saved = save(out, trainer, {"by": "two ranks"}, keep=2)
    stats.append(trainer.train_step(share(world, 2), 0.9))
    resumed = make_trainer(Path(sys.argv[1]), CONFIG, world)
    extra = load(saved, resumed)
    again = resumed.train_step(share(world, 2), 0.9)
    return {
        "stats": [written(s) for s in stats],
        "two_steps": two_steps,
        "three_steps": weights(trainer.policy),
        "resumed_like_never_stopped": again == stats[2] and same(weights(resumed.policy), weights(trainer.policy)),
        "extra": extra,
        "local_elements": sum(t.to_local().numel() for t in trainer.policy.state().values() if isinstance(t, DTensor)),
    }


def supervise(world: World) -> dict[str, object]:
    trainer = make_trainer(Path(sys.argv[1]), make_config(), world)
    stats = trainer.supervised_step(SUPERVISED[world.rank :: world.size])
    return {"supervised": asdict(stats), "supervised_weights": weights(trainer.policy)}


def bfloat16(world: World) -> dict[str, object]:
    trainer = make_trainer(Path(sys.argv[1]), make_config(dtype="bfloat16"), world)
    stats = trainer.train_step(share(world, 0), 0.9)
    return {"bfloat16": written(stats), "bfloat16_dtypes": {str(t.dtype) for t in trainer.policy.state().values()}}


def fail(world: World, trainer: Trainer, out: Path) -> dict[str, object]:
    """An error on one rank must end both, at once and with the reason."""
    before = weights(trainer.policy)
    samples = share(world, 0)
    if world.rank == 1:
        samples = [replace(sample, advantage=float("nan")) for sample in samples]
    errors = []
    try:
        trainer.train_step(samples, 0.9)
    except TrainingError as error:
        errors.append(str(error))
    untouched = same(before, weights(trainer.policy))
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        save(out, trainer, {}, keep=2)
    except CheckpointError as error:
        errors.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"errors": errors, "untouched": untouched, "latest": str(latest(out))}


def main() -> None:
    out = Path(sys.argv[2])
    with join_world(sys.argv[3], timeout=60) as world:
        trainer = make_trainer(Path(sys.argv[1]), CONFIG, world)
        results = {**train(world, trainer, out), **supervise(world), **bfloat16(world)}
        export(trainer.policy, out / "export")
        results |= fail(world, trainer, out)
        torch.save(results, out / f"rank-{world.rank}.pt")
    end_rank()


if __name__ == "__main__":
    main()
