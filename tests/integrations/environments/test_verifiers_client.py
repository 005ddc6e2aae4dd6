"""verifiers' own training client, unchanged, on a fleet behind the token routes."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import verifiers.v1 as vf
from renderers import Qwen3RendererConfig, RendererConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.serve.token_routes import serve_tokens
from millrace.types import GenerateRequest, SamplingParams
from tests.fleet.test_fleet import CONFIG

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = "the server's key"
END = 60.0
KEEPING = Qwen3RendererConfig(enable_thinking=False, thinking_retention="all")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with the tokens that Qwen3's renderer writes."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([f"<{end}{name}>" for name in ("think", "tool_call", "tool_response") for end in ("", "/")])
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy.resize_token_embeddings(len(tokenizer))
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = CONFIG.model_copy(update={"start_timeout": 300.0})
    async with open_fleet(config, model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


async def played(
    fleet: Fleet,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    renderer: RendererConfig | None = None,
    **sampling: Any,
) -> Any:
    """Return verifiers' record of an episode of three turns."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("MILLRACE_TEST_KEY", KEY)
    environment = vf.load_environment(
        vf.resolve_env_config({"taskset": {"id": "word-games"}, "agent": {"runtime": {"type": "subprocess"}}})
    )
    async with serve_tokens(fleet, key=KEY, model="policy") as url:
        client = vf.TrainClientConfig(
            base_url=f"{url}/v1",
            api_key_var="MILLRACE_TEST_KEY",
            renderer=renderer,
            renderer_model_name=str(model),
        )
        context = vf.ModelContext(model="policy", client=client, sampling=vf.SamplingConfig(**sampling))
        async with environment.serving():
            episode = await environment.run_episode(next(iter(environment.taskset)), context)
    return episode


@pytest.mark.parametrize("renderer", [None, KEEPING])  # which keeps what was sampled in later prompts
async def test_a_rollout_has_the_tokens_and_logprobs_of_the_fleet(
    fleet: Fleet, model: Path, monkeypatch: pytest.MonkeyPatch, renderer: RendererConfig | None
) -> None:
    episode = await played(fleet, model, monkeypatch, renderer, max_tokens=8, temperature=0.0)
    assert episode.ok, episode.errors
    [trace] = episode.traces
    turns = 0
    if renderer is not None:
        [_] = trace.branches
    for branch in trace.branches:
        tokens: list[int] = []
        for node in branch.nodes:
            if any(node.mask):
                turns += 1
                start = node.mask.index(True)
                prompt, sampled = tokens + node.token_ids[:start], node.token_ids[start:]
                assert all(node.mask[start:])
                made = await fleet.generate(
                    GenerateRequest(tuple(prompt), SamplingParams(8, temperature=0.0)), deadline=END
                )
                assert made.output_ids == tuple(sampled)
                np.testing.assert_allclose(node.logprobs, made.logprobs, atol=1e-5)
            tokens += node.token_ids
    assert turns == 3
    assert trace.rewards["turns"].score == 3


async def test_what_the_fleet_refuses_is_in_the_record(
    fleet: Fleet, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = await played(fleet, model, monkeypatch, max_tokens=8, structured_outputs={"choice": ["eggs"]})
    assert not episode.ok
    [call] = episode.traces[0].calls
    assert call.error.status_code == 400
    assert "sampling_params.structured_outputs: Extra inputs are not permitted" in call.error.message
