"""LoRA adapters: who is made by which, and until when."""

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
FOLLOWED = 4  # tokens after an update that are compared: later ones may hang on the last digit of a sum


@asynccontextmanager
async def loras(subject: Subject, *names: str) -> AsyncIterator[list[Path]]:
    """As many adapters as names, in folders that the engine's host can read. Those that are loaded under the names in
    the end are unloaded."""
    if not is_here(subject.engine.url):
        raise Lacking("it is on another host, where this one can put no adapter")
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
    """Random, and strong enough to make other tokens."""
    place.chmod(0o755)  # the engine's user may be another
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
    return replace(request, extra={"lora_path": name})


@check(
    "adapter.serves",
    "an adapter makes the tokens of those requests that name it, beside others, until it is unloaded",
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
        beside = await asyncio.gather(*(generate(subject, request) for request in named))
        expect(alike(beside[0], plain), "a request without an adapter was made by one, beside others that have one")
        expect(alike(beside[1], by_one), "an adapter makes something else beside others")
        expect(not alike(beside[2], by_one), "the second adapter makes what the first makes")
        await engine.unload_lora("one")
        async with refused("a request for an adapter that was unloaded"):
            await generate(subject, using("one", again))
        expect(alike(await generate(subject, again), plain), "without an adapter it is not as it was")
        await engine.unload_lora("two")


@check(
    "adapter.prefixes",
    "no prefix that the weights, or one adapter, computed is used by another, also where it takes the other's name",
    Capability.LORA,
)
async def prefixes(subject: Subject) -> None:
    request = ask(subject, "adapter-prefixes", length=PREFIX)
    await generate(subject, request)
    async with loras(subject, "same", "other") as paths:
        for path in paths:
            await subject.engine.load_lora("same", str(path))
            made = await generate(subject, using("same", request))
            expect(made.cached_tokens == 0, f"{made.cached_tokens} tokens of another were used")
            warm = await generate(subject, using("same", request))
            await subject.engine.unload_lora("same")
            if not warm.cached_tokens:
                raise Lacking(f"it caches no prefix of {PREFIX} tokens, or does not tell")


@check(
    "adapter.switch",
    "what runs while another adapter is loaded ends with the one that it began with",
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
            expect(made.output_ids[:count] == alone.output_ids[:count], "it went on with another adapter")
            return caught

        await catch(subject, "switch", look, partial(using, "old"))
        await subject.engine.unload_lora("old")


@check("adapter.refused", "an adapter that is not there, or takes a name that is taken, is refused", Capability.LORA)
async def refuses(subject: Subject) -> None:
    engine = subject.engine
    async with loras(subject, "taken") as (path,):
        async with refused("an adapter from a folder that is not there"):
            await engine.load_lora("nothing", str(path.with_name("nothing")))
        async with refused("a request for an adapter that was never loaded"):
            await generate(subject, using("nothing", ask(subject, "nothing")))
        await engine.load_lora("taken", str(path))
        async with refused("an adapter under a name that is taken"):
            await engine.load_lora("taken", str(path))
        await engine.unload_lora("taken")


@check(
    "adapter.taken_off",
    "whole weights take an adapter off: what runs with it goes on by them alone, and so does what names it then",
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
                f"version {new} followed {old}, its version spans: {made.version_spans}",
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
    """What names the adapter is made by the weights alone, and so is what followed, unless the engine keeps what it had
    computed of the tokens before."""
    rest = replace(
        request,
        request_id=f"{request.request_id}-rest",
        input_ids=request.input_ids + made[:start],
        sampling=replace(request.sampling, max_new_tokens=min(FOLLOWED, len(made) - start)),
    )
    alone = await generate(subject, replace(rest, extra={}))
    expect((await generate(subject, rest)).output_ids == alone.output_ids, "what names the adapter is still made by it")
    if Capability.STAGED_UPDATE not in subject.info.capabilities:
        followed = made[start : start + len(alone.output_ids)]
        expect(followed == alone.output_ids, "it did not go on by the new weights alone")


CHECKS: Sequence[Check] = (serves, prefixes, switch, refuses, detached)
