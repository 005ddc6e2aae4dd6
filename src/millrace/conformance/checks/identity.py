"""What an engine says of itself."""

import asyncio
from collections.abc import Sequence

from millrace.conformance.check import Check, Lacking, Subject, check, expect
from millrace.conformance.requests import until_idle
from millrace.conformance.weights import folder
from millrace.errors import DataError
from millrace.model_config import vocab_size
from millrace.types import Capability, Health


@check("identity.info", "it names its kind, version, model, vocabulary and context, and some way to pause")
async def info(subject: Subject) -> None:
    told = await subject.engine.info()
    expect(bool(told.kind and told.engine_version and told.model_path), f"a name is missing in {told}")
    expect(told.vocab_size > 0 and told.context_length > 1 and told.ranks > 0, f"a size is missing in {told}")
    pauses = {Capability.PAUSE_ABORT, Capability.PAUSE_RETRACT, Capability.PAUSE_KEEP}
    expect(bool(pauses & told.capabilities), "it has no mode of pausing")
    expect(await subject.engine.info() == told, "it says something else when it is asked again")


@check("identity.vocabulary", "its vocabulary is that of the model's folder")
async def vocabulary(subject: Subject) -> None:
    try:
        size = await asyncio.to_thread(vocab_size, folder(subject))
    except DataError as error:
        raise Lacking(str(error)) from error
    expect(size == subject.info.vocab_size, f"the folder says {size}, the engine {subject.info.vocab_size}")


@check("identity.health", "an engine that serves says that it is ready")
async def health(subject: Subject) -> None:
    state = await subject.engine.health()
    expect(state is Health.READY, f"it says {state}")


@check("identity.loads", "an idle engine counts no requests, and no more tokens than it has room for")
async def loads(subject: Subject) -> None:
    await until_idle(subject)
    load = await subject.engine.loads()
    expect(0 <= load.used_tokens <= load.max_tokens, f"{load.used_tokens} tokens are used of {load.max_tokens}")
    expect(load.max_tokens > 0, "it has no room for tokens")


CHECKS: Sequence[Check] = (info, vocabulary, health, loads)
