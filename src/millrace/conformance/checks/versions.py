"""Checks of weight versions: generations and cached prefixes across an update."""

import asyncio
from collections.abc import Sequence

from millrace.conformance.check import Check, Subject, check, expect
from millrace.conformance.checks.caching import PREFIX, warm
from millrace.conformance.checks.streaming import AFTERMATH
from millrace.conformance.requests import Flight, ask, catch, generate, require_waiting, require_whole, until_grown
from millrace.conformance.weights import folder, load_disk, next_version, one_way, restore, update
from millrace.types import Capability, Generation, PauseMode


@check("version.across", "a generation that runs during an update has all its tokens, and spans of both versions")
async def across(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        old, new = await _update(subject)
        return _spans(flight, await flight.task, old, new)

    await catch(subject, "across", look)


@check(
    "version.across_pause",
    "a generation that is paused during an update continues with the new version",
    Capability.PAUSE_KEEP,
)
async def across_pause(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await subject.engine.pause(PauseMode.KEEP)
        old, new = await _update(subject)
        await subject.engine.resume()
        return _spans(flight, await flight.task, old, new)

    await catch(subject, "across-pause", look)


@check(
    "version.long_after",
    "a generation that an update interrupted continues to its end, however long that takes",
    Capability.PAUSE_KEEP,
)
async def long_after(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        old, new = await _update(subject)
        await until_grown(flight)
        await subject.engine.pause(PauseMode.KEEP)
        await asyncio.sleep(AFTERMATH)
        await subject.engine.resume()
        return _spans(flight, await flight.task, old, new)

    await catch(subject, "long-after", look)


async def _update(subject: Subject) -> tuple[int | None, int]:
    old, new = (await subject.engine.info()).weight_version, await next_version(subject)
    await one_way(subject)(subject, folder(subject), new)
    return old, new


def _spans(flight: Flight, made: Generation, old: int | None, new: int) -> bool:
    """Return whether the update came during the generation. Its first tokens are always of the old version."""
    require_whole(flight.request, made)
    versions = [span.version for span in made.version_spans]
    expect(
        versions in ([old], [old, new]), f"version {new} followed {old}, and the version spans are {made.version_spans}"
    )
    return versions == [old, new]


@check("version.prefixes", "cached prefixes of one version are not used by the next")
async def prefixes(subject: Subject) -> None:
    folder(subject)
    await warm(subject, "prefixes")
    await restore(subject)
    made = await generate(subject, ask(subject, "prefixes", length=PREFIX))
    expect(made.cached_tokens == 0, f"{made.cached_tokens} cached tokens of the previous version were used")


@check(
    "version.new_requests",
    "requests sent during an update are answered by a complete version",
    Capability.UPDATE_FROM_DISK,
)
async def new_requests(subject: Subject) -> None:
    source = folder(subject)
    old, new = (await subject.engine.info()).weight_version, await next_version(subject)
    async with update(subject, new):
        await load_disk(subject, source)
        task = asyncio.create_task(generate(subject, ask(subject, "during")))
        if Capability.STAGED_UPDATE in subject.info.capabilities:
            await task
        else:
            await require_waiting(task)
        await subject.engine.commit()
    maker = old if Capability.STAGED_UPDATE in subject.info.capabilities else new
    made = await task
    expect(
        [s.version for s in made.version_spans] == [maker],
        f"version {new} followed {old}, and the version spans are {made.version_spans}",
    )


CHECKS: Sequence[Check] = (across, across_pause, long_after, prefixes, new_requests)
