"""JSON schemas of requests: followed, or dropped and counted."""

from millrace.config.gateway import GatewayConfig
from millrace.gateway.episode import Engines, Episode
from millrace.gateway.journal import Journal
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.rules import NO_RULES, EpisodeRules
from millrace.types import Capability, SamplingParams
from tests.gateway.formats import format_of
from tests.gateway.scripted import ScriptedFleet

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
BODY = {
    "messages": [{"role": "user", "content": "Is it?"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    "stream": True,
}


async def asked(
    name: str, capabilities: frozenset[Capability], rules: EpisodeRules = NO_RULES
) -> tuple[str | None, str, int]:
    """Returns the schema that the engine got, the end of its prompt, and how often the schema was dropped."""
    found = format_of(name)
    fleet = ScriptedFleet(found.chat.tokenizer, found.stop_token_ids[0], lambda _: '{"ok": true}')
    fleet.capabilities = capabilities
    episode = Episode("e", Engines(fleet, found, GatewayConfig()), {}, 0.0, Journal(None), rules=rules)  # type: ignore[arg-type]
    turn = await episode.ask(ChatCompletions().read(BODY, {}))
    answer = await turn.answer()
    assert answer.alternatives[0].turn.content == '{"ok": true}'
    [one] = fleet.asked
    prompt = found.chat.tokenizer.decode(list(one.request.input_ids))
    return one.request.sampling.json_schema, prompt[-20:], episode.counts["dropped:json_schema"]


async def test_engines_with_a_grammar_follow_it_without_reasoning() -> None:
    schema, end, dropped = await asked("qwen3_5_think", frozenset({Capability.JSON_SCHEMA}))
    assert (schema, dropped) == ('{"type":"object","properties":{"ok":{"type":"boolean"}}}', 0)
    assert end.endswith("</think>\n\n")


async def test_engines_without_one_drop_it() -> None:
    assert (await asked("qwen2_5", frozenset()))[::2] == (None, 1)


async def test_a_trainer_drops_it() -> None:
    rules = EpisodeRules(SamplingParams(16))
    assert (await asked("qwen2_5", frozenset({Capability.JSON_SCHEMA}), rules))[::2] == (None, 1)
