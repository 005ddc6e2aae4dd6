"""What the records of samples cost: seconds that the trainer's logprobs add to a step, and that a step's file takes.

    python -m benchmarks.samples [--steps 20] [--large]

128 samples of 80 to 180 tokens with the demo's model, as in `make demo`. Steps that return logprobs alternate with
steps that don't. The file is written in a thread while the next step's samples are generated. --large: the file of 512
samples of 2,000 tokens, too.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from millrace.config.models import TrainConfig
from millrace.config.sources import TinyModelConfig
from millrace.rollout.chat import ChatFormat, load_chat_format
from millrace.rollout.sample import Episode, EpisodeEnd, Group, Problem, Sample, SampleStatus
from millrace.train.batch import sequences_of
from millrace.train.policy import load_policy
from millrace.train.samples import SampleFormat, trained_samples
from millrace.train.tiny import make_tiny_model
from millrace.train.trainer import Trainer, _Tally
from millrace.train.world import join_world
from millrace.types import VersionSpan

KEEP, LOGPROBS_OF = _Tally.keep, _Tally.logprobs_of
PROBLEM = Problem.of_question("p", "How many coins are there?", "7")


def group(chat: ChatFormat, count: int, shortest: int, longest: int) -> Group:
    """Return samples of text with random lengths, of which all but the first 60 tokens were sampled."""
    draw = np.random.default_rng(0)
    text = np.array(chat.tokenizer.encode("Mia starts with 16 coins. She deals them out to 8 friends.\n" * 200))

    def sample(index: int) -> Sample:
        ids = tuple(text[: int(draw.integers(shortest, longest + 1))].tolist())
        mask = np.arange(len(ids)) >= 60
        logprobs = np.where(mask, draw.normal(-1, 0.3, len(ids)), 0).astype(np.float32)
        spans = (VersionSpan(1, 60, len(ids)),)
        message = {"role": "assistant", "content": chat.decode(ids[60:])}
        episode = Episode(ids, mask, logprobs, spans, 1, EpisodeEnd.ANSWERED, (message,))
        return Sample(f"s-{index}", "g", PROBLEM, SampleStatus.FINISHED, episode, float(draw.normal()))

    return Group("g", PROBLEM, tuple(sample(index) for index in range(count)))


def step_seconds(folder: Path, samples: Group, steps: int) -> tuple[dict[bool, list[float]], float]:
    """Return the seconds of steps with and without the logprobs of the samples, which alternate, and those in which a
    step keeps and copies them."""
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            result = function(*arguments)
            inside += time.perf_counter() - started
            return result

        return call

    config = TrainConfig(steps=10 * steps, lr=3e-4, tokens_per_microbatch=16384)
    sequences = sequences_of(samples, normalize=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with join_world("cpu") as world:
        trainer = Trainer(load_policy(folder, config, world), config)
        trainer.train_step(sequences, 1.0)
        for number in range(2 * steps):
            kept = number % 2 == 0
            own = {"keep": timed(KEEP), "logprobs_of": timed(LOGPROBS_OF)}
            nothing = {"keep": lambda *_: None, "logprobs_of": lambda *_: ()}
            with mock.patch.multiple(_Tally, **(own if kept else nothing)):
                started = time.perf_counter()
                trainer.train_step(sequences, 1.0)
                seconds[kept].append(time.perf_counter() - started)
    return seconds, inside / steps


def print_file(chat: ChatFormat, samples: Group) -> None:
    """Print what the file of a step takes."""
    sequences = sequences_of(samples, normalize=True)
    trained = trained_samples([samples], sequences, [one.logprobs for one in sequences])
    form, times = SampleFormat(chat), []
    for _ in range(6):
        started = time.process_time()
        content = form.parquet(1, samples.samples, trained)
        times.append(time.process_time() - started)
    tokens = sum(one.token_ids.size for one in sequences)
    print(
        f"file of {len(sequences)} samples, {tokens:,} tokens: {statistics.median(times[1:]):.3f} s of CPU time, "
        f"{len(content) / 2**20:.2f} MiB, {len(content) / tokens:.1f} bytes a token"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        make_tiny_model(TinyModelConfig(kind="tiny"), 0, folder)
        chat = load_chat_format(folder)
        samples = group(chat, 128, 80, 180)
        seconds, inside = step_seconds(folder, samples, options.steps)
        for kept, name in ((True, "with"), (False, "without")):
            fastest = sorted(seconds[kept])[: max(1, options.steps // 4)]
            print(
                f"step {name} logprobs: median {statistics.median(seconds[kept]):.4f} s, fastest quarter "
                f"{statistics.fmean(fastest):.4f} s"
            )
        print(f"of a step, {1000 * inside:.2f} ms keep and copy them")
        print_file(chat, samples)
        if options.large:
            print_file(chat, group(chat, 512, 2000, 2000))


if __name__ == "__main__":
    main()
