"""Agents that do at random what real ones do: they alter what they replay, ask again, branch, and start others."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson

from millrace.config.gateway import GatewayConfig
from millrace.gateway.answer import Answer
from millrace.gateway.episode import Episode
from millrace.gateway.format import TemplateFormat
from millrace.gateway.gateway import Gateway
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.samples import GatewaySample
from millrace.gateway.turn import Turn
from millrace.types import GenerateRequest
from tests.gateway.formats import tool
from tests.gateway.scripted import Asked, ScriptedFleet

Body = dict[str, Any]
TOOLS = [tool("add", a="integer", b="string"), tool("now")]
WORDS = ["héllo ✓", "one two three", "a\nb", "{", "42", "<|im_end|>", "  spaced  ", "日本語", "e\u0301", "x" * 40, "🙂"]
CALL_SHAPES = {
    "object": '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
    "markup": "<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>",
    "glm": "<tool_call>{name}\n{parameters}</tool_call>",
}
PARAMETERS = {
    "markup": "<parameter={}>\n{}\n</parameter>\n",
    "glm": "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
}


class RandomFleet(ScriptedFleet):
    """Writes turns at random, in tokens that a tokenizer would not choose for their text."""

    def __init__(self, turns: TemplateFormat, random: Random, shape: str) -> None:
        super().__init__(turns.chat.tokenizer, turns.stop_token_ids[0], lambda _: "")
        self.random, self.turns, self.shape = random, turns, shape

    async def _answer(self, request: GenerateRequest) -> tuple[int, ...]:
        text, random = self._turn(), self.random
        cuts = sorted(random.sample(range(len(text) + 1), min(len(text), random.randrange(4))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [token for piece in pieces for token in self.tokenizer.encode(piece, add_special_tokens=False)]
        ends = request.sampling.stop_token_ids
        written = itertools.takewhile(lambda token: token not in ends, ids)
        output = (*written, random.choice(ends))[: request.sampling.max_new_tokens]
        self.asked.append(Asked(request, output))
        return output

    def _turn(self) -> str:
        random, reasoning = self.random, self.turns.chat.reasoning
        thought = f"\n{random.choice(WORDS)}\n{reasoning.closing}\n\n"
        thought = ("" if reasoning.opened else reasoning.opening) + thought if random.random() < 0.6 else ""
        content = random.choice([*WORDS, "", ""])
        calls = [self._call() for _ in range(random.choice([0, 0, 1, 1, 2]))]
        if random.random() < 0.05:
            calls.append("<tool_call>\nno call\n</tool_call>")
        return "\n".join([thought + content, *calls])

    def _call(self) -> str:
        name, values = "now", {}
        if self.random.random() < 0.7:
            name, values = "add", {"a": self.random.randrange(99), "b": self.random.choice(WORDS)}
        parameters = "".join(PARAMETERS.get(self.shape, "").format(*pair) for pair in values.items())
        arguments = json.dumps(values, ensure_ascii=self.random.random() < 0.5)
        return CALL_SHAPES[self.shape].format(name=name, arguments=arguments, parameters=parameters)


@dataclass
class Agent:
    """One line of work: a conversation that is replayed in each request. honest: it never changes what was said."""

    body: Body
    headers: Mapping[str, str] = field(default_factory=dict)
    honest: bool = True
    pending: Turn | None = None


@dataclass
class Simulation:
    """Agents on one episode. got: the request ids of the answers that they have."""

    episode: Episode
    fleet: RandomFleet
    random: Random
    agents: list[Agent] = field(default_factory=list)
    got: set[str] = field(default_factory=set)
    asked: int = 0
    refused: int = 0

    @classmethod
    def start(
        cls, turns: TemplateFormat, random: Random, shape: str, config: GatewayConfig | None = None
    ) -> "Simulation":
        """An episode with one agent."""
        fleet = RandomFleet(turns, random, shape)
        gateway = Gateway(fleet, turns, config or GatewayConfig())  # type: ignore[arg-type]
        simulation = cls(gateway.open_episode().episode, fleet, random)
        simulation.add_agent()
        return simulation

    def add_agent(self) -> None:
        """A new agent, or a sub-agent, whose requests may have a label."""
        number = len(self.agents)
        messages = [{"role": "user", "content": f"task {number}: {self.random.choice(WORDS)}"}]
        if self.random.random() < 0.7:
            messages.insert(0, {"role": "system", "content": f"You are agent {self.random.randrange(2)}."})
        tools = TOOLS if self.random.random() < 0.9 else TOOLS[:1]
        headers = {"x-claude-code-agent-id": f"agent{number}"} if number and self.random.random() < 0.5 else {}
        self.agents.append(Agent({"messages": messages, "tools": tools}, headers))

    async def play(self, steps: int) -> None:
        """Let agents do that many things, and end all that is pending."""
        actions = [self.converse] * 12 + [self.lose, self.lose_late, self.resample, self.begin, self.begin, self.edit]
        actions += [self.fork, self.compact, self.change_tools, self.sample_two, self.interleave]
        for _ in range(steps):
            agent = self.random.choice(self.agents)
            action = self.random.choice(actions)
            if agent.pending is not None:
                await self.receive(agent, agent.pending)
            else:
                await action(agent)
        for agent in self.agents:
            if agent.pending is not None:
                await self.receive(agent, agent.pending)
        for turn in self.episode.turns:
            await turn.answer()

    async def ask(self, agent: Agent, **more: object) -> Turn | None:
        """Send the conversation. None if it was refused."""
        body = orjson.loads(orjson.dumps({**agent.body, **more}))
        self.asked += 1
        try:
            return await self.episode.ask(ChatCompletions().read(body, agent.headers))
        except RequestError as error:
            if error.code != "drift":
                raise
            self.refused += 1
            return None

    async def receive(self, agent: Agent, turn: Turn) -> None:
        """Take an answer, and say something to it."""
        answer = await turn.answer()
        self.delivered(turn, answer)
        agent.pending = None
        choices: Any = ChatCompletions().answer(turn.call, answer)["choices"]
        message = self.random.choice(choices)["message"]
        agent.body["messages"] = [*agent.body["messages"], self.replayed(message), *self.answers(message)]

    def delivered(self, turn: Turn, answer: Answer) -> None:
        """Note that an answer arrived."""
        self.episode.delivered(turn)
        name = f"{self.episode.id}-{turn.id}"
        several = len(answer.alternatives) > 1
        self.got |= {f"{name}-{i}" for i in range(len(answer.alternatives))} if several else {name}

    async def converse(self, agent: Agent) -> None:
        """The usual case; a few answers are cut by a limit."""
        more = {"max_tokens": self.random.randrange(1, 9)} if self.random.random() < 0.1 else {}
        more |= {"stream": True} if self.random.random() < 0.3 else {}
        if (turn := await self.ask(agent, **more)) is not None:
            await self.receive(agent, turn)

    async def begin(self, agent: Agent) -> None:
        """Ask and go on later, so that other agents are answered meanwhile."""
        agent.pending = await self.ask(agent)

    async def interleave(self, agent: Agent) -> None:
        """All agents ask at once."""
        free = [one for one in self.agents if one.pending is None]
        turns = [(one, await self.ask(one)) for one in free]
        self.random.shuffle(turns)
        for one, turn in turns:
            if turn is not None:
                await self.receive(one, turn)
        if len(self.agents) < 4 and agent.honest:
            self.add_agent()

    async def lose(self, agent: Agent) -> None:
        """The connection breaks before the answer's end, and the agent asks again, or gives up."""
        if (turn := await self.ask(agent)) is None:
            return
        if self.random.random() < 0.5:
            await turn.answer()
        self.episode.abandon(turn)
        if self.random.random() < 0.7:
            again = await self.ask(agent, stream=self.random.random() < 0.5)
            assert again is turn
            await self.receive(agent, again)

    async def lose_late(self, agent: Agent) -> None:
        """The answer gets lost after the gateway has sent it, and the agent asks again."""
        if (turn := await self.ask(agent)) is None:
            return
        self.delivered(turn, await turn.answer())
        if (again := await self.ask(agent)) is not None:
            assert again is not turn
            await self.receive(agent, again)

    async def resample(self, agent: Agent) -> None:
        """The agent asks the same twice at once, and goes on from one answer."""
        turns = [await self.ask(agent), await self.ask(agent)]
        made = [turn for turn in turns if turn is not None]
        assert len({turn.id for turn in made}) == len(made)
        for turn in made[1:]:
            self.delivered(turn, await turn.answer())
        if made:
            await self.receive(agent, made[0])

    async def sample_two(self, agent: Agent) -> None:
        """The agent asks for two samples, and goes on from one."""
        if (turn := await self.ask(agent, n=2)) is not None:
            await self.receive(agent, turn)

    async def edit(self, agent: Agent) -> None:
        """The agent changes something that was said."""
        messages = [dict(message) for message in agent.body["messages"]]
        message = self.random.choice(messages)
        message["content"] = "edited " + self.random.choice(WORDS)
        agent.body["messages"], agent.honest = messages, False

    async def fork(self, agent: Agent) -> None:
        """Another agent goes on from the same conversation, perhaps from an earlier turn."""
        if len(self.agents) >= 4:
            return
        messages = agent.body["messages"]
        ends = [i for i, message in enumerate(messages, 1) if message["role"] in ("user", "tool")]
        kept = [*messages[: self.random.choice(ends)], {"role": "user", "content": "another way"}]
        agent.honest = False
        self.agents.append(Agent({**agent.body, "messages": kept}, agent.headers, honest=False))

    async def compact(self, agent: Agent) -> None:
        """The agent replaces the conversation by a summary."""
        first = [message for message in agent.body["messages"] if message["role"] == "system"]
        agent.body["messages"] = [*first, {"role": "user", "content": f"summary: {self.random.choice(WORDS)}"}]
        agent.honest = False

    async def change_tools(self, agent: Agent) -> None:
        """The agent has other tools from now on."""
        agent.body["tools"], agent.honest = self.random.choice([TOOLS, TOOLS[::-1], TOOLS[1:]]), False

    def answers(self, message: Mapping[str, Any]) -> Sequence[Body]:
        """What an agent says to a turn."""
        said = [
            {"role": "tool", "tool_call_id": call["id"], "content": self.parts(self.random.choice(WORDS))}
            for call in message.get("tool_calls") or ()
        ]
        if not said or self.random.random() < 0.2:
            said.append({"role": "user", "content": self.parts(self.random.choice(WORDS))})
        return said

    def replayed(self, message: Mapping[str, Any]) -> Body:
        """A turn as agents send it back."""
        said, random = dict(message), self.random
        if random.random() < 0.5:  # most agents drop it, and the key's name differs
            said.pop("reasoning", None)
            if random.random() < 0.5:
                said.pop("reasoning_content", None)
        if calls := said.get("tool_calls"):
            said["tool_calls"] = [self.reserialized(call) for call in calls]
        if said["content"]:
            said["content"] = self.parts(said["content"])
        elif random.random() < 0.5:
            said["content"] = random.choice(["", [], None])
        return said

    def reserialized(self, call: Mapping[str, Any]) -> Body:
        """A call whose arguments were parsed and written again."""
        values = json.loads(call["function"]["arguments"])
        if self.random.random() < 0.3:
            return dict(call)
        items = list(values.items())
        self.random.shuffle(items)
        text = json.dumps(dict(items), indent=self.random.choice([None, 2]), ensure_ascii=self.random.random() < 0.5)
        return {**call, "function": {**call["function"], "arguments": text}}

    def parts(self, text: str) -> object:
        """A text, or the same in parts."""
        if self.random.random() < 0.6:
            return text
        cut = self.random.randrange(len(text) + 1)
        parts: list[Body] = [{"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}]
        parts[-1]["cache_control"] = {"type": "ephemeral"}
        return parts


def check(simulation: Simulation) -> list[GatewaySample]:
    """Compares the samples with what the engine was asked and answered, and with what the agents got."""
    samples = simulation.episode.samples()
    made = {(one.request.input_ids, one.output_ids) for one in simulation.fleet.asked}
    trained: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for sample in samples:
        episode, nodes = sample.episode, simulation.episode.tree.nodes
        place = masked = 0
        for number in sample.nodes:
            node = nodes[number]
            start, place = place + len(node.context_ids), place + len(node.context_ids) + len(node.output_ids)
            generation = (episode.token_ids[:start], episode.token_ids[start:place])
            assert generation in made, "a sample has other tokens than the engine"
            mask = episode.loss_mask[start:place]
            assert mask.all() or not mask.any()
            if mask.any():
                trained[generation] += 1
                masked += len(mask)
                assert (episode.logprobs[start:place] == node.logprobs).all()
        assert place == len(episode.token_ids)
        assert episode.loss_mask.sum() == masked
        assert sum(span.end - span.start for span in episode.version_spans) == masked
    got = Counter(
        (one.request.input_ids, one.output_ids)
        for one in simulation.fleet.asked
        if one.request.request_id in simulation.got and one.output_ids
    )
    assert trained == got, "what the agents got is not trained exactly once"
    config, stops = simulation.episode.engines.config, simulation.fleet.turns.stop_token_ids
    if len(simulation.agents) == 1 and simulation.agents[0].honest and config.drift == "append":
        # The same conversation with another limit is a fork.
        wrong_end = {"no_bridge"} if len(stops) > 1 else set()  # a turn of GLM may end as if another role came next
        assert {node.reason for node in simulation.episode.tree.nodes} <= {None, "resampled", "forked", *wrong_end}
    return samples
