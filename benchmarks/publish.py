"""Publishing a 1 GB model through shared memory, beside one memcpy of it (the floor).

    python benchmarks/publish.py [--replicas 1] [--repeats 9]

Includes all that a publish is: copying into buckets, loading, checksums on both sides, commit. The floor copies the
same tensors within this process, in the same run. The first publish pays the page faults of new memory and is shown
apart.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.fleet.local import open_fleet


def make_model(folder: Path) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=16_384, hidden_size=1024, intermediate_size=3072, num_hidden_layers=19, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model


class Memcpy:
    """The floor: the tensors' bytes, copied by one thread into memory that was touched before."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._sources = [tensor.numpy() for tensor in tensors]
        self._copies = [source.copy() for source in self._sources]

    def seconds(self) -> float:
        started = time.perf_counter()
        for copy, source in zip(self._copies, self._sources, strict=True):
            np.copyto(copy, source)
        return time.perf_counter() - started


async def measure(replicas: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_model(folder)
        tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        memcpy = Memcpy([tensor for _, tensor in tensors])
        print(f"{nbytes / 1e9:.2f} GB to {replicas} engine(s)")
        config = EmbeddedEngineConfig(kind="embedded", replicas=replicas, max_running_requests=2, cached_prefixes=0)
        async with open_fleet(config, folder, log_dir=folder / "logs") as fleet:
            floors, publishes = [], []
            for version in range(1, repeats + 3):
                floor = memcpy.seconds()
                report = await fleet.publish(tensors, version)
                assert not report.failed
                engine = max(report.engines, key=lambda e: e.load_seconds)
                print(
                    f"version {version}: memcpy {floor:.3f} s, publish {report.seconds:.3f} s (stage "
                    f"{report.stage_seconds:.3f}, load {engine.load_seconds:.3f}, attest {engine.attest_seconds:.3f}, "
                    f"commit {engine.commit_seconds:.3f}), ratio {report.seconds / floor:.2f}"
                )
                if version > 2:  # by then both of the engine's sets of tensors have been written to once
                    floors.append(floor)
                    publishes.append(report.seconds)
            floor, seconds = statistics.median(floors), statistics.median(publishes)
            print(f"medians: memcpy {floor:.3f} s, publish {seconds:.3f} s, ratio {seconds / floor:.2f} (at most 3)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.replicas, arguments.repeats))


if __name__ == "__main__":
    main()
