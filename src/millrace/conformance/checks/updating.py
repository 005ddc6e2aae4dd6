"""Checks of weight updates, which are transactions."""

from collections.abc import Sequence
from functools import partial

from millrace.checksum import sampled_checksums
from millrace.conformance.check import Check, CheckFailed, Lacking, Subject, check, expect, refused
from millrace.conformance.requests import GENERATE_DEADLINE, alike, ask, fingerprint, generate
from millrace.conformance.weights import (
    Way,
    by_bare_nccl,
    by_disk,
    by_group,
    by_memory,
    by_whole_broadcasts,
    folder,
    folders,
    load_disk,
    load_memory,
    memory_kinds,
    next_version,
    one_way,
    read_tensors,
    restore,
    send,
    update,
    ways,
)
from millrace.errors import EngineError, EngineRefused, PublishError
from millrace.model_folder import stored_tensors
from millrace.types import Capability
from millrace.weights.folder import folder_checksums

DISK = Capability.UPDATE_FROM_DISK


@check("update.commit", "the version changes at the commit and not before", DISK)
async def commit(subject: Subject) -> None:
    source, version = folder(subject), await next_version(subject)
    before = (await subject.engine.info()).weight_version
    async with update(subject, version):
        expect((await subject.engine.info()).weight_version == before, "the version changed with begin")
        await load_disk(subject, source)
        expect((await subject.engine.info()).weight_version == before, "the version changed with the load")
        await subject.engine.commit()
    served = (await subject.engine.info()).weight_version
    expect(served == version, f"version {version} was committed, and the engine reports {served}")
    made = await generate(subject, ask(subject, "commit"))
    expect([s.version for s in made.version_spans] == [version], f"the version spans are {made.version_spans}")


def _way(name: str, capability: Capability, way: Way) -> Check:
    async def examine(subject: Subject) -> None:
        source, other = folders(subject)
        before = await fingerprint(subject)
        await way(subject, other, await next_version(subject))
        expect(not alike(await fingerprint(subject), before), "it generates the same tokens with other weights")
        await way(subject, source, await next_version(subject))
        expect(alike(await fingerprint(subject), before), "it generates other tokens with the first weights restored")

    claim = f"other weights are loaded through {name}, and the first weights are restored"
    return Check(f"update.{name.lower().replace(' ', '_')}", claim, frozenset({capability}), examine)


def _memory(name: str, kind: Capability) -> Check:
    return _way(name, kind, partial(by_memory, kind))


WAYS = (
    _way("disk", DISK, by_disk),
    _memory("shared memory", Capability.UPDATE_FROM_SHARED_MEMORY),
    _memory("torch storage", Capability.UPDATE_FROM_TORCH_STORAGE),
    _memory("CUDA IPC", Capability.UPDATE_FROM_CUDA_IPC),
    _way("process group", Capability.UPDATE_FROM_PROCESS_GROUP, by_group),
    _way("whole broadcasts", Capability.WHOLE_BROADCASTS, by_whole_broadcasts),
    _way("bare NCCL", Capability.UPDATE_FROM_BARE_NCCL, by_bare_nccl),
)


@check("update.ways_agree", "the same weights give the same tokens, by whichever way they are loaded")
async def ways_agree(subject: Subject) -> None:
    _, other = folders(subject)
    supported = ways(subject)
    if len(supported) < 2:
        raise Lacking(f"it needs two ways to load weights, and the engine supports: {', '.join(supported) or 'none'}")
    made = {}
    for name, way in supported.items():
        await way(subject, other, await next_version(subject))
        made[name] = await fingerprint(subject)
    first = next(iter(made))
    for name, generation in made.items():
        expect(alike(generation, made[first]), f"{name} loaded other weights than {first}")
    await restore(subject)


@check(
    "update.own_checksums",
    "its checksums differ for different weights, and are equal for equal weights",
    Capability.OWN_CHECKSUMS,
)
async def own_checksums(subject: Subject) -> None:
    _, other = folders(subject)
    before = await subject.engine.checksums()
    expect(bool(before), "there are no checksums")
    held = []
    for way in ways(subject).values():
        await way(subject, other, await next_version(subject))
        held.append(await subject.engine.checksums())
    await restore(subject)
    expect(all(one == held[0] for one in held), "the same weights by two ways have different checksums")
    expect(held[0] != before, "other weights have the same checksums")
    expect(await subject.engine.checksums() == before, "the checksums differ with the first weights restored")


@check("update.checksums", "its checksums are those of the tensors in the folder", Capability.CHECKSUMS)
async def checksums(subject: Subject) -> None:
    source, other = folders(subject)
    for loaded in (other, source):
        await one_way(subject)(subject, loaded, await next_version(subject))
        held, sent = await subject.engine.checksums(), folder_checksums(loaded)
        if missing := sorted(sent.keys() - held.keys()):
            raise CheckFailed(f"the checksum of {missing[0]} is missing")
        if wrong := sorted(name for name, value in sent.items() if held[name] != value):
            raise CheckFailed(f"{len(wrong)} of {len(sent)} checksums are wrong, such as that of {wrong[0]}")


@check(
    "update.sampled_checksums",
    "before the commit, its sampled checksums are those of the received tensors",
    Capability.SAMPLED_CHECKSUMS,
)
async def sampled_sums(subject: Subject) -> None:
    source, other = folders(subject)
    async with refused("sampled checksums without an update"):
        await subject.engine.sampled_checksums()
    for loaded in (other, source):
        tensors = await read_tensors(loaded)
        async with update(subject, await next_version(subject)):
            await load_memory(subject, tensors)
            held = await subject.engine.sampled_checksums()
            await subject.engine.commit()
        sent = dict(zip(tensors, sampled_checksums(list(tensors.values())), strict=True))
        expect(held == sent, "the sampled checksums differ")


@check("update.order", "load and commit without begin are refused, and so is a second begin", DISK)
async def order(subject: Subject) -> None:
    source, version = folder(subject), await next_version(subject)
    async with refused("load without begin"):
        await load_disk(subject, source)
    async with refused("commit without begin"):
        await subject.engine.commit()
    async with update(subject, version):
        async with refused("a second begin"):
            await subject.engine.begin_update(version + 1)
        await load_disk(subject, source)
        await subject.engine.commit()
    async with refused("a second commit"):
        await subject.engine.commit()
    served = (await subject.engine.info()).weight_version
    expect(served == version, f"version {version} was committed, and the engine reports {served}")


@check("update.told_before", "tensors that do not fit the model are refused before an update begins")
async def told_before(subject: Subject) -> None:
    if Capability.ROLLBACK in subject.info.capabilities:
        raise Lacking("the engine can roll back, and need not check the tensors in advance")
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder(subject)).items()}
    await subject.engine.check_tensors(shapes)
    name = next(iter(shapes))
    async with refused("a missing tensor"):
        await subject.engine.check_tensors({other: shape for other, shape in shapes.items() if other != name})
    async with refused("a tensor that the model does not have"):
        await subject.engine.check_tensors({**shapes, "model.of.another": (1,)})
    async with refused("a tensor of another shape"):
        await subject.engine.check_tensors({**shapes, name: (*shapes[name], 2)})


@check("update.empty", "an update without a load can be rolled back and changes nothing; it can't be committed")
async def empty(subject: Subject) -> None:
    before, version = await fingerprint(subject), await next_version(subject)
    served = (await subject.engine.info()).weight_version
    await subject.engine.begin_update(version)
    async with refused("the commit of an update without a load"):
        await subject.engine.commit()
    await subject.engine.rollback()
    await subject.engine.rollback()
    expect((await subject.engine.info()).weight_version == served, "the version changed")
    expect(alike(await fingerprint(subject), before), "it generates other tokens")


@check("update.rollback", "a rollback after a load restores the served weights", Capability.ROLLBACK, DISK)
async def rollback(subject: Subject) -> None:
    _, other = folders(subject)
    before, served = await fingerprint(subject), (await subject.engine.info()).weight_version
    await subject.engine.begin_update(await next_version(subject))
    await load_disk(subject, other)
    await subject.engine.rollback()
    expect((await subject.engine.info()).weight_version == served, "the version changed")
    expect(alike(await fingerprint(subject), before), "it generates other tokens")


@check(
    "update.torn",
    "after a load that can't be undone, it refuses to generate until a complete version is committed",
    DISK,
)
async def torn(subject: Subject) -> None:
    if Capability.ROLLBACK in subject.info.capabilities:
        raise Lacking("every load can be undone")
    _, other = folders(subject)
    before, served = await fingerprint(subject), (await subject.engine.info()).weight_version
    await subject.engine.begin_update(await next_version(subject))
    await load_disk(subject, other)
    async with refused("a rollback of overwritten weights"):
        await subject.engine.rollback()
    expect((await subject.engine.info()).weight_version == served, "the version changed")
    async with refused("a generation with incomplete weights"):
        await subject.engine.generate(ask(subject, "torn"), deadline=GENERATE_DEADLINE)
    await restore(subject)
    expect(alike(await fingerprint(subject), before), "it generates other tokens with the first weights restored")


@check("update.part", "a version is refused if a tensor is missing, or has another name or shape")
async def part(subject: Subject) -> None:
    """Omit a tensor that engines fuse with others. An engine that accepts the version silently generates nonsense."""
    source, before = folder(subject), await fingerprint(subject)
    if not (kinds := memory_kinds(subject)):
        raise Lacking("the engine does not load tensors from memory")
    whole = await read_tensors(source)
    name = next((name for name in whole if "q_proj.weight" in name), next(iter(whole)))
    others = {other: tensor for other, tensor in whole.items() if other != name}
    for what, tensors in (
        (f"a version without {name}", others),
        (f"a version with {name}.other instead of {name}", {**others, f"{name}.other": whole[name]}),
        (f"a version with {name} in another shape", {**whole, name: whole[name].reshape(1, -1)}),
    ):
        try:
            await send(kinds[0], subject, tensors, await next_version(subject))
        except PublishError:
            continue
        raise CheckFailed(f"{what} was accepted")
    await restore(subject)
    expect(alike(await fingerprint(subject), before), "it generates other tokens with the first weights restored")


@check("update.failed_load", "a failed load raises an error, and a complete version can be loaded afterwards", DISK)
async def failed_load(subject: Subject) -> None:
    source, served = folder(subject), (await subject.engine.info()).weight_version
    before = await fingerprint(subject)
    await subject.engine.begin_update(await next_version(subject))
    try:
        await load_disk(subject, source / "no-such-folder")
    except EngineError:
        pass
    else:
        raise CheckFailed("it loaded a folder that does not exist")
    try:
        await subject.engine.rollback()
    except EngineRefused:
        expect(Capability.ROLLBACK not in subject.info.capabilities, "it refused a rollback, which it supports")
    expect((await subject.engine.info()).weight_version == served, "the version changed")
    await restore(subject)
    expect(alike(await fingerprint(subject), before), "it generates other tokens")


CHECKS: Sequence[Check] = (
    commit,
    *WAYS,
    ways_agree,
    own_checksums,
    checksums,
    sampled_sums,
    order,
    told_before,
    empty,
    rollback,
    torn,
    part,
    failed_load,
)
