"""Checks of single generations."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from millrace.conformance.check import Check, Lacking, Subject, check, expect
from millrace.conformance.requests import GENERATE_DEADLINE, alike, ask, generate, require_sound
from millrace.errors import EngineRefused
from millrace.types import Capability, FinishReason, Generation, SamplingParams

FULL_LIMIT = 16_384  # tokens; filling a longer context takes too long
ATTEMPTS = 4  # to get the same greedy tokens twice; on GPUs, another batch rounds otherwise


@check("generate.count", "it returns as many tokens as requested, each with its logprob, and finish reason length")
async def count(subject: Subject) -> None:
    for tokens in (1, 2, 13):
        await generate(subject, ask(subject, "count", tokens=tokens))


@check("generate.logprobs", "logprobs are finite and not above 0")
async def logprobs(subject: Subject) -> None:
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_new_tokens=16, temperature=temperature, ignore_eos=True)
        made = await generate(subject, ask(subject, "logprobs", sampling=sampling))
        expect(bool(np.isfinite(made.logprobs).all()), f"at temperature {temperature}, some logprobs are not finite")
        expect(bool((made.logprobs <= 0).all()), f"at temperature {temperature}, some logprobs are above 0")


@check("generate.greedy", "temperature 0 gives the same tokens with the same logprobs every time")
async def greedy(subject: Subject) -> None:
    request = ask(subject, "greedy", tokens=16)
    first = await generate(subject, request)
    expect(alike(await generate(subject, request), first), "the second generation differs")


@check(
    "generate.top_k",
    "top_k 1 at temperature 1 gives the greedy tokens, with their logprobs or those of the filtered distribution",
)
async def top_k(subject: Subject) -> None:
    best = await generate(subject, ask(subject, "top_k", tokens=12))
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, top_k=1, ignore_eos=True)
    sampled = await generate(subject, ask(subject, "top_k", sampling=sampling))
    if Capability.FILTERED_LOGPROBS in subject.info.capabilities:
        expect(sampled.output_ids == best.output_ids, "the tokens differ from the greedy ones")
        expect(not sampled.logprobs.any(), "one token remains, but its probability is not 1")
        return
    expect(alike(best, sampled), "the tokens or logprobs differ from the greedy ones")


@check("generate.sampling", "temperature 1 samples different tokens each time")
async def sampling(subject: Subject) -> None:
    drawn = SamplingParams(max_new_tokens=16, temperature=1.0, ignore_eos=True)
    made = [(await generate(subject, ask(subject, "sampling", sampling=drawn))).output_ids for _ in range(4)]
    expect(len(set(made)) > 1, "four generations are the same")


@check("generate.seed", "the same seed samples the same tokens; an engine that can't do that refuses a seed")
async def seed(subject: Subject) -> None:
    drawn = SamplingParams(max_new_tokens=16, temperature=1.0, seed=7, ignore_eos=True)
    made = await _unless_refused(subject, drawn, "a seed")
    again = await generate(subject, ask(subject, "sampled", sampling=drawn))
    expect(made.output_ids == again.output_ids, "the same seed gave other tokens: it is ignored")
    other = await generate(subject, ask(subject, "sampled", sampling=replace(drawn, seed=8)))
    expect(made.output_ids != other.output_ids, "another seed gave the same tokens")


@check("generate.stop", "a stop token ends the generation and is its last token")
async def stop(subject: Subject) -> None:
    await _stops(subject, ignore_eos=False)


@check("generate.stop_ignoring_eos", "stop tokens work if the end-of-sequence token is ignored, or are refused")
async def stop_ignoring_eos(subject: Subject) -> None:
    await _stops(subject, ignore_eos=True)


async def _stops(subject: Subject, *, ignore_eos: bool) -> None:
    made = await generate(subject, ask(subject, "sampled", tokens=12))
    for _ in range(ATTEMPTS):
        token = made.output_ids[6]
        sampling = SamplingParams(max_new_tokens=12, temperature=0.0, stop_token_ids=(token,), ignore_eos=ignore_eos)
        made = await _unless_refused(subject, sampling, "stop tokens together with ignore_eos")
        if made.finish_reason is FinishReason.STOP or token in made.output_ids:
            break  # otherwise rounding has led to other tokens than before
    expect(made.finish_reason is FinishReason.STOP, f"the finish reason is {made.finish_reason}, not stop")
    # Without the token, the model ended the generation itself.
    expect(token not in made.output_ids[:-1], "it did not stop at the first stop token")


async def _unless_refused(subject: Subject, sampling: SamplingParams, what: str) -> Generation:
    request = ask(subject, "sampled", sampling=sampling)
    try:
        made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    except EngineRefused as error:
        raise Lacking(f"it refuses {what}") from error
    require_sound(request, made)
    return made


@check(
    "generate.version",
    "tokens generated outside of an update are in one version span, of the version that the engine reports",
)
async def version(subject: Subject) -> None:
    made = await generate(subject, ask(subject, "version"))
    served = (await subject.engine.info()).weight_version
    expect(
        [s.version for s in made.version_spans] == [served],
        f"the version spans are {made.version_spans}, and it serves version {served}",
    )


@check("generate.prompt_tokens", "it counts the prompt's tokens, and reports at most that many as cached")
async def prompt_tokens(subject: Subject) -> None:
    for length in (1, 2, 33):
        made = await generate(subject, ask(subject, "prompt_tokens", length=length, tokens=2))
        expect(made.prompt_tokens == length, f"it counts {made.prompt_tokens} tokens instead of {length}")
        expect(0 <= made.cached_tokens <= length, f"it reports {made.cached_tokens} of {length} tokens as cached")


@check("generate.full_context", "prompt and output may fill the context to the last token")
async def full_context(subject: Subject) -> None:
    context, room = subject.info.context_length, (await subject.engine.loads()).max_tokens
    if context > min(FULL_LIMIT, room):
        raise Lacking(f"the context of {context} tokens is too long to fill (the KV cache holds {room})")
    for tokens in (1, 8):
        await generate(subject, ask(subject, "full", length=context - tokens, tokens=tokens))


CHECKS: Sequence[Check] = (
    count,
    logprobs,
    greedy,
    top_k,
    sampling,
    seed,
    stop,
    stop_ignoring_eos,
    version,
    prompt_tokens,
    full_context,
)
