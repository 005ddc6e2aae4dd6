"""Seconds of a training step of the demo's model, with one thread and with two, and the share of logprobs and
entropy in it.

    python -m benchmarks.train_step [--rounds 3] [--busy]

128 samples of 80 to 180 tokens in microbatches of 16,384, as in `make demo`. `active`: threads that wait for each other
keep their core busy, which is OpenMP's default. `passive`: they sleep, as in `millrace train`. With --busy, another
process computes all the time. Each case is a process of its own, and the rounds are interleaved.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STEPS = 4
CASES = {"1 thread": (1, "active"), "2 threads, active": (2, "active"), "2 threads, passive": (2, "passive")}
# The names that torch's profiler has for what follows the model's own forward pass, and comes before its backward pass.
LOGPROBS = ("_GatherLogprobs", "_GatherLogprobsBackward")


def measure(threads: int, folder: Path) -> dict[str, float]:
    """Return the median seconds of a step, and the shares of its parts."""
    import numpy as np
    import torch

    from millrace.config.models import TrainConfig
    from millrace.config.sources import TinyModelConfig
    from millrace.train.batch import TrainSample
    from millrace.train.policy import load_policy
    from millrace.train.tiny import make_tiny_model
    from millrace.train.trainer import Trainer
    from millrace.train.world import join_world

    torch.set_num_threads(threads)
    make_tiny_model(TinyModelConfig(kind="tiny"), 0, folder)
    draw = np.random.default_rng(0)

    def sample() -> TrainSample:
        prompt, length = 60, 60 + int(draw.integers(20, 120))
        mask = np.arange(length) >= prompt
        logprobs = np.full(length, -3, np.float32)
        return TrainSample(draw.integers(0, 200, length), mask, logprobs, float(draw.normal()))

    samples = [sample() for _ in range(128)]
    config = TrainConfig(steps=100, lr=3e-4, tokens_per_microbatch=16384)
    with join_world("cpu") as world:
        trainer = Trainer(load_policy(folder, config, world), config)
        trainer.train_step(samples, 1.0)
        seconds = []
        for _ in range(STEPS):
            started = time.perf_counter()
            trainer.train_step(samples, 1.0)
            seconds.append(time.perf_counter() - started)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            trainer.train_step(samples, 1.0)
    events = profiled.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    logprobs = sum(event.cpu_time_total for event in events if event.key in LOGPROBS)
    return {"step": statistics.median(seconds), "logprobs": logprobs / whole}


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Keep one core busy while the block runs."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.one, Path(folder))))
        return
    with busy(given.busy):
        for number in range(given.rounds):
            made = {}
            for case, (threads, policy) in CASES.items():
                command = [sys.executable, "-m", "benchmarks.train_step", "--one", str(threads)]
                environment = {**os.environ, "OMP_WAIT_POLICY": policy}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                made[case] = json.loads(done.stdout.splitlines()[-1])
            told = ", ".join(f"{case} {parts['step']:.2f} s" for case, parts in made.items())
            share = made["1 thread"]["logprobs"]
            print(f"round {number + 1}: {told}; logprobs and entropy are {share:.0%} of a step", flush=True)


if __name__ == "__main__":
    main()
