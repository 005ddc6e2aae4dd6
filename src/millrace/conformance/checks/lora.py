"""Checks of LoRA adapters: which requests use which adapter, and for how long."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from millrace.conformance.check import Check, Lacking, Subject, check, expect, refused
from millrace.conformance.checks.caching import PREFIX
from millrace.conformance.requests import Flight, alike, ask, catch, fingerprint, generate, require_whole
from millrace.conformance.weights import folder, folders, next_version, one_way, restore
from millrace.errors import EngineError
from millrace.launch.ports import is_here
from millrace.model_folder import stored_tensors
from millrace.types import Capability, GenerateRequest, LoraConfig

CONFIG = LoraConfig(rank=8, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj"))
TARGET = re.compile(r"(.*\.(?:q_proj|v_proj|o_proj))\.weight")
FOLLOWED = 4  # tokens compared after an update; later ones may differ by rounding


@asynccontextmanager
async def loras(subject: Subject, *names: str) -> AsyncIterator[list[Path]]:
    """Yield one adapter for each name, in folders that the engine's host can read.

    Adapters that are loaded under these names at the end are unloaded.
    """
    if not is_here(subject.engine.url):
        raise Lacking("the engine is on another host, and the adapters can't be written there")
    model = folder(subject)
    with tempfile.TemporaryDirectory(prefix="millrace-") as place:
        written = [await asyncio.to_thread(_write, model, Path(place), number) for number in range(len(names))]
        try:
            yield written
        finally:
            for name in names:
                with suppress(EngineError):  # most checks have unloaded it
                    await subject.engine.unload_lora(name)


def _write(model: Path, place: Path, number: int) -> Path:
    """Write a random adapter that is strong enough to change the generated tokens."""
    place.chmod(0o755)  # the engine may run as another user
    try:
        import torch
    except ModuleNotFoundError as error:
        raise Lacking(f"{error.name} is not installed here; pip install 'millrace[train]'") from error
    from millrace.weights.lora import write_lora

    draw = torch.Generator().manual_seed(number)
    tensors = {}
    for name, stored in stored_tensors(model).items():
        if found := TARGET.fullmatch(name):
            rows, columns = stored.shape
            key = f"base_model.model.{found[1]}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(CONFIG.rank, columns, generator=draw) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, CONFIG.rank, generator=draw)
    if not tensors:
        raise Lacking("the model has no layers named q_proj, v_proj and o_proj")
    return write_lora(place, "conformance", number, tensors, CONFIG).path


def using(name: str, request: GenerateRequest) -> GenerateRequest:
    """Return the request with the adapter `name`."""
    return replace(request, extra={"lora_path": name})


@check(
    "lora.serves",
    "an adapter affects only the requests that name it, also in a batch with others, until it is unloaded",
    Capability.LORA,
)
async def serves(subject: Subject) -> None:
    engine = subject.engine
    plain = await fingerprint(subject)
    again = ask(subject, "fingerprint", length=12, tokens=12)
    async with loras(subject, "one", "two") as (one, two):
        await engine.load_lora("one", str(one))
        by_one = await generate(subject, using("one", again))
        expect(not alike(by_one, plain), "the adapter changes nothing")
        await engine.load_lora("two", str(two))
        wanted = [again, using("one", again), using("two", again)]
        named = [replace(request, request_id=f"{request.request_id}-{i}") for i, request in enumerate(wanted)]
        batched = await asyncio.gather(*(generate(subject, request) for request in named))
        expect(alike(batched[0], plain), "a request without an adapter used one, in a batch with others")
        expect(alike(batched[1], by_one), "an adapter gives other tokens in a batch with others")
        expect(not alike(batched[2], by_one), "the second adapter gives the same tokens as the first")
        await engine.unload_lora("one")
        async with refused("a request for an adapter that was unloaded"):
            await generate(subject, using("one", again))
        expect(alike(await generate(subject, again), plain), "without an adapter it generates other tokens than before")
        await engine.unload_lora("two")


@check(
    "lora.prefixes",
    "prefixes computed by the base weights or one adapter are not used by another, even under the same name",
    Capability.LORA,
)
async def prefixes(subject: Subject) -> None:
    request = ask(subject, "adapter-prefixes", length=PREFIX)
    await generate(subject, request)
    async with loras(subject, "same", "other") as paths:
        for path in paths:
            await subject.engine.load_lora("same", str(path))
            made = await generate(subject, using("same", request))
            expect(made.cached_tokens == 0, f"{made.cached_tokens} cached tokens of another adapter were used")
            warm = await generate(subject, using("same", request))
            await subject.engine.unload_lora("same")
            if not warm.cached_tokens:
                raise Lacking(f"it does not cache a prefix of {PREFIX} tokens, or does not report it")


@check(
    "lora.switch",
    "a request that runs while another adapter is loaded ends with the adapter that it started with",
    Capability.LORA,
)
async def switch(subject: Subject) -> None:
    async with loras(subject, "old", "new") as (old, new):
        await subject.engine.load_lora("old", str(old))

        async def look(flight: Flight) -> bool:
            await subject.engine.load_lora("new", str(new))
            caught = not flight.task.done()
            made = await flight.task
            await subject.engine.unload_lora("new")
            require_whole(flight.request, made)
            alone = await generate(subject, replace(flight.request, request_id=f"{flight.request.request_id}-alone"))
            count = len(made.output_ids) // 2
            expect(made.output_ids[:count] == alone.output_ids[:count], "it continued with another adapter")
            return caught

        await catch(subject, "switch", look, partial(using, "old"))
        await subject.engine.unload_lora("old")


@check("lora.refused", "an adapter that does not exist, or whose name is taken, is refused", Capability.LORA)
async def refuses(subject: Subject) -> None:
    engine = subject.engine
    async with loras(subject, "taken") as (path,):
        async with refused("an adapter from a folder that does not exist"):
            await engine.load_lora("nothing", str(path.with_name("nothing")))
        async with refused("a request for an adapter that was never loaded"):
            await generate(subject, using("nothing", ask(subject, "nothing")))
        await engine.load_lora("taken", str(path))
        async with refused("an adapter under a name that is taken"):
            await engine.load_lora("taken", str(path))
        await engine.unload_lora("taken")


@check(
    "lora.taken_off",
    "a full update detaches an adapter: requests that run with it or name it use the new weights alone",
    Capability.LORA,
)
async def detached(subject: Subject) -> None:
    _, other = folders(subject)
    async with loras(subject, "off") as (path,):

        async def look(flight: Flight) -> bool:
            old, new = (await subject.engine.info()).weight_version, await next_version(subject)
            await one_way(subject)(subject, other, new)
            made = await flight.task
            require_whole(flight.request, made)
            versions = [span.version for span in made.version_spans]
            expect(
                versions in ([old], [old, new]),
                f"version {new} followed {old}, and the version spans are {made.version_spans}",
            )
            if versions == [old, new]:
                await _require_followed(subject, flight.request, made.output_ids, made.version_spans[1].start)
            await subject.engine.unload_lora("off")
            await restore(subject)
            if versions != [old, new]:
                await subject.engine.load_lora("off", str(path))
            return versions == [old, new]

        await subject.engine.load_lora("off", str(path))
        await catch(subject, "taken-off", look, partial(using, "off"))


async def _require_followed(subject: Subject, request: GenerateRequest, made: tuple[int, ...], start: int) -> None:
    """Raise CheckFailed unless a request that names the adapter uses the base weights alone.

    The tokens after the update must be those of the base weights, too, unless the engine keeps the KV cache of the
    tokens before it.
    """
    rest = replace(
        request,
        request_id=f"{request.request_id}-rest",
        input_ids=request.input_ids + made[:start],
        sampling=replace(request.sampling, max_new_tokens=min(FOLLOWED, len(made) - start)),
    )
    alone = await generate(subject, replace(rest, extra={}))
    named = await generate(subject, rest)
    expect(named.output_ids == alone.output_ids, "a request that names the adapter still uses it")
    if Capability.STAGED_UPDATE not in subject.info.capabilities:
        followed = made[start : start + len(alone.output_ids)]
        expect(followed == alone.output_ids, "it did not continue with the new weights alone")


CHECKS: Sequence[Check] = (serves, prefixes, switch, refuses, detached)
