"""Publishes quantised weights to an engine, and checks what it then serves: by the audit of its layers, and by its
greedy answers, which are compared with those that it gave when it was started from the version's folder.

    python -m benchmarks.gpu.quantised --engine '{"kind": "vllm", "python": "..."}' [--size 0.5b] [--folder fp8_block
        fp8_channel int8 int4 mxfp8 nvfp4 nvfp4a16 modelopt_mxfp8 modelopt_nvfp4] [--transport cuda_ipc disk] [--again]

For each engine and form of folder it starts a server from a first version, publishes a second one, and then the first
one again. Millrace quantises the weights as the folder has them. With `--folder plain` the folders have bfloat16, and
the engine quantises by itself as its option `quantization` says. A form that the engine does not start with is
reported, and the next one follows. A table with a line for each publish comes last.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.quantised_models import MODELOPT, config_of, quantised_tensors

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import random_tensors, write_config
from millrace.config.models import TransportName
from millrace.engines.base import Engine
from millrace.errors import MillraceError
from millrace.model_config import read_quantization
from millrace.model_folder import stored_tensors
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.audit import EngineAudit, Samples
from millrace.weights.publisher import Publish
from millrace.weights.quantised import as_in_folder
from millrace.weights.source import source_of
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create

FORMS = ("plain", "fp8_block", "fp8_tensor", "fp8_channel", "int8", "int4", "mxfp8", "nvfp4", "nvfp4a16", *MODELOPT)
PROMPTS, LENGTH = 256, 24
BUCKET_BYTES = 64 * 2**20  # small, so that tensors that an engine fuses come in different buckets
LOUDER = 4.0
TIMEOUT = 120.0
Answers = list[tuple[int, float]]
Tensors = list[tuple[str, torch.Tensor]]


def make_version(folder: Path, size: str, seed: int, device: torch.device, form: str) -> Tensors:
    """Makes a version: a folder with its own weights, and the same tensors in bfloat16 on the device."""
    torch.manual_seed(seed)
    write_config(size, folder)
    tensors = [(name, _telling(name, tensor)) for name, tensor in random_tensors(folder, device)]
    content = dict(tensors) if form == "plain" else quantised_tensors(tensors, form)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in content.items()}
    save_file(on_cpu, folder / "model.safetensors", metadata={"format": "pt"})
    if form != "plain":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(form)}))
    return tensors


def _telling(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scales the inner weights. Otherwise the tied embedding would make every version repeat the last token."""
    if "norm" in name:
        return torch.ones_like(tensor)
    return tensor * LOUDER if ".layers." in name and tensor.ndim == 2 else tensor


async def ask(engine: Engine, label: str) -> Answers:
    """Asks for the first greedy token after each prompt, and its logprob. No prefix is in the cache."""
    await engine.flush_cache()
    drawn = torch.Generator().manual_seed(0)

    async def first(number: int) -> tuple[int, float]:
        prompt = tuple(torch.randint(2, 1000, (LENGTH,), generator=drawn).tolist())
        request = GenerateRequest(
            prompt, SamplingParams(1, temperature=0.0, ignore_eos=True), request_id=f"{label}-{number}"
        )
        made = await engine.generate(request, deadline=120)
        return made.output_ids[0], float(made.logprobs[0])

    return list(await asyncio.gather(*(first(number) for number in range(PROMPTS))))


def compare(name: str, one: Answers, other: Answers) -> str:
    """Prints how alike answers are, and returns it in short."""
    same = [(a, b) for (token, a), (second, b) in zip(one, other, strict=True) if token == second]
    gap = sum(abs(a - b) for a, b in same) / max(len(same), 1)
    print(f"{name}: {len(same)} of {PROMPTS} tokens are the same, their logprobs {gap:.4f} apart", flush=True)
    return f"{len(same)}/{PROMPTS} ({gap:.4f})"


async def started_from(settings: str, folder: Path, scratch: Path) -> Answers:
    async with served(engine_config(settings), folder, scratch) as (_, engine):
        return await ask(engine, "own")


def worst(audit: EngineAudit | None) -> str:
    """The form of the layer with the largest error, and the error."""
    measured = [layer for layer in audit.layers if layer.error is not None] if audit is not None else []
    if not measured:
        return "not measured"
    layer = max(measured, key=lambda one: one.error or 0.0)
    return f"{layer.error:.4f} ({layer.layer}, {layer.form})"


async def publish_to(
    target: PublishTarget, folder: Path, tensors: Tensors, version: int, name: TransportName, store: VersionStore
) -> tuple[str, str]:
    """Publishes a version by one transport. Returns what it sent and how long it took, and what the engine holds."""
    samples = Samples(version)
    transport = create(name, TransportContext(capabilities=target.info.capabilities, here=True, store=store))
    try:
        source = as_in_folder(source_of(tensors), stored_tensors(folder), read_quantization(folder), samples)
        report = await Publish(
            [target], source, version, transport, bucket_bytes=BUCKET_BYTES, deadline=TIMEOUT, samples=samples
        ).run()
    finally:
        await transport.close()
    [outcome] = report.engines
    print(f"{name}: version {version}; audit: {outcome.audit}", flush=True)
    took = (
        f"{report.nbytes / 1e6:8.1f} MB  pause {1000 * outcome.pause_seconds:7.1f} ms, of which attesting "
        f"{1000 * outcome.attest_seconds:6.1f}"
    )
    return took, worst(outcome.audit)


async def run_form(arguments: argparse.Namespace, form: str, settings: str, scratch: Path) -> list[str]:
    """Publishes two versions in one form. Returns the lines of the table."""
    device = torch.device("cuda" if json.loads(settings).get("device", "cuda") == "cuda" else "cpu")
    folders = [scratch / "first", scratch / "second"]
    first, second = (make_version(folder, arguments.size, seed, device, form) for seed, folder in enumerate(folders, 1))
    lines = []
    own = None
    if arguments.again:
        own = await started_from(settings, folders[1], scratch)
        compare("started from its folder twice", own, await started_from(settings, folders[1], scratch))
    async with served(engine_config(settings), folders[0], scratch) as (_, engine):
        target = PublishTarget(engine, await engine.info())
        print("can:", ", ".join(sorted(target.info.capabilities)), flush=True)
        before, bytes_before = await ask(engine, "before"), await engine.checksums()
        compare(f"{form}: asked twice", await ask(engine, "twice"), before)
        version = 0
        for name in arguments.transport:
            store = VersionStore(str(scratch / "store"), folders[0], keep=2, anchor_every=1)
            for tensors, expected in ((second, own), (first, before)):
                version += 1
                head = f"{form:14} {name:8} {'second' if tensors is second else 'first':6}"
                try:
                    took, error = await publish_to(target, folders[0], tensors, version, name, store)
                except MillraceError as failure:
                    lines.append(f"{head} failed: {str(failure)[:300]}")
                    break
                answers, alike = await ask(engine, f"{version}"), ""
                if expected is not None:
                    alike = f"  same tokens {compare(f'{form}, published by {name}', answers, expected)}"
                else:
                    compare(f"{form}: another version", answers, before)
                if tensors is first:
                    now = await engine.checksums()
                    other = sorted(name for name in now if now[name] != bytes_before[name])
                    alike += f"  same bytes {'yes' if not other else f'no: {len(other)}, such as {other[0]}'}"
                lines.append(f"{head} {took}  worst layer {error}{alike}")
            store.close()
    return lines


async def run(arguments: argparse.Namespace) -> Sequence[str]:
    lines: list[str] = []
    for engine, form in itertools.product(arguments.engine, arguments.folder):
        given = json.loads(engine)
        settings = json.dumps({**given, "engine_args": {"load_format": "auto", **given.get("engine_args", {})}})
        with tempfile.TemporaryDirectory() as name:
            try:
                made = await run_form(arguments, form, settings, Path(name))
            except MillraceError as error:
                print(f"{form}: {error}", flush=True)
                first, *_, last = [*str(error).splitlines(), ""]
                made = [f"{form:14} not served: {first} {last.strip()}"]
        lines += [f"{given['kind']:6} {line}" for line in made]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--transport", nargs="+", default=["cuda_ipc"], choices=["cuda_ipc", "disk", "shm"])
    parser.add_argument("--folder", nargs="+", default=["plain"], choices=FORMS, help="how the folders have weights")
    parser.add_argument("--again", action="store_true", help="also start two servers from the second folder")
    parser.add_argument("--engine", nargs="+", required=True)
    print("\n".join(["", *asyncio.run(run(parser.parse_args()))]))


if __name__ == "__main__":
    main()
