"""Images on a real engine, beside transformers' own forward pass. This is beyond the conformance checks and uses the
same server."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from millrace.conformance import Check, Runner, select
from millrace.engines.stock.engine import StockEngine
from millrace.errors import EngineRefused
from millrace.fleet.fleet import Fleet
from millrace.types import Float32Array, GenerateRequest, Generation, SamplingParams
from tests.conformance.run_checks import run_check
from tests.vision import make_image, make_tiny_vision_model, png

CLOSE = 2e-3  # nats, in float32
RESIZED = 5e-2  # where the engine resizes the image: torchvision's filter is not PIL's
TOKENS = 8
DEADLINE = 120.0
Pictures = Sequence[Image.Image]


def make_vision_folders(parent: Path, kind: str) -> tuple[Path, Path]:
    """Makes two models of the same shapes with other weights."""
    for seed in range(2):
        make_tiny_vision_model(parent / str(seed), kind, seed=seed)
    return parent / "0", parent / "1"


class Reference:
    """transformers' model and processors of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_token: int = self.model.config.image_token_id

    def image(self, seed: int, wide: int = 1) -> Image.Image:
        """An image that no processor resizes. wide: its width as a multiple of its height."""
        side: int = 2 * self.processor.patch_size * self.processor.merge_size
        return make_image(seed, width=wide * side, height=side)

    def request(self, images: Pictures, *, text: str = "Tom has 3 apples.") -> GenerateRequest:
        """A greedy request with the images before the text, each as one placeholder."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
        # Without a bias, this random model may sample a placeholder.
        sampling = SamplingParams(TOKENS, temperature=0.0, ignore_eos=True, logit_bias={self.image_token: -100.0})
        return GenerateRequest(ids, sampling, images=tuple(map(png, images)))

    def logprobs(self, ids: tuple[int, ...], images: Pictures, count: int) -> Float32Array:
        """The logprobs of the last `count` tokens under the requests' sampling."""
        batch = torch.tensor([ids])
        kinds = (batch == self.image_token).int()
        pixels = self.processor(list(images), return_tensors="pt")
        with torch.no_grad():
            logits = self.model(input_ids=batch, mm_token_type_ids=kinds, **pixels).logits[0].float()
        logits[:, self.image_token] -= 100.0
        logprobs = torch.log_softmax(logits, dim=-1)
        places = range(len(ids) - count, len(ids))
        return np.array([float(logprobs[place - 1, ids[place]]) for place in places], np.float32)

    def tokens_of(self, image: Image.Image) -> int:
        grid = self.processor([image], return_tensors="pt")["image_grid_thw"][0]
        return int(grid.prod() // self.processor.merge_size**2)

    def require(
        self, request: GenerateRequest, made: Generation, images: Pictures, *, within: float = CLOSE
    ) -> tuple[int, ...]:
        """Returns the prompt, whose runs must be as long as transformers makes them."""
        assert made.prompt_ids is not None
        assert len(made.output_ids) == TOKENS
        assert made.prompt_ids.count(self.image_token) == sum(map(self.tokens_of, images))
        expected = self.logprobs(made.prompt_ids + made.output_ids, images, TOKENS)
        np.testing.assert_allclose(made.logprobs, expected, atol=within)
        return made.prompt_ids


async def check_images_as_transformers_reads_them(fleet: Fleet, folder: Path) -> None:
    """One image, two, sizes that are resized, and a second turn whose tokens are those of the first."""
    reference = Reference(folder)
    square, unequal = reference.image(3), reference.image(4, 2)
    cases: list[tuple[Pictures, float]] = [
        ([square], CLOSE),
        ([unequal], CLOSE),
        ([square, unequal], CLOSE),
        ([make_image(5, width=90, height=130)], RESIZED),
    ]
    for images, within in cases:
        request = reference.request(images)
        made = await fleet.generate(request, deadline=DEADLINE)
        reference.require(request, made, images, within=within)

    first = reference.request([square])
    made = await fleet.generate(first, deadline=DEADLINE)
    assert made.prompt_ids is not None
    bridge = reference.request([unequal], text="And Tim?").input_ids
    # Tokens that the tokenizer would not make of their text.
    odd = tuple(reference.tokenizer.convert_tokens_to_ids(list("Tom")))
    assert odd != tuple(reference.tokenizer("Tom")["input_ids"])
    before = made.prompt_ids + made.output_ids + odd
    second = GenerateRequest(before + bridge, first.sampling, images=(png(square), png(unequal)))
    answer = await fleet.generate(second, deadline=DEADLINE)
    assert reference.require(second, answer, [square, unequal])[: len(before)] == before


async def check_a_publish_reaches_the_vision_tower(fleet: Fleet, folder: Path, version: int) -> None:
    """Only weights of the vision tower change. The model's own come back as the next version."""
    reference = Reference(folder)
    image = reference.image(6)
    request = reference.request([image])
    before = await fleet.generate(request, deadline=DEADLINE)
    sound = {name: parameter.detach().clone() for name, parameter in reference.model.named_parameters()}
    seen = {name for name in sound if "visual" in name}
    assert seen
    with torch.no_grad():
        for name, parameter in reference.model.named_parameters():
            if name in seen:
                parameter.mul_(0.7)
    await fleet.publish(list(reference.model.named_parameters()), version)
    after = await fleet.generate(request, deadline=DEADLINE)
    assert [span.version for span in after.version_spans] == [version]
    reference.require(request, after, [image])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(after.logprobs, before.logprobs, atol=10 * CLOSE)
    await fleet.publish(list(sound.items()), version + 1)
    again = await fleet.generate(request, deadline=DEADLINE)
    assert again.output_ids == before.output_ids
    np.testing.assert_allclose(again.logprobs, before.logprobs, atol=CLOSE)


async def check_wrong_images_are_named(fleet: Fleet, folder: Path) -> None:
    """The engine itself refuses these, or takes them as transformers would."""
    reference = Reference(folder)
    image = reference.image(7)
    request = reference.request([image])
    with pytest.raises(EngineRefused, match="HTTP 400"):
        await fleet.generate(reference.request([make_image(7, width=1000, height=1)]), deadline=DEADLINE)
    with pytest.raises(EngineRefused, match=r"images\[0\] is damaged"):
        await fleet.generate(replace(request, images=(png(image)[:60],)), deadline=DEADLINE)
    with pytest.raises(EngineRefused, match="context"):
        long = replace(request, sampling=replace(request.sampling, max_new_tokens=470))
        await fleet.generate(replace(long, images=(png(make_image(7, width=224, height=224)),)), deadline=DEADLINE)
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    with pytest.raises(EngineRefused, match="can't go through a router"):
        await engine.generate_by(engine._http, request, headers={}, deadline=DEADLINE)
    for small in (make_image(8, width=3, height=3), make_image(9, width=300, height=7)):
        made = await fleet.generate(reference.request([small]), deadline=DEADLINE)
        reference.require(reference.request([small]), made, [small], within=RESIZED)


class ReadsImages:
    """Tests of an engine that reads images, whose subclass is in a module with the fixtures `fleet`, `folders` and
    `runner`."""

    @pytest.mark.parametrize("check", select("images.*"), ids=lambda check: check.name)
    async def test_it_does_what_the_contract_says(self, runner: Runner, check: Check) -> None:
        await run_check(runner, check, frozenset())

    async def test_it_reads_images_as_transformers_does(self, fleet: Fleet, folders: tuple[Path, Path]) -> None:
        await check_images_as_transformers_reads_them(fleet, folders[0])

    async def test_a_publish_reaches_the_vision_tower(self, fleet: Fleet, folders: tuple[Path, Path]) -> None:
        await check_a_publish_reaches_the_vision_tower(fleet, folders[0], 2500)

    async def test_wrong_images_are_named(self, fleet: Fleet, folders: tuple[Path, Path]) -> None:
        await check_wrong_images_are_named(fleet, folders[0])
