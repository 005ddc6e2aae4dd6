"""Checks of requests with images."""

import random
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace

from millrace.conformance.check import Check, Lacking, Subject, check, expect, refused
from millrace.conformance.requests import (
    CLOSE,
    GENERATE_DEADLINE,
    Flight,
    alike,
    ask,
    catch,
    generate,
    prompt,
)
from millrace.conformance.weights import folder, folders, next_version, one_way
from millrace.model_config import image_token, read_config
from millrace.types import Capability, GenerateRequest, Generation, SamplingParams

LARGE, SMALL = 112, 56  # pixels on each side of an image
LONG = 160  # tokens between an image and the end of a prompt; caches keep complete pages of up to 128
TOKENS = 8
NEVER = -100.0  # the bias of the placeholder, so that no output contains it


@check("images.prompt", "the prompt comes back with the run of placeholders of each image", Capability.IMAGES)
async def whole_prompt(subject: Subject) -> None:
    request = _request(subject, "images", [_png("a"), _png("b", LARGE)])
    made = await generate(subject, request)
    small, large = _runs(subject, request, made)
    expect(0 < small < large, f"the smaller image has {small} tokens, the larger one {large}")
    expect(made.prompt_tokens == len(made.prompt_ids or ()), f"{made.prompt_tokens} prompt tokens were counted")
    streamed = [one async for one in subject.engine.stream(_again(request), deadline=GENERATE_DEADLINE)]
    expect(streamed[-1].prompt_ids == made.prompt_ids, f"a stream ended with the prompt {streamed[-1].prompt_ids}")
    plain = await generate(subject, ask(subject, "text"))
    expect(plain.prompt_ids is None, "a request without images has prompt_ids")


@check("images.turns", "a second turn keeps all tokens of the first, and adds an image", Capability.IMAGES)
async def turns(subject: Subject) -> None:
    first = _request(subject, "first", [_png("a")])
    made = await generate(subject, first)
    bridge = _request(subject, "second", [_png("b")])
    before = (made.prompt_ids or ()) + made.output_ids
    second = replace(bridge, input_ids=before + bridge.input_ids, images=first.images + bridge.images)
    answer = await generate(subject, second)
    ids = answer.prompt_ids or ()
    expect(ids[: len(before)] == before, "the tokens of the first turn changed")
    _runs(subject, bridge, replace(answer, prompt_ids=ids[len(before) :]))
    again = await generate(subject, _again(replace(second, input_ids=ids)))
    expect(again.prompt_ids == ids and alike(again, answer), "the prompt as the engine read it gives another answer")


@check("images.continue", "a generation with an image continues from its tokens", Capability.IMAGES)
async def continues(subject: Subject) -> None:
    request = _request(subject, "continue", [_png("a")])
    made = await generate(subject, request)
    half = TOKENS // 2
    rest = replace(
        request,
        request_id=f"{request.request_id}-rest",
        input_ids=request.input_ids + made.output_ids[:half],
        continued_tokens=half,
        sampling=replace(request.sampling, max_new_tokens=TOKENS - half),
    )
    continued = await generate(subject, rest)
    expect(continued.output_ids == made.output_ids[half:], "it continues with other tokens")
    expect(bool(abs(continued.logprobs - made.logprobs[half:]).max() < CLOSE), "it continues with other logprobs")


@check("images.across", "a generation with an image that runs during an update keeps its prompt", Capability.IMAGES)
async def across(subject: Subject) -> None:
    sent: list[GenerateRequest] = []

    def with_image(request: GenerateRequest) -> GenerateRequest:
        image = _request(subject, "across", [_png("a")], sampling=request.sampling)
        room = subject.info.context_length - len(image.input_ids) - LARGE
        tokens = min(request.sampling.max_new_tokens, room)
        sampling = replace(request.sampling, max_new_tokens=tokens, logit_bias=image.sampling.logit_bias)
        sent.append(replace(image, sampling=sampling))
        return sent[-1]

    async def look(flight: Flight) -> bool:
        await one_way(subject)(subject, folder(subject), await next_version(subject))
        made = await flight.task
        _runs(subject, sent[-1], made)
        return len(made.version_spans) > 1

    await catch(subject, "images-across", look, with_image)


@check("images.update", "after an update, the new vision tower reads an image that was read before", Capability.IMAGES)
async def update(subject: Subject) -> None:
    own, other = folders(subject)
    seen = await generate(subject, _request(subject, "update", [_png("a")]))
    await one_way(subject)(subject, other, await next_version(subject))
    again, alike_image = _request(subject, "update", [_png("a")]), _request(subject, "update", [_png("a", other=True)])
    stale, fresh = await generate(subject, again), await generate(subject, alike_image)
    await one_way(subject)(subject, own, await next_version(subject))
    difference = abs(float(stale.logprobs[0] - fresh.logprobs[0]))
    expect(
        stale.output_ids[0] == fresh.output_ids[0] and difference < CLOSE,
        f"an image that was read before the update differs by {difference:.3f} nats from one with nearly its pixels; "
        "SGLang must be started with SGLANG_VLM_CACHE_SIZE_MB=0",
    )
    expect(alike(await generate(subject, _request(subject, "update", [_png("a")])), seen), "the old weights differ now")


@check("images.cache", "equal tokens with other images share no cached prefix after the image", Capability.IMAGES)
async def cache(subject: Subject) -> None:
    asked = {name: _request(subject, "cache", [_png(name)], after=LONG) for name in ("a", "b")}
    await subject.engine.flush_cache()
    cold = {}
    for name, request in asked.items():
        await subject.engine.flush_cache()
        cold[name] = await generate(subject, request)
    difference = float(abs(cold["a"].logprobs - cold["b"].logprobs).max())
    expect(difference > CLOSE or cold["a"].output_ids != cold["b"].output_ids, "the image has no effect")
    for name in ("a", "a", "b", "b", "a"):
        made = await generate(subject, _again(asked[name]))
        expect(alike(made, cold[name]), f"with a warm cache, image {name} gives another answer")


@check("images.refuse", "images that do not fit the prompt, and damaged files, are refused", Capability.IMAGES)
async def refuses(subject: Subject) -> None:
    one = _request(subject, "refuse", [_png("a")])
    made = await generate(subject, one)
    token, ids = _tokens(subject)[0], made.prompt_ids or ()
    place = ids.index(token)
    longer = (*ids[:place], token, *ids[place:])
    wrong = {
        "an image more than placeholders": replace(one, images=one.images * 2),
        "a placeholder more than images": _request(subject, "refuse", [_png("a"), _png("b")], sent=1),
        "a prompt without placeholders": replace(one, input_ids=prompt(subject, "text", 8)),
        "a file that is no image": replace(one, images=(b"no image",)),
        "a damaged image": replace(one, images=(_png("a")[:60],)),
        "a run that is too long": replace(one, input_ids=longer),
        "a run of another image": replace(one, input_ids=ids, images=(_png("a", LARGE),)),
        "logprobs of the prompt": replace(one, prompt_logprobs=True),
    }
    for what, request in wrong.items():
        async with refused(what):
            await subject.engine.generate(_again(request), deadline=GENERATE_DEADLINE)
    expect(alike(await generate(subject, _again(one)), made), "after the refusals, it gives another answer")


def _request(
    subject: Subject,
    label: str,
    images: Sequence[bytes],
    *,
    after: int = 6,
    sent: int | None = None,
    sampling: SamplingParams | None = None,
) -> GenerateRequest:
    """Return a request with text, then each image with more text. sent: how many of the images are sent."""
    token, start, end = _tokens(subject)
    ids = prompt(subject, label, 4)
    for index in range(len(images)):
        ids += (*start, token, *end, *prompt(subject, f"{label}-{index}", after))
    request = ask(subject, label, tokens=TOKENS, sampling=sampling)
    biased = replace(request.sampling, logit_bias={token: NEVER})
    return replace(request, input_ids=ids, sampling=biased, images=tuple(images)[:sent])


def _again(request: GenerateRequest) -> GenerateRequest:
    """Return the request with an id of its own."""
    return replace(request, request_id=f"{request.request_id}-{secrets.token_hex(4)}")


def _runs(subject: Subject, request: GenerateRequest, made: Generation) -> list[int]:
    """Return the length of each image's run. Raises CheckFailed if the prompt differs from the request otherwise."""
    token, ids, place = _tokens(subject)[0], made.prompt_ids or (), 0
    runs = []
    for one in request.input_ids:
        expect(ids[place : place + 1] == (one,), f"the prompt {request.input_ids} came back as {ids}")
        begin = place
        place += 1
        while one == token == next(iter(ids[place:]), None):
            place += 1
        if one == token:
            runs.append(place - begin)
    expect(place == len(ids), f"the prompt {request.input_ids} came back as {ids}")
    return runs


def _tokens(subject: Subject) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the placeholder, and the tokens before and after it.

    Raises Lacking if the model's folder can't be read.
    """
    where = folder(subject)
    token, config = image_token(where), read_config(where)
    if token is None:
        raise Lacking(f"{where} does not say which token stands for an image")
    start, end = (config.get(f"vision_{name}_token_id") for name in ("start", "end"))
    return token, (start,) if isinstance(start, int) else (), (end,) if isinstance(end, int) else ()


def _png(label: str, width: int = SMALL, *, other: bool = False) -> bytes:
    """Return a PNG file of random pixels, which are always the same for the same label.

    other: one color of the last pixel is the next one.
    """
    draw = random.Random(label)  # noqa: S311 (no secret)
    rows = b"".join(b"\0" + draw.randbytes(3 * width) for _ in range(width))
    if other:
        rows = rows[:-1] + bytes([rows[-1] ^ 1])
    header = struct.pack(">2I5B", width, width, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


CHECKS: Sequence[Check] = (whole_prompt, turns, continues, across, update, cache, refuses)
