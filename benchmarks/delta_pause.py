"""Measures how long a publish by delta pauses a real SGLang or vLLM: if it reads each version's folder, and if its
weight loader or extension writes only what has changed.

    python -m benchmarks.delta_pause [--size 0.5b] [--part 4] [--share 0.02] [--repeats 5] [--folder /dev/shm]
        [--engine '{"kind": "vllm", "device": "cpu"}']

`--part 4` keeps a quarter of the layers and of the vocabulary. Trainer, sidecar and server are on one host. Versions
differ from the one before in a share of the elements of every tensor, by one in their bits. The versions and the
sidecar's folders are below --folder. The two ways take turns. After a folder was read, an unmeasured version brings
the digest of what the server holds, and lets SGLang's loader compare it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import random_tensors, write_config
from benchmarks.sidecar import sidecar
from millrace.buckets import DiskBucket
from millrace.weights.publisher import Publish
from millrace.weights.report import EngineReport
from millrace.weights.source import source_of
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.delta import DeltaTransport


class EitherWay(DeltaTransport):
    """With `whole`, an engine gets nothing but a folder."""

    whole = False

    def _bucket_for(self, target: PublishTarget) -> DiskBucket:
        bucket = super()._bucket_for(target)
        return DiskBucket(bucket.path) if self.whole else bucket


def step(tensors: list[tuple[str, torch.Tensor]], share: float) -> None:
    """Changes a share of the elements of each tensor by one, as integers."""
    for _, tensor in tensors:
        bits = tensor.view(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
        bits += (torch.rand(bits.shape) < share).to(bits.dtype)


def write_part(size: str, part: int, folder: Path) -> Path:
    """Writes the config of a model with this part of the layers and of the vocabulary."""
    path = write_config(size, folder) / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_hidden_layers", "vocab_size"):
        config[key] = max(1, config[key] // part)
    path.write_text(json.dumps(config))
    return folder


async def run(arguments: argparse.Namespace) -> None:
    settings = json.loads(arguments.engine)
    arguments_of_server = {"load_format": "auto", **settings.get("engine_args", {})}
    config = engine_config(json.dumps({**settings, "engine_args": arguments_of_server}))
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        tempfile.tempdir = str(scratch)  # the store's own copies are there too
        folder = write_part(arguments.size, arguments.part, scratch / "model")
        tensors = random_tensors(folder, torch.device("cpu"))
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        _, engine = await stack.enter_async_context(served(config, folder, scratch))
        target = PublishTarget(engine, await engine.info())
        store = VersionStore(str(scratch / "store"), folder, keep=2, anchor_every=1000)
        stack.callback(store.close)
        url = stack.enter_context(sidecar("--store", str(scratch / "store"), "--folder", str(scratch / "replica")))
        transport = EitherWay(store, {engine.name: url}, key=None)
        stack.push_async_callback(transport.close)
        version = 0

        async def publish(*, whole: bool) -> EngineReport:
            nonlocal version
            version, transport.whole = version + 1, whole
            step(tensors, arguments.share)
            publish = Publish(
                [target], source_of(tensors), version, transport, bucket_bytes=2**28, deadline=arguments.timeout
            )
            report = (await publish.run()).engines[0]
            assert report.error is None, report.error
            store.secure(version)
            return report

        reports: dict[bool, list[EngineReport]] = {True: [], False: []}
        await publish(whole=False)
        for _ in range(arguments.repeats):
            reports[True].append(await publish(whole=True))
            await publish(whole=False)
            reports[False].append(await publish(whole=False))
        print(
            f"{sum(t.nbytes for _, t in tensors) / 1e9:.2f} GB in {len(tensors)} tensors; {arguments.share:.1%} changed"
        )
        for whole, name in ((True, "whole folders"), (False, "what has changed")):
            legs = ("pause", "begin", "load", "attest", "commit")
            rows = [[getattr(report, f"{leg}_seconds") for report in reports[whole]] for leg in legs]
            medians = ", ".join(f"{leg} {statistics.median(row):.3f} s" for leg, row in zip(legs, rows, strict=True))
            print(f"{name}, medians of {arguments.repeats}: {medians}; least pause {min(rows[0]):.3f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--engine", default='{"device": "cpu"}')
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
