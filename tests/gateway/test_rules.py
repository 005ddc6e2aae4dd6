"""What a trainer fixes for an episode: the sampling of its requests, and its limits."""

import asyncio

import aiohttp
import pytest

from millrace.config.gateway import GatewayConfig
from millrace.errors import NoEngineError
from millrace.gateway import EpisodeRules, OpenEpisode, serve_gateway
from millrace.gateway.call import Wanted
from millrace.gateway.format import learn_format
from millrace.gateway.rules import overruled, sampling_of
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import GenerateRequest, Generation, SamplingParams
from tests.gateway.scripted import ScriptedFleet

TOKENIZER = make_tiny_tokenizer()
FORMAT = learn_format(TOKENIZER, "tiny")
GREEDY = EpisodeRules(SamplingParams(64, temperature=0.0), max_turn_tokens=20)


def fleet() -> ScriptedFleet:
    return ScriptedFleet(TOKENIZER, FORMAT.stop_token_ids[0], lambda _: "#### 7")


async def ask(episode: OpenEpisode, *texts: str, **more: object) -> tuple[int, dict[str, object]]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    url = f"{episode.base_url}/v1/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={"model": "any", "messages": messages, **more}) as response,
    ):
        return response.status, await response.json()


def test_without_rules_the_agents_wishes_count_and_the_settings_come_before_them() -> None:
    wanted = Wanted(max_tokens=50, temperature=0.3, top_k=5, seed=3, frequency_penalty=0.5)
    sampling = sampling_of(wanted, GatewayConfig(top_k=7), EpisodeRules(), room=100)
    assert sampling == SamplingParams(50, temperature=0.3, top_k=7, seed=3, frequency_penalty=0.5)
    assert list(overruled(wanted, EpisodeRules())) == []


def test_the_rules_take_the_place_of_the_agents_wishes() -> None:
    wanted = Wanted(max_tokens=50, temperature=0.3, top_p=1.0, seed=3, stop=("x",), logit_bias={1: 2.0})
    assert sampling_of(wanted, GatewayConfig(), GREEDY, room=100) == SamplingParams(20, temperature=0.0, stop=("x",))
    assert list(overruled(wanted, GREEDY)) == ["temperature", "seed", "logit_bias"]
    assert list(overruled(Wanted(), GREEDY)) == []


@pytest.mark.parametrize("room", [7, 1])
def test_no_turn_is_longer_than_the_room_that_is_left(room: int) -> None:
    assert sampling_of(Wanted(), GatewayConfig(), GREEDY, room).max_new_tokens == room


async def test_the_limits_end_agents_by_the_error_of_their_protocol() -> None:
    rules = EpisodeRules(max_turns=2, max_sample_tokens=30)
    async with serve_gateway(fleet(), FORMAT, key="k") as gateway, gateway.episode({}, rules) as episode:  # type: ignore[arg-type]
        status, answer = await ask(episode, "hello " * 30)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")  # type: ignore[index]
        assert "maximum context length is 30 tokens" in answer["error"]["message"]  # type: ignore[index]
        assert (await ask(episode, "hello", temperature="hot"))[0] == 400
        assert [(await ask(episode, text))[0] for text in ("hello", "again")] == [200, 200]  # those before do not count
        status, answer = await ask(episode, "more")
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")  # type: ignore[index]
        assert episode.episode.counts["limit:turns"] == episode.episode.counts["limit:tokens"] == 1


async def test_requests_that_run_count_as_turns() -> None:
    go_on = asyncio.Event()

    async def script(_: str) -> str:
        await go_on.wait()
        return "#### 7"

    engines = ScriptedFleet(TOKENIZER, FORMAT.stop_token_ids[0], script)
    rules = EpisodeRules(max_turns=3)
    async with serve_gateway(engines, FORMAT, key="k") as gateway, gateway.episode({}, rules) as episode:  # type: ignore[arg-type]
        running = asyncio.create_task(ask(episode, "hello", n=2))
        async with asyncio.timeout(30):
            while not episode.episode.turns:
                await asyncio.sleep(0)
        assert (await ask(episode, "hello", n=2))[0] == 400
        go_on.set()
        assert (await running)[0] == 200
        assert [(await ask(episode, text))[0] for text in ("again", "more")] == [200, 400]


class BrokenFleet(ScriptedFleet):
    broken = True

    async def generate(self, request: GenerateRequest, **more: object) -> Generation:
        if self.broken:
            raise NoEngineError("all engines are down")
        return await super().generate(request, **more)  # type: ignore[arg-type]


async def test_a_failure_of_the_engines_is_noted_until_the_request_is_answered() -> None:
    engines, once = BrokenFleet(TOKENIZER, FORMAT.stop_token_ids[0], lambda _: "#### 7"), EpisodeRules(max_turns=1)
    async with serve_gateway(engines, FORMAT, key="k") as gateway, gateway.episode({}, once) as episode:  # type: ignore[arg-type]
        status, answer = await ask(episode, "hello")
        assert (status, answer["error"]["message"]) == (503, "all engines are down")  # type: ignore[index]
        assert [str(error) for error in episode.episode.failures.values()] == ["all engines are down"]
        engines.broken = False
        assert (await ask(episode, "hello"))[0] == 200
        assert not episode.episode.failures
