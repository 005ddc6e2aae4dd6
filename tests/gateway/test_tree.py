"""Where requests attach, and why generations branch."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pytest

from millrace.config.gateway import GatewayConfig
from millrace.gateway.call import NO_LINEAGE
from millrace.gateway.episode import Episode
from millrace.gateway.gateway import Gateway
from millrace.gateway.journal import decoded, encoded
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.tree import Node, Tree
from millrace.types import FinishReason
from tests.gateway.formats import format_of, tool
from tests.gateway.scripted import ScriptedFleet, experts_naming

pytestmark = pytest.mark.asyncio
ADD, NOW = tool("add", a="integer"), tool("now")
CALL = '<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SYSTEM = {"role": "system", "content": "Be terse."}
QUESTION = {"role": "user", "content": "1 + 1?"}
MORE = {"role": "user", "content": "And more?"}


class Chat:
    """An agent's side of one episode, whose model says what is next in `says`."""

    def __init__(self, name: str = "qwen3", config: GatewayConfig | None = None) -> None:
        turns = format_of(name)
        self.says: list[str] = []
        self.fleet = ScriptedFleet(turns.chat.tokenizer, turns.stop_token_ids[0], lambda _: self.says.pop(0))
        gateway = Gateway(self.fleet, turns, config or GatewayConfig())  # type: ignore[arg-type]
        self.episode: Episode = gateway.open_episode().episode

    async def ask(
        self, *messages: Mapping[str, Any], says: str = "Two.", headers: Mapping[str, str] | None = None, **more: object
    ) -> dict[str, Any]:
        """Ask, get the answer, and return its message."""
        self.says.append(says)
        body = {"messages": [dict(message) for message in messages], **more}
        turn = await self.episode.ask(ChatCompletions().read(body, headers or {}))
        answer = await turn.answer()
        self.episode.delivered(turn)
        choices: Any = ChatCompletions().answer(turn.call, answer)["choices"]
        return dict(choices[0]["message"])

    @property
    def last(self) -> Node:
        return self.episode.tree.nodes[-1]

    @property
    def reasons(self) -> list[str | None]:
        return [node.reason for node in self.episode.tree.nodes]


def answer_of(message: Mapping[str, Any], text: str = "2") -> dict[str, object]:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": text}


async def test_a_conversation_is_one_line_of_tokens() -> None:
    chat = Chat()
    first = await chat.ask(SYSTEM, QUESTION, says=CALL, tools=[ADD])
    second = await chat.ask(SYSTEM, QUESTION, first, answer_of(first), tools=[ADD])
    await chat.ask(SYSTEM, QUESTION, first, answer_of(first), second, MORE, tools=[ADD])
    [sample] = chat.episode.samples()
    assert (sample.nodes, sample.reasons, sample.episode.turns) == ((0, 1, 2), {}, 3)
    asked = chat.fleet.asked[-1]
    assert sample.episode.token_ids == (*asked.request.input_ids, *asked.output_ids)
    assert sample.episode.loss_mask.sum() == sum(len(one.output_ids) for one in chat.fleet.asked)
    assert [message["role"] for message in sample.episode.messages] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip


async def test_what_agents_do_to_what_they_replay_makes_no_difference() -> None:
    chat = Chat()
    first = await chat.ask(SYSTEM, QUESTION, says=CALL, tools=[ADD])
    call = first["tool_calls"][0]
    written = {**call, "function": {"name": "add", "arguments": '{\n  "a":1}'}}
    cached = {"type": "text", "text": "1 + 1?", "cache_control": {"type": "ephemeral"}}
    contents: list[object] = ["", None, []]
    for content in contents:
        turn = {"role": "assistant", "content": content, "tool_calls": [written]}
        await chat.ask(SYSTEM, {**QUESTION, "content": [cached]}, turn, answer_of(first, str(content)), tools=[ADD])
        assert chat.last.parent is chat.episode.tree.nodes[0]


@pytest.mark.parametrize("headers", [{}, {"x-claude-code-agent-id": "a1"}])
async def test_a_turn_is_continued_in_two_ways(headers: Mapping[str, str]) -> None:
    chat = Chat()
    first = await chat.ask(QUESTION)
    await chat.ask(QUESTION, first, MORE)
    await chat.ask(QUESTION, first, {**MORE, "content": "Or less?"}, headers=headers)
    assert chat.reasons == [None, None, "sub_agent" if headers else "forked"]
    one, other = chat.episode.samples()
    assert (one.nodes, other.nodes) == ((0, 1), (0, 2))
    assert (one.episode.turns, other.episode.turns) == (2, 1)  # what they share is trained once
    assert other.episode.loss_mask.sum() == len(chat.last.output_ids)


async def test_the_samples_have_the_routed_experts_of_their_path() -> None:
    """Each request asks for those that the generations before it left open. A journal keeps them."""
    chat = Chat()
    chat.fleet.routed = True
    first = await chat.ask(QUESTION)
    await chat.ask(QUESTION, first, MORE)
    await chat.ask(QUESTION, first, {**MORE, "content": "Or less?"})
    starts = [one.request.routed_experts_start for one in chat.fleet.asked]
    asked = chat.fleet.asked[0]
    assert starts == [0, *[len(asked.request.input_ids) + len(asked.output_ids) - 1] * 2]
    for sample in chat.episode.samples():
        assert sample.episode.routed_experts is not None
        assert np.array_equal(sample.episode.routed_experts, experts_naming(sample.episode.token_ids))
    restored = Tree()
    for number, node in enumerate(chat.episode.tree.nodes):
        line = orjson.loads(orjson.dumps({**encoded(node), "node": number}))
        kept = restored.add(decoded(restored, line)).routed_experts
        assert kept is not None
        assert node.routed_experts is not None
        assert kept.dtype == np.uint8
        assert np.array_equal(kept, node.routed_experts)
        del line["routed_experts"]  # of an earlier Millrace
        assert decoded(restored, line).routed_experts is None


async def test_the_reasons_for_new_roots() -> None:
    chat = Chat()
    first = await chat.ask(SYSTEM, QUESTION, tools=[ADD])
    asked: list[tuple[str, list[Mapping[str, Any]], Mapping[str, Any]]] = [
        ("tools_changed", [SYSTEM, QUESTION, first, MORE], {"tools": [ADD, NOW]}),
        ("system_changed", [{**SYSTEM, "content": "Be long."}, QUESTION, first, MORE], {"tools": [ADD]}),
        ("history_edited", [SYSTEM, QUESTION, {**first, "content": "Three."}, MORE], {"tools": [ADD]}),
        ("forked", [SYSTEM, QUESTION, MORE], {"tools": [ADD]}),
        ("other_conversation", [{"role": "user", "content": "A title?"}], {}),
        ("sub_agent", [SYSTEM, MORE], {"headers": {"x-claude-code-agent-id": "a1"}}),
        ("compacted", [SYSTEM, {"role": "user", "content": "So far: 2."}], {"headers": {"x-codex-window-id": "w:1"}}),
        ("resampled", [SYSTEM, QUESTION], {"tools": [ADD]}),
    ]
    for reason, messages, more in asked:
        await chat.ask(*messages, **more)
        assert chat.last.reason == reason
        assert chat.last.parent is None
    assert len(chat.episode.samples()) == len(chat.episode.tree.nodes)
    assert chat.episode.counts["branch:history_edited"] == 1


async def test_a_conversation_that_begins_with_a_summary_is_compacted() -> None:
    """Also without labels, with other words around the summary. An agent with other tools may quote it too."""
    chat = Chat()
    first = await chat.ask(SYSTEM, QUESTION, tools=[ADD])
    summary = "<summary>\nThe user asked for 1 + 1, which is 2.\n</summary>"
    await chat.ask(SYSTEM, QUESTION, first, {"role": "user", "content": "Summarize."}, tools=[ADD], says=summary)
    for tools, reason in (([NOW], "other_conversation"), ([ADD], "compacted")):
        said = f"Summary for {reason}:\nThe user asked for 1 + 1, which is 2.\nGo on."
        await chat.ask(SYSTEM, {"role": "user", "content": said}, tools=tools)
        assert (chat.last.reason, chat.last.parent) == (reason, None)


@pytest.mark.parametrize(
    ("headers", "reasons"),
    [
        ([("t", 0, "turn"), ("t", 0, "compaction"), ("t", 1, "turn")], [None, "compacted", "compacted"]),
        ([("t", 0, "turn"), ("u", 0, "turn"), ("u", 1, "turn")], [None, "sub_agent", "compacted"]),
        ([("t", 0, "turn"), ("t", 0, "turn"), ("t", 1, "turn")], [None, "other_conversation", "compacted"]),
    ],
)
async def test_codex_labels_its_windows(headers: list[tuple[str, int, str]], reasons: list[str | None]) -> None:
    chat = Chat()
    for place, (thread, window, kind) in enumerate(headers):
        labels = {
            "session-id": "t",
            "thread-id": thread,
            "x-codex-window-id": f"{thread}:{window}",
            "x-codex-turn-metadata": json.dumps({"request_kind": kind}),
        }
        await chat.ask({"role": "user", "content": f"Question {place}"}, headers=labels)
    assert chat.reasons == reasons


@pytest.mark.parametrize("metadata", ["", "{", "[]", "1", '"x"'])
async def test_labels_that_say_nothing_are_no_labels(metadata: str) -> None:
    chat = Chat()
    await chat.ask(QUESTION, headers={"x-codex-turn-metadata": metadata, "thread-id": "t"})
    assert chat.last.lineage == NO_LINEAGE


async def test_changed_reasoning_branches_and_dropped_reasoning_does_not() -> None:
    chat = Chat()
    first = await chat.ask(QUESTION, says=CALL, tools=[ADD])
    kept = {key: value for key, value in first.items() if "reasoning" not in key}
    await chat.ask(QUESTION, {**kept, "reasoning": "I guess."}, answer_of(first), tools=[ADD])
    assert chat.last.reason == "reasoning_changed"
    await chat.ask(QUESTION, kept, answer_of(first), tools=[ADD])
    assert chat.reasons[-1] is None
    assert chat.episode.tree.nodes[-1].parent is chat.episode.tree.nodes[0]


async def test_equal_answers_are_told_by_what_the_agent_got() -> None:
    chat = Chat()
    for got in (True, False):
        chat.says.append("Two.")
        turn = await chat.episode.ask(ChatCompletions().read({"messages": [QUESTION]}, {}))
        await turn.answer()
        if got:
            chat.episode.delivered(turn)
    await chat.ask(QUESTION, {"role": "assistant", "content": "Two."}, MORE)
    assert chat.last.parent is chat.episode.tree.nodes[0]
    assert [sample.nodes for sample in chat.episode.samples()] == [(0, 2)]


async def test_an_answer_that_got_lost_behind_the_gateway_is_superseded() -> None:
    chat = Chat()
    await chat.ask(QUESTION)
    second = await chat.ask(QUESTION, says="It is two.")
    assert [sample.superseded for sample in chat.episode.samples()] == [False, False]
    await chat.ask(QUESTION, second, MORE)
    assert [(sample.nodes, sample.superseded) for sample in chat.episode.samples()] == [((1, 2), False), ((0,), True)]


async def test_sub_agents_with_the_same_question_do_not_supersede_each_other() -> None:
    """Claude Code's sub-agent may start another one with its own task."""
    chat = Chat()
    await chat.ask(QUESTION)
    for agent, says in (("a1", "Two."), ("a2", "It is two.")):
        labels = {"x-claude-code-agent-id": agent}
        last = await chat.ask(SYSTEM, MORE, says=says, headers=labels)
    await chat.ask(SYSTEM, MORE, last, QUESTION, headers=labels)
    assert chat.reasons == [None, "sub_agent", "sub_agent", None]
    assert [(one.nodes, one.superseded) for one in chat.episode.samples()] == [
        ((0,), False), ((1,), False), ((2, 3), False),
    ]  # fmt: skip


async def test_the_template_policy_branches_where_qwen3_drops_reasoning() -> None:
    """A tool's answer keeps the reasoning of the turn before it; a user's message drops it."""
    chat = Chat(config=GatewayConfig(drift="template"))
    first = await chat.ask(QUESTION, says=CALL, tools=[ADD])
    second = await chat.ask(QUESTION, first, answer_of(first), says="<think>\nIt is.\n</think>\n\nTwo.", tools=[ADD])
    await chat.ask(QUESTION, first, answer_of(first), second, MORE, tools=[ADD])
    assert chat.reasons == [None, None, "template_rewrote"]
    assert "I add." not in chat.fleet.tokenizer.decode(list(chat.fleet.asked[-1].request.input_ids))
    assert [sample.nodes for sample in chat.episode.samples()] == [(0, 1), (2,)]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_8"])
async def test_the_template_policy_appends_where_the_template_does(name: str) -> None:
    chat = Chat(name, GatewayConfig(drift="template"))
    opened = format_of(name).chat.reasoning.opened
    first = await chat.ask(QUESTION, says="It is so.\n</think>\n\nTwo." if opened else "Two.")
    await chat.ask(QUESTION, first, MORE, says="It is so.\n</think>\n\nTwo." if opened else "Two.")
    assert chat.reasons == [None, None]


async def test_the_strict_policy_refuses_an_edited_history() -> None:
    chat = Chat(config=GatewayConfig(drift="strict"))
    first = await chat.ask(QUESTION)
    with pytest.raises(RequestError, match="does not extend the conversation: history_edited"):
        await chat.ask(QUESTION, {**first, "content": "Three."}, MORE)
    chat.says.clear()
    await chat.ask({"role": "user", "content": "A title?"})
    assert chat.reasons == [None, "other_conversation"]


@pytest.mark.parametrize("says", ["Two and two", "<think>\nI add the numbers", "<tool_call>\n{"])
async def test_a_turn_that_was_cut_is_continued_with_its_tokens(says: str) -> None:
    chat = Chat()
    tokens = chat.fleet.tokenizer.encode(says, add_special_tokens=False)
    first = await chat.ask(QUESTION, says=says, max_tokens=len(tokens), tools=[ADD])
    assert chat.last.finish is FinishReason.LENGTH
    await chat.ask(QUESTION, first, MORE, tools=[ADD])
    [sample] = chat.episode.samples()
    assert sample.nodes == (0, 1)
    assert chat.last.context_ids[0] == chat.fleet.end


async def test_a_forced_call_is_context_and_not_trained() -> None:
    chat = Chat()
    rest = '{"a": 1}}\n</tool_call>'
    choice = {"type": "function", "function": {"name": "add"}}
    first = await chat.ask(QUESTION, says=rest, tools=[ADD], tool_choice=choice)
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":1}'}
    await chat.ask(QUESTION, first, answer_of(first), tools=[ADD])
    [sample] = chat.episode.samples()
    trained = [token for token, on in zip(sample.episode.token_ids, sample.episode.loss_mask, strict=True) if on]
    assert chat.fleet.tokenizer.decode(trained).startswith(rest)


async def test_two_samples_are_siblings() -> None:
    chat = Chat()
    chat.says.append("It is two.")
    first = await chat.ask(QUESTION, n=2)
    assert chat.reasons == [None, "resampled"]
    await chat.ask(QUESTION, first, MORE)
    assert [(sample.nodes, sample.superseded) for sample in chat.episode.samples()] == [((1,), False), ((0, 2), False)]


async def test_a_full_context_is_the_protocols_own_error() -> None:
    chat = Chat()
    chat.fleet.context_length = 10
    with pytest.raises(RequestError, match="maximum context length is 10 tokens") as raised:
        await chat.ask(QUESTION)
    assert (raised.value.status, raised.value.code) == (400, "context_length_exceeded")
    assert chat.episode.turns == []
