"""Checks of an engine with several data-parallel ranks, over which the experts of a mixture are spread. This is beyond
the conformance checks and uses the same server."""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from benchmarks.sidecar import sidecar
from transformers import AutoModelForCausalLM

from millrace.config.models import TransportName
from millrace.engines.base import Engine
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.publisher import Publish
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create
from tests.architectures import OVER_TWO, make_moe_folder
from tests.conformance.sampling import require_expected
from tests.weights.variants import read_folder

RANKS = 2
DEADLINE = 60.0
BUCKET = 128 * 1024  # bytes; a version has several buckets


def make_spread_folders(parent: Path) -> tuple[Path, Path]:
    """Makes two mixtures of experts with other weights, which are so large that experts matter."""
    folders = parent / "own", parent / "other"
    for seed, folder in enumerate(folders):
        model = make_moe_folder(folder, **OVER_TWO)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return folders


async def check_ranks_hold_their_experts(engine: Engine, split: frozenset[str] = frozenset()) -> None:
    """Each rank has other experts than the others, and the same weights otherwise, but those that are split too."""
    info = await engine.info()
    assert info.ranks == RANKS
    checksums = await engine.checksums()
    first, second = (
        {name: value for key, value in checksums.items() if (name := key.removeprefix(f"rank{rank}:")) != key}
        for rank in range(RANKS)
    )
    assert first.keys() == second.keys()
    assert first
    experts = {name for name in first if ".experts." in name}
    assert {name for name in first if first[name] != second[name]} == experts | split


async def check_weights_come(engine: Engine, name: TransportName, folders: tuple[Path, Path]) -> int:
    """Publishes the other folder's weights by a transport, and then the engine's own. Returns the last version."""
    target = PublishTarget(engine, await engine.info())
    version = target.info.weight_version or 0
    with ExitStack() as stack:
        sidecars = {engine.name: stack.enter_context(sidecar())} if name == "ucx" else {}
        key = os.environ.get(SIDECAR_KEY)
        context = TransportContext(capabilities=target.info.capabilities, sidecars=sidecars, sidecar_key=key)
        way = create(name, context)
        try:
            for folder in reversed(folders):
                version += 1
                source = source_of(list(read_folder(folder).items()))
                publish = Publish([target], source, version, way, bucket_bytes=BUCKET, deadline=DEADLINE)
                assert not (await publish.run()).failed
                await require_served(engine, folder, version)
        finally:
            await way.close()
    return version


async def require_served(engine: Engine, folder: Path, version: int) -> None:
    """Requires what the folder's model in transformers would generate, of requests that are spread over the ranks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sampling = SamplingParams(8, temperature=0.0, ignore_eos=True)
    asked = [GenerateRequest((5 + number, 17, 300, 42), sampling) for number in range(6)]
    made = await asyncio.gather(*(engine.generate(one, deadline=DEADLINE) for one in asked))
    for request, generation in zip(asked, made, strict=True):
        assert [span.version for span in generation.version_spans] == [version]
        require_expected(model, request, generation, counts_prompt=True)
