"""Checks of what changes the distribution that tokens are sampled from, of stop texts, and of prompts' logprobs.

The expected logprobs follow from the engine's own logprobs of a prompt: a bias of b multiplies the odds of a token by
exp(b), and a penalty is a negative bias.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log, log1p

import numpy as np

from millrace.conformance.check import Check, CheckFailed, Lacking, Subject, check, expect, refused
from millrace.conformance.requests import CLOSE, GENERATE_DEADLINE, alike, ask, generate, prompt, require_sound
from millrace.types import Capability, FinishReason, Float32Array, GenerateRequest, Generation, SamplingParams

LIKELY = 0.7  # the least probability to which a bias raises a token
MOST_BIAS = 100.0
GREEDY = SamplingParams(6, temperature=0.0, ignore_eos=True)
NEVER = "\u2042 never \u2042"  # a stop text that does not come
BROKEN = "\ufffd"  # part of a character
LABELS = 5  # prompts to try, until the text of an output has a suitable part


@check("sampling.logit_bias", "a bias of b multiplies the odds of a token by exp(b)")
async def logit_bias(subject: Subject) -> None:
    await _forced(subject, "logit_bias", replace(GREEDY, max_new_tokens=1), lambda _times: 0.0)


@check(
    "sampling.frequency_penalty",
    "a frequency penalty lowers the logit of a token by as much for each of its occurrences in the output",
    Capability.PENALTIES,
)
async def frequency_penalty(subject: Subject) -> None:
    await _forced(subject, "frequency", replace(GREEDY, frequency_penalty=0.5), lambda times: 0.5 * times)


@check(
    "sampling.presence_penalty",
    "a presence penalty lowers the logit of a token once if it has occurred in the output",
    Capability.PENALTIES,
)
async def presence_penalty(subject: Subject) -> None:
    await _forced(subject, "presence", replace(GREEDY, presence_penalty=1.5), lambda times: 1.5 if times else 0.0)


async def _forced(subject: Subject, label: str, sampling: SamplingParams, penalty: Callable[[int], float]) -> None:
    """Force the same token again and again by a bias, and check its logprobs.

    penalty: of the token, by how often it has come.
    """
    count = sampling.max_new_tokens
    token, *start = prompt(subject, label, 9)
    ids = (*start, *[token] * count)
    scored = await _scored(subject, ids)
    logits = [_logit(exp(float(logprob))) - penalty(times) for times, logprob in enumerate(scored[-count:])]
    bias = _logit(LIKELY) - min(logits)
    if bias > MOST_BIAS:
        raise Lacking(f"the token is so unlikely that it would need a bias of {bias:.0f}")
    request = ask(subject, label, sampling=replace(sampling, logit_bias={token: bias}))
    made = await generate(subject, replace(request, input_ids=tuple(start)))
    expect(made.output_ids == (token,) * count, f"the tokens are {made.output_ids}, the bias asks for {token} only")
    expected = [-log1p(exp(-(logit + bias))) for logit in logits]
    off = abs(made.logprobs - np.array(expected)).max()
    expect(off < CLOSE, f"the logprobs are {made.logprobs.tolist()}, and should be {expected}")


def _logit(probability: float) -> float:
    return log(probability) - log1p(-probability)


@check("sampling.repetition_penalty", "a repetition penalty changes the distribution", Capability.PENALTIES)
async def repetition_penalty(subject: Subject) -> None:
    for number in range(LABELS):
        label = f"repetition-{number}"
        request = ask(subject, label, sampling=GREEDY)
        likely = await generate(subject, ask(subject, label, tokens=1))
        plain = replace(request, input_ids=(*likely.output_ids, *request.input_ids[1:]))
        penalized = replace(
            ask(subject, label, sampling=replace(GREEDY, repetition_penalty=2.0)), input_ids=plain.input_ids
        )
        if not alike(await generate(subject, plain), await generate(subject, penalized)):
            return
    raise CheckFailed("the tokens and logprobs are those without it")


@check("sampling.penalties_refused", "penalties that the engine does not apply as defined are refused")
async def penalties_refused(subject: Subject) -> None:
    if Capability.PENALTIES in subject.info.capabilities:
        return
    for name, sampling in (
        ("repetition_penalty", replace(GREEDY, repetition_penalty=1.1)),
        ("frequency_penalty", replace(GREEDY, frequency_penalty=0.1)),
        ("presence_penalty", replace(GREEDY, presence_penalty=0.1)),
    ):
        async with refused(f"a request with {name}"):
            await subject.engine.generate(ask(subject, name, sampling=sampling), deadline=GENERATE_DEADLINE)


@check("sampling.min_new_tokens", "no stop token is sampled before the least number of tokens")
async def min_new_tokens(subject: Subject) -> None:
    free = await generate(subject, ask(subject, "least", tokens=1))
    [token] = free.output_ids
    sampling = SamplingParams(12, temperature=0.0, stop_token_ids=(token,))
    stopped = await _sound(subject, ask(subject, "least", sampling=sampling))
    expect(stopped.output_ids == (token,), f"the stop token did not end {stopped.output_ids}")
    made = await _sound(subject, ask(subject, "least", sampling=replace(sampling, min_new_tokens=4)))
    expect(len(made.output_ids) >= 4, f"only {len(made.output_ids)} tokens were returned, at least 4 were requested")
    expect(token not in made.output_ids[:4], f"the stop token is one of the first 4 of {made.output_ids}")


@check(
    "sampling.stop",
    "a stop text ends the output at the token that completes it, and the text before it; without one there is no text",
    Capability.STOP_TEXTS,
)
async def stop(subject: Subject) -> None:
    expect((await generate(subject, ask(subject, "textless"))).text is None, "there is a text without a stop text")
    for number in range(LABELS):
        label = f"stop-{number}"
        free = await _sound(subject, _stopped(subject, label, NEVER))
        text = _text(free)
        place = max((p for p in range(1, len(text) - 1) if _new(text, p)), default=None)
        if place is None:
            continue
        found = text[place : place + 2]
        made = await _sound(subject, _stopped(subject, label, NEVER, found))
        expect(made.finish_reason is FinishReason.STOP, f"the finish reason is {made.finish_reason}, not stop")
        expect(made.text == text[:place], f"the text is {made.text!r}, and should end before {found!r} in {text!r}")
        count = len(made.output_ids)
        expect(made.output_ids == free.output_ids[:count] != (), "the tokens differ from those without the stop text")
        if count > 1:
            shorter = await _sound(subject, _stopped(subject, label, NEVER, tokens=count - 1))
            expect(found not in _text(shorter), "it stopped after the token that completes the stop text")
        return
    raise Lacking("no output has a text in which a stop text could be found")


@check(
    "sampling.stop_continued",
    "a stop text is found that began in tokens which the request continues",
    Capability.STOP_TEXTS,
)
async def stop_continued(subject: Subject) -> None:
    for number in range(LABELS):
        label = f"continued-{number}"
        free = await _sound(subject, _stopped(subject, label, NEVER))
        text = _text(free)
        for count in range(1, len(free.output_ids)):
            begun = _text(await _sound(subject, _stopped(subject, label, NEVER, tokens=count)))
            place = len(begun) - 1
            if place < 0 or not text.startswith(begun) or not _new(text, place):
                continue
            request = _stopped(subject, label, text[place : place + 2])
            ids = request.input_ids + free.output_ids[:count]
            made = await _sound(subject, replace(request, input_ids=ids, continued_tokens=count))
            expect(made.finish_reason is FinishReason.STOP, f"the finish reason is {made.finish_reason}, not stop")
            expect(made.text == text[:place], f"the text is {made.text!r}, and should be {text[:place]!r}")
            return
    raise Lacking("no output has a text in which a stop text could be cut")


@check(
    "sampling.json_schema",
    "the output matches the request's JSON schema, and ends by itself",
    Capability.JSON_SCHEMA,
    Capability.STOP_TEXTS,
)
async def json_schema(subject: Subject) -> None:
    for number, choices in enumerate((["red", "green"], ["one", "two"], ["red", "green"])):
        schema = json.dumps({"enum": choices})
        sampling = SamplingParams(64, temperature=1.0, stop=(NEVER,), json_schema=schema)
        made = await _sound(subject, ask(subject, f"schema-{number}", sampling=sampling))
        expect(made.finish_reason is FinishReason.STOP, f"the finish reason is {made.finish_reason}, not stop")
        text = _text(made).strip()
        expect(text in [f'"{choice}"' for choice in choices], f"{text!r} is none of {choices} as JSON")


@check("sampling.schema_refused", "a request with a JSON schema is refused by an engine that can't follow one")
async def schema_refused(subject: Subject) -> None:
    if Capability.JSON_SCHEMA in subject.info.capabilities:
        return
    sampling = replace(GREEDY, json_schema='{"enum": ["red"]}')
    async with refused("a request with a JSON schema"):
        await subject.engine.generate(ask(subject, "schema", sampling=sampling), deadline=GENERATE_DEADLINE)


def _stopped(subject: Subject, label: str, *stops: str, tokens: int = 10) -> GenerateRequest:
    return ask(subject, label, sampling=SamplingParams(tokens, temperature=0.0, ignore_eos=True, stop=stops))


def _text(made: Generation) -> str:
    if made.text is None:
        raise CheckFailed("a request with stop texts was answered without a text")
    return made.text


def _new(text: str, place: int) -> bool:
    """Return whether the two letters at `place` are whole and do not occur before."""
    letters = text[place : place + 2]
    return len(letters) == 2 and BROKEN not in letters and text.find(letters) == place


@check(
    "sampling.prompt_logprobs", "a prompt's logprobs are those that its tokens had as output, whatever is sampled after"
)
async def prompt_logprobs(subject: Subject) -> None:
    request = ask(subject, "scored", tokens=8)
    made = await generate(subject, request)
    expect(made.prompt_logprobs is None, "the prompt has logprobs that were not requested")
    ids = request.input_ids + made.output_ids
    for sampling in (
        SamplingParams(1, temperature=0.0, ignore_eos=True),
        SamplingParams(1, temperature=0.5, ignore_eos=True, logit_bias={ids[0]: 50.0}),  # with a cached prefix
    ):
        scored = await _scored(subject, ids, sampling)
        expect(bool(np.isnan(scored[0])), "the first token of the prompt has a logprob")
        off = abs(scored[-8:] - made.logprobs).max()
        expect(off < CLOSE, f"the logprobs are {scored[-8:].tolist()}, as output they were {made.logprobs.tolist()}")


async def _scored(subject: Subject, ids: tuple[int, ...], sampling: SamplingParams | None = None) -> Float32Array:
    """Return the prompt logprobs of these tokens, [T]."""
    request = ask(subject, "scored", sampling=sampling or SamplingParams(1, temperature=0.0, ignore_eos=True))
    made = await generate(subject, replace(request, input_ids=ids, prompt_logprobs=True))
    if made.prompt_logprobs is None:
        raise CheckFailed("the prompt's logprobs were requested, and did not come")
    count = len(made.prompt_logprobs)
    expect(count == len(ids), f"{len(ids)} tokens of the prompt came with {count} logprobs")
    return made.prompt_logprobs


async def _sound(subject: Subject, request: GenerateRequest) -> Generation:
    made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    require_sound(request, made)
    return made


CHECKS: Sequence[Check] = (
    prompt_logprobs,
    logit_bias,
    frequency_penalty,
    presence_penalty,
    repetition_penalty,
    penalties_refused,
    min_new_tokens,
    stop,
    stop_continued,
    json_schema,
    schema_refused,
)
