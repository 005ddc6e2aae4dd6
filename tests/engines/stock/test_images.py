"""What a request with images must be, and how the prompt that a server read is checked."""

import base64
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.images import check_images, check_prompt, data_url, without_runs
from millrace.engines.stock.state import InvalidStateError
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams

PAD = 7
LIMITS = Limits(vocab_size=100, context_length=50, seeds=True, image_token=PAD)


def file_of(kind: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    return file.getvalue()


IMAGE = file_of("PNG")
SOUND = GenerateRequest((1, PAD, 2), SamplingParams(8), images=(IMAGE,), request_id="r")


def answer(prompt_ids: tuple[int, ...] | None, finish_reason: FinishReason = FinishReason.LENGTH) -> Generation:
    return Generation("r", (), np.empty(0, np.float32), finish_reason, (), 0, 0, prompt_ids=prompt_ids)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_file_is_sent_unchanged_with_its_media_type(kind: str) -> None:
    content = file_of(kind)
    check_images(replace(SOUND, images=(content,)), LIMITS)
    start, _, rest = data_url(content).partition(",")
    assert start == f"data:image/{kind.lower()};base64"
    assert base64.b64decode(rest) == content


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (replace(SOUND, images=(b"GIF is no image",)), r"images\[0\] is no PNG, JPEG, GIF, BMP or WebP file"),
        (replace(SOUND, images=(IMAGE, b"")), r"images\[1\] is no PNG"),
        (replace(SOUND, images=(IMAGE[:-8],)), r"images\[0\] is damaged: its PNG file has no end"),
        (replace(SOUND, images=(file_of("JPEG")[:-2],)), r"images\[0\] is damaged: its JPEG file has no end"),
        (replace(SOUND, images=(IMAGE, IMAGE)), "has 1 placeholder of images .* the request has 2 images"),
        (replace(SOUND, input_ids=(1, 2)), "has 0 placeholders of images .* the request has 1 image$"),
        (replace(SOUND, input_ids=(PAD, 1, PAD, PAD)), "has 2 placeholders .* has 1 image$"),
        (replace(SOUND, prompt_logprobs=True), "prompts of text"),
    ],
)
def test_wrong_images_are_refused(request_: GenerateRequest, says: str) -> None:
    with pytest.raises(InvalidStateError, match=says):
        check_images(request_, LIMITS)


def test_a_server_of_a_text_model_takes_no_images() -> None:
    check_images(replace(SOUND, images=()), replace(LIMITS, image_token=None))
    with pytest.raises(InvalidStateError, match="takes no images"):
        check_images(SOUND, replace(LIMITS, image_token=None))


texts = st.lists(st.integers(0, 99).filter(lambda one: one != PAD), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.tuples(texts, st.integers(1, 5), st.booleans()), min_size=1, max_size=3), texts)
def test_runs_are_sent_as_one_token_and_come_back(parts: list[tuple[tuple[int, ...], int, bool]], end: object) -> None:
    """Some placeholders of the request are runs that an engine made before; the others are single."""
    given_ids: tuple[int, ...] = ()
    single: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    for text, length, expanded in parts:
        given_ids += text + (PAD,) * (length if expanded else 1)
        single += (*text, PAD)
        full += text + (PAD,) * length
    assert isinstance(end, tuple)
    request = replace(SOUND, input_ids=given_ids + end, images=(IMAGE,) * len(parts))
    check_images(request, LIMITS)
    assert without_runs(request, LIMITS).input_ids == single + end
    check_prompt(request, answer(full + end), LIMITS)
    with pytest.raises(ValueError, match="as they were sent"):
        check_prompt(request, answer((*full, *end, 1)), LIMITS)


def test_a_run_that_does_not_fit_its_image_is_refused() -> None:
    request = replace(SOUND, input_ids=(1, PAD, 2, PAD, PAD, 3), images=(IMAGE, IMAGE))
    with pytest.raises(InvalidStateError, match=r"has 2 placeholders at 3, and images\[1\] needs 3 tokens; send one"):
        check_prompt(request, answer((1, PAD, PAD, 2, PAD, PAD, PAD, 3)), LIMITS)


def test_a_prompt_that_is_too_long_with_its_runs_is_refused() -> None:
    check_prompt(SOUND, answer((1, *[PAD] * 40, 2)), LIMITS)
    with pytest.raises(InvalidStateError, match="43 prompt tokens with the images' and max_new_tokens 8 do not fit"):
        check_prompt(SOUND, answer((1, *[PAD] * 41, 2)), LIMITS)


def test_only_an_aborted_request_may_lack_its_prompt() -> None:
    check_prompt(SOUND, answer(None, FinishReason.ABORT), LIMITS)
    check_prompt(replace(SOUND, images=()), answer(None), LIMITS)
    with pytest.raises(ValueError, match="no prompt_token_ids"):
        check_prompt(SOUND, answer(None), LIMITS)
