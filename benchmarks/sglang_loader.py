"""Measures what SGLang's weight loader costs besides the copies, in this process and without SGLang.

    python -m benchmarks.sglang_loader [--size moe-tiny] [--device cuda] [--bucket-mb 2048] [--repeats 7]

A mixture of experts keeps its weights as SGLang does: q, k and v in one parameter, the experts of a layer in two. Its
buckets are loaded again and again, as by a trainer on the same device. The times are medians for one bucket.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import moe_shapes, write_config
from millrace.buckets import TensorSpec
from millrace.checksum import sampled_checksums
from millrace.engines.answers import AnswerFiles
from millrace.engines.sglang.loading import LoaderUpdate, in_files
from millrace.engines.stock.launching import EXTENSION
from millrace.weights.plan import buckets
from millrace.weights.transports.layouts import layout_of

QKV, EXPERT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class FusedMoe(torch.nn.Module):
    """The parameters of a mixture of experts in SGLang's form, and a loader for the tensors of a checkpoint."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]], experts: int, device: torch.device) -> None:
        super().__init__()
        self._places: dict[str, torch.Tensor] = {}
        shapes = dict(tensors)
        for name, shape in shapes.items():
            stem, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind == "q_proj":
                rows = [shapes[f"{stem}.{part}.weight"][0] for part in QKV]
                qkv = self._parameter(f"{stem}.qkv", (sum(rows), shape[1]), device)
                self._places |= zip((f"{stem}.{part}.weight" for part in QKV), qkv.split_with_sizes(rows), strict=True)
            elif ".experts.0." in name and kind in ("gate_proj", "down_proj"):
                layer = stem.removesuffix(".0")
                parts = EXPERT if kind == "gate_proj" else (kind,)
                fused = self._parameter(f"{layer}.{kind}", (experts, len(parts) * shape[0], shape[1]), device)
                for number in range(experts):
                    names = (f"{layer}.{number}.{part}.weight" for part in parts)
                    self._places |= zip(names, fused[number].split_with_sizes([shape[0]] * len(parts)), strict=True)
            elif ".experts." not in name and kind not in QKV:
                self._places[name] = self._parameter(name, shape, device)

    def _parameter(self, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        made = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device), requires_grad=False)
        self.register_parameter(name.replace(".", "_"), made)
        return made.data

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._places[name].copy_(tensor)


def median_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Measures the milliseconds until the device is done, after two runs that are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="moe-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bucket-mb", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sys.path.insert(0, str(EXTENSION))
    from millrace_sglang import loader  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as scratch:
        config = json.loads((write_config(arguments.size, Path(scratch, "model")) / "config.json").read_text())
    shapes = list(moe_shapes(config))
    model = FusedMoe(shapes, config["num_experts"], device)
    files, update, legs = AnswerFiles(1), LoaderUpdate("benchmark"), dict[str, list[float]]()
    made = ((name, torch.empty(shape, dtype=torch.bfloat16, device=device)) for name, shape in shapes)
    count = 0
    for tensors in buckets(made, arguments.bucket_mb * 2**20):
        specs, count = layout_of(tensors).specs, count + len(tensors)
        bucket = torch.randint(0, 255, (specs[-1].offset + specs[-1].nbytes,), dtype=torch.uint8, device=device)
        [order] = update.orders(specs, in_files(files.answers()))
        for name, work in measured(loader, model, order, bucket, specs, [tensor for _, tensor in tensors]).items():
            legs.setdefault(name, []).append(median_ms(work, arguments.repeats, device))
        update.take(specs, files.read())
    assert not update.missing, update.missing
    print(f"{count} tensors in {len(legs['whole call'])} buckets")
    for name, times in legs.items():
        print(f"{name:40} {statistics.median(times):8.3f} ms a bucket, {sum(times) * 1e3 / count:6.2f} us a tensor")


def measured(
    loader: Any,
    model: FusedMoe,
    order: str,
    bucket: torch.Tensor,
    specs: tuple[TensorSpec, ...],
    tensors: list[torch.Tensor],
) -> dict[str, Callable[[], object]]:
    """Returns what is measured, after the bucket was loaded once."""
    loader.load(model, [(order, bucket)])
    layout = list(loader.LOADERS[model].layouts.values())[-1]
    targets = [model._places[spec.name] for spec in specs]
    sources = [tensor for _, tensor in layout.views(bucket)]
    return {
        "the copies alone, with views at hand": lambda: torch._foreach_copy_(targets, sources),
        "whole call": lambda: loader.load(model, [(order, bucket)]),
        "in it: checksums": lambda: layout.places.checksums(bucket),
        "in it: copies": lambda: layout.plan.run(bucket),
        "in it: comparison of samples": lambda: layout.plan.differing(bucket),
        "the trainer's checksums": lambda: sampled_checksums(tensors),
    }


if __name__ == "__main__":
    main()
