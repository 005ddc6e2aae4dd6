"""Checks that an engine with quantised weights serves the published version: by the audit of its layers, and by its
greedy answers, which are compared with those of servers that were started from the version's own folder.

    python -m benchmarks.gpu.quantised --engine '{"kind": "vllm", "python": "...", "engine_args": {"quantization":
        "fp8"}}' [--size 0.5b] [--transport cuda_ipc disk] [--folder plain] [--again]

With `--folder plain` the folders have bfloat16, and the engine quantises by itself as its option `quantization` says.
With `--folder fp8_block` they have fp8 with scales for blocks of 128x128, and Millrace quantises before it sends; leave
`quantization` out then.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import random_tensors, write_config
from millrace.engines.base import Engine
from millrace.errors import EngineError, PublishError
from millrace.model_config import read_quantization
from millrace.model_folder import stored_tensors
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.audit import Samples
from millrace.weights.publisher import Publish
from millrace.weights.quantised import as_in_folder
from millrace.weights.recipes import Recipe
from millrace.weights.rounding import quantise
from millrace.weights.source import source_of
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create

PROMPTS, LENGTH = 256, 24
BUCKET_BYTES = 64 * 2**20  # small, so that tensors that an engine fuses come in different buckets
LOUDER = 4.0
BLOCK = (128, 128)
Answers = list[tuple[int, float]]
Tensors = list[tuple[str, torch.Tensor]]


def make_version(folder: Path, size: str, seed: int, device: torch.device, form: str) -> Tensors:
    """Makes a version: a folder with its own weights, and the same tensors in bfloat16 on the device."""
    torch.manual_seed(seed)
    write_config(size, folder)
    tensors = [(name, _telling(name, tensor)) for name, tensor in random_tensors(folder, device)]
    content = {key: value for name, tensor in tensors for key, value in stored_as(form, name, tensor).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    if form == "fp8_block":
        config = json.loads((folder / "config.json").read_text())
        asked = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": asked}))
    return tensors


def stored_as(form: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what the folder has for a tensor, on the CPU."""
    if form == "plain" or not name.endswith("_proj.weight"):
        return {name: tensor.cpu()}
    (height, width), (rows, columns) = tensor.shape, BLOCK
    grid = -(-height // rows), -(-width // columns)
    stem = name.removesuffix("weight")
    recipe = Recipe("fp8", stem, (height, width), BLOCK, "weight_scale_inv", grid, "float32")
    return {key: value.cpu() for key, value in quantise(tensor, recipe).items()}


def _telling(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scales the inner weights. Otherwise the tied embedding would make every version repeat the last token."""
    if "norm" in name:
        return torch.ones_like(tensor)
    return tensor * LOUDER if ".layers." in name and tensor.ndim == 2 else tensor


async def ask(engine: Engine, label: str) -> Answers:
    """Asks for the first greedy token after each prompt, and its logprob."""
    drawn = torch.Generator().manual_seed(0)

    async def first(number: int) -> tuple[int, float]:
        prompt = tuple(torch.randint(2, 1000, (LENGTH,), generator=drawn).tolist())
        request = GenerateRequest(
            prompt, SamplingParams(1, temperature=0.0, ignore_eos=True), request_id=f"{label}-{number}"
        )
        made = await engine.generate(request, deadline=120)
        return made.output_ids[0], float(made.logprobs[0])

    return list(await asyncio.gather(*(first(number) for number in range(PROMPTS))))


def compare(name: str, one: Answers, other: Answers) -> None:
    same = [(a, b) for (token, a), (second, b) in zip(one, other, strict=True) if token == second]
    gap = sum(abs(a - b) for a, b in same) / max(len(same), 1)
    print(f"{name}: {len(same)} of {PROMPTS} tokens are the same, their logprobs {gap:.4f} apart", flush=True)


async def started_from(settings: str, folder: Path, scratch: Path, label: str) -> Answers:
    async with served(engine_config(settings), folder, scratch) as (_, engine):
        return await ask(engine, label)


async def run(arguments: argparse.Namespace) -> None:
    given = json.loads(arguments.engine)
    settings = json.dumps({**given, "engine_args": {"load_format": "auto", **given.get("engine_args", {})}})
    device = torch.device("cuda" if given.get("device", "cuda") == "cuda" else "cpu")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first = make_version(scratch / "first", arguments.size, 1, device, arguments.folder)
        second = make_version(scratch / "second", arguments.size, 2, device, arguments.folder)
        own = await started_from(settings, scratch / "second", scratch, "own")
        if arguments.again:
            compare(
                "started from its folder twice", own, await started_from(settings, scratch / "second", scratch, "again")
            )
        async with served(engine_config(settings), scratch / "first", scratch) as (_, engine):
            target = PublishTarget(engine, await engine.info())
            print("can:", ", ".join(sorted(target.info.capabilities)), flush=True)
            before = await ask(engine, "before")
            compare("of another version", before, own)
            version = 0
            for transport_name in arguments.transport:
                store = VersionStore(str(scratch / "store"), scratch / "first", keep=2, anchor_every=1)
                transport = create(transport_name, TransportContext(capabilities=target.info.capabilities, store=store))
                for label, tensors, expected in (("second", second, own), ("first", first, before)):
                    version += 1
                    samples, folder = Samples(version), scratch / "first"
                    try:
                        publish = Publish(
                            [target],
                            as_in_folder(
                                source_of(tensors), stored_tensors(folder), read_quantization(folder), samples
                            ),
                            version,
                            transport,
                            bucket_bytes=BUCKET_BYTES,
                            deadline=120,
                            samples=samples,
                        )
                        report = await publish.run()
                    except (PublishError, EngineError) as error:
                        print(f"{transport_name}: {label} failed: {str(error)[:600]}", flush=True)
                        break
                    [outcome] = report.engines
                    print(
                        f"{transport_name}: {label}, {report.nbytes / 1e6:.1f} MB; audit: {outcome.audit}", flush=True
                    )
                    compare(
                        f"{transport_name}: {label}, published in {report.seconds:.3f} s (pause "
                        f"{outcome.pause_seconds:.3f} s, attesting {outcome.attest_seconds:.3f} s of it), and started "
                        "from its folder",
                        await ask(engine, f"{version}"),
                        expected,
                    )
                await transport.close()
                store.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--transport", nargs="+", default=["cuda_ipc"], choices=["cuda_ipc", "disk", "shm"])
    parser.add_argument(
        "--folder", default="plain", choices=["plain", "fp8_block"], help="how the folders have weights"
    )
    parser.add_argument("--again", action="store_true", help="start the reference twice: what does a start change?")
    parser.add_argument("--engine", required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
