"""Checks of the information that an engine reports about itself."""

import asyncio
from collections.abc import Sequence

from millrace.conformance.check import Check, Lacking, Subject, check, expect
from millrace.conformance.requests import until_idle
from millrace.conformance.weights import folder
from millrace.errors import DataError
from millrace.model_config import vocab_size
from millrace.types import Capability, Health


@check("identity.info", "it reports its kind, version, model, vocabulary, context, and at least one pause mode")
async def info(subject: Subject) -> None:
    reported = await subject.engine.info()
    expect(bool(reported.kind and reported.engine_version and reported.model_path), f"a name is missing in {reported}")
    expect(
        reported.vocab_size > 0 and reported.context_length > 1 and reported.ranks > 0,
        f"a size is missing in {reported}",
    )
    pauses = {Capability.PAUSE_ABORT, Capability.PAUSE_RETRACT, Capability.PAUSE_KEEP}
    expect(bool(pauses & reported.capabilities), "it has no pause mode")
    expect(await subject.engine.info() == reported, "a second call reports something else")


@check("identity.vocabulary", "the size of its vocabulary is that of the model's folder")
async def vocabulary(subject: Subject) -> None:
    try:
        size = await asyncio.to_thread(vocab_size, folder(subject))
    except DataError as error:
        raise Lacking(str(error)) from error
    expect(size == subject.info.vocab_size, f"the folder says {size}, the engine {subject.info.vocab_size}")


@check("identity.health", "an engine that serves reports that it is ready")
async def health(subject: Subject) -> None:
    state = await subject.engine.health()
    expect(state is Health.READY, f"it reports {state}")


@check("identity.loads", "an idle engine reports no requests, and no more used tokens than it has room for")
async def loads(subject: Subject) -> None:
    await until_idle(subject)
    load = await subject.engine.loads()
    expect(0 <= load.used_tokens <= load.max_tokens, f"{load.used_tokens} tokens are used of {load.max_tokens}")
    expect(load.max_tokens > 0, "it has no room for tokens")


CHECKS: Sequence[Check] = (info, vocabulary, health, loads)
