"""Publishing a 1 GB model through shared memory, beside one memcpy of it (the floor).

    python benchmarks/publish.py [--replicas 1] [--repeats 5]

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


def memcpy_seconds(tensors: list[torch.Tensor]) -> float:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


async def measure(replicas: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_model(folder)
        tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        floor = memcpy_seconds([tensor for _, tensor in tensors])
        print(
            f"{nbytes / 1e9:.2f} GB, one memcpy {floor:.3f} s ({nbytes / floor / 1e9:.1f} GB/s), {replicas} engine(s)"
        )
        config = EmbeddedEngineConfig(kind="embedded", replicas=replicas, max_running_requests=2, cached_prefixes=0)
        async with open_fleet(config, folder, log_dir=folder / "logs") as fleet:
            ratios = []
            for version in range(1, repeats + 2):
                report = await fleet.publish(tensors, version)
                assert not report.failed
                engine = max(report.engines, key=lambda e: e.load_seconds)
                ratio = report.seconds / floor
                print(
                    f"version {version}: {report.seconds:.3f} s, ratio {ratio:.2f} ("
                    f"stage {report.stage_seconds:.3f}, load {engine.load_seconds:.3f}, "
                    f"attest {engine.attest_seconds:.3f}, commit {engine.commit_seconds:.3f})"
                )
                if version > 1:
                    ratios.append(ratio)
            print(f"median ratio {statistics.median(ratios):.2f} (at most 3)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.replicas, arguments.repeats))


if __name__ == "__main__":
    main()
