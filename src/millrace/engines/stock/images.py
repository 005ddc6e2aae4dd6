"""Requests with images: what is checked before they are sent, and what is read from the answers. Pure.

A server replaces one placeholder token by a run of them, as long as the image needs. SGLang does not answer a request
whose prompt has such a run already, and vLLM misreads it. So each run is sent as one token. The server makes the run
again, because its length depends only on the image. The servers return the prompt as they read it, and it must be the
request's.
"""

import base64
import re
from dataclasses import replace

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import InvalidStateError, require
from millrace.placeholders import collapsed, runs
from millrace.types import FinishReason, GenerateRequest, Generation

# How a file of each media type begins, and what its end has.
FORMATS = {
    "png": (rb"\x89PNG\r\n\x1a\n", b"IEND"),
    "jpeg": (rb"\xff\xd8\xff", b"\xff\xd9"),
    "gif": (rb"GIF8", b""),
    "bmp": (rb"BM", b""),
    "webp": (rb"RIFF....WEBP", b""),
}


def check_images(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for images that the server can't take, or that do not fit the placeholders."""
    if not request.images:
        return
    token = limits.image_token
    if token is None:
        raise InvalidStateError("the server takes no images: its model has no vision tower, or it reads text only")
    for index, image in enumerate(request.images):
        kind = _kind(image)
        if kind is None:
            raise InvalidStateError(f"images[{index}] is no PNG, JPEG, GIF, BMP or WebP file")
        require(FORMATS[kind][1] in image, f"images[{index}] is damaged: its {kind.upper()} file has no end")
    places, images = len(runs(request.input_ids, token)), len(request.images)
    require(
        places == images,
        f"input_ids has {places} {_plural('placeholder', places)} of images (token {token}, alone or in a run), and "
        f"the request has {images} {_plural('image', images)}",
    )
    require(not request.prompt_logprobs, "prompt_logprobs are for prompts of text")


def without_runs(request: GenerateRequest, limits: Limits) -> GenerateRequest:
    """Return the request with one placeholder for each image."""
    if not request.images or limits.image_token is None:
        return request
    return replace(request, input_ids=collapsed(request.input_ids, limits.image_token))


def data_url(image: bytes) -> str:
    """Return the content of an image file as a URL that holds it."""
    return f"data:image/{_kind(image)};base64,{base64.b64encode(image).decode()}"


def check_prompt(request: GenerateRequest, made: Generation, limits: Limits) -> None:
    """Check the prompt as the server read it: it must differ from the request's only by the runs that it made.

    Raises InvalidStateError for a run of the request that does not fit its image, and for a prompt that is too long
    with its runs. Raises ValueError if the server read something else.
    """
    token, prompt = limits.image_token, made.prompt_ids
    if not request.images or token is None:
        return
    if prompt is None:
        if made.finish_reason is not FinishReason.ABORT:
            raise ValueError("the answer has no prompt_token_ids, which show how the server read the images")
        return
    if collapsed(prompt, token) != collapsed(request.input_ids, token):
        raise ValueError("the server did not read the prompt's tokens as they were sent")
    pairs = zip(runs(request.input_ids, token), runs(prompt, token), strict=True)
    for index, ((start, given), (_, needed)) in enumerate(pairs):
        require(
            given in (1, needed),
            f"input_ids has {given} placeholders at {start}, and images[{index}] needs {needed} tokens; send one "
            "placeholder, or the prompt_ids of an earlier generation with the same image",
        )
    room = request.sampling.max_new_tokens
    require(
        len(prompt) + room <= limits.context_length,
        f"{len(prompt)} prompt tokens with the images' and max_new_tokens {room} do not fit into the server's context "
        f"of {limits.context_length}",
    )


def _kind(image: bytes) -> str | None:
    return next((kind for kind, (start, _) in FORMATS.items() if re.match(start, image, re.DOTALL)), None)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
