"""Images through the gateway, on a real engine, over two turns and in each protocol.

transformers computes the logprobs of the sample's tokens with the sample's images. They are the engine's only if the
sample has the tokens and the images that the engine read.
"""

import base64
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
import torch

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.stock.images import data_url
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.gateway import EpisodeRules, load_format, serve_gateway
from millrace.gateway.format import TemplateFormat
from millrace.train.tiny_vision import VISION_TOKENS
from millrace.types import SamplingParams
from tests.conformance.images import CLOSE, Reference
from tests.conformance.run_checks import START_TIMEOUT
from tests.gateway.replay import replayed_anthropic, replayed_chat, replayed_responses
from tests.gateway.scripted import ScriptedFleet
from tests.torchvision import install_torchvision
from tests.vision import make_tiny_vision_model, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = 12
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "start_timeout": START_TIMEOUT}
Message = Mapping[str, Any]


def chat(image: bytes, text: str) -> Message:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def responses(image: bytes, text: str) -> Message:
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": text}]
    return {"role": "user", "content": parts}


def messages(image: bytes, text: str) -> Message:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
    return {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": text}]}


# The route, the name of the conversation in a body, and how a question is written and an answer is sent back.
PROTOCOLS = {
    "chat/completions": ("messages", chat, replayed_chat),
    "responses": ("input", responses, replayed_responses),
    "messages": ("messages", messages, replayed_anthropic),
}


@pytest.fixture(scope="module", params=["sglang", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> str:
    """The engine's kind."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make_tiny_vision_model(folder, "qwen3_vl" if engine == "sglang" else "qwen2_5_vl")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    engine: str, model: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    config: SGLangEngineConfig | VLLMEngineConfig
    with pytest.MonkeyPatch.context() as patch:
        if engine == "sglang":
            python = request.getfixturevalue("sglang_python")("0.5.23")
            config = SGLangEngineConfig(kind="sglang", version="0.5.23", python=python, **ON_CPU)
        else:
            python = request.getfixturevalue("vllm_python")
            config = VLLMEngineConfig(kind="vllm", python=python, **ON_CPU)
            # The lock file of vLLM for the CPU has no torchvision, which the processors of images need.
            patch.setenv("PYTHONPATH", str(install_torchvision(python, tmp_path_factory.mktemp("torchvision"))))
        async with open_fleet(config, model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
            yield fleet


def load_template(folder: Path) -> TemplateFormat:
    turns = load_format(str(folder))
    assert isinstance(turns, TemplateFormat)
    return turns


@pytest.mark.parametrize("path", PROTOCOLS)
async def test_a_conversation_with_images(fleet: Fleet, model: Path, path: str) -> None:
    reference, turns = Reference(model), load_template(model)
    pictures = [reference.image(1), reference.image(2, 2)]
    field, question, turn = PROTOCOLS[path]
    said: list[Message] = []
    # Random weights also write the tokens of images, which no model does.
    never = dict.fromkeys(turns.chat.tokenizer.convert_tokens_to_ids(VISION_TOKENS), -100.0)
    rules = EpisodeRules(SamplingParams(TOKENS, temperature=1.0, logit_bias=never), max_turn_tokens=TOKENS)
    async with (
        serve_gateway(fleet, turns, key="key") as gateway,
        gateway.episode({}, rules) as episode,
        aiohttp.ClientSession() as http,
    ):
        for picture, text in zip(pictures, ("What is it?", "And now?"), strict=True):
            said.append(question(png(picture), text))
            body = {"model": "any", field: said, "max_tokens" if path != "responses" else "max_output_tokens": TOKENS}
            async with http.post(f"{episode.base_url}/v1/{path}", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
            said += turn(answer)
    [sample] = episode.samples()
    assert sample.reasons == {}
    played = sample.episode
    assert played.images == tuple(map(png, pictures))
    assert played.turns == 2
    assert played.token_ids.count(reference.image_token) == sum(map(reference.tokens_of, pictures))
    batch = torch.tensor([played.token_ids])
    kinds = (batch == reference.image_token).int()
    pixels = reference.processor(pictures, return_tensors="pt")
    with torch.no_grad():
        logits = reference.model(input_ids=batch, mm_token_type_ids=kinds, **pixels).logits[0].float()
    logits[:, list(never)] -= 100.0
    places = np.flatnonzero(played.loss_mask)
    logprobs = torch.log_softmax(logits, -1)[places - 1, batch[0, places]]
    np.testing.assert_allclose(played.logprobs[places], logprobs.numpy(), atol=CLOSE)


async def test_a_placeholder_that_the_model_writes_is_refused(tmp_path: Path) -> None:
    """The engine would look for an image in the next turn. The sample fails, unless the agent asks again."""
    make_tiny_vision_model(tmp_path / "model", "qwen3_vl")
    turns = load_template(tmp_path / "model")
    written = iter(["I see <|image_pad|>.", "I see it."])
    engines = ScriptedFleet(turns.chat.tokenizer, turns.stop_token_ids[0], lambda _: next(written))
    async with (
        serve_gateway(engines, turns, key="key") as gateway,  # type: ignore[arg-type]
        gateway.episode() as episode,
        aiohttp.ClientSession() as http,
    ):
        for status, failures in ((400, 1), (200, 0)):
            body = {"model": "any", "messages": [{"role": "user", "content": "What is it?"}]}
            async with http.post(f"{episode.base_url}/v1/chat/completions", json=body) as response:
                answer = await response.text()
            assert (response.status, len(episode.episode.failures)) == (status, failures)
            assert ("generated a placeholder of images" in answer) == (status == 400)
        assert len(episode.samples()) == 1
