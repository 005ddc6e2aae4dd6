"""One episode of an agent: its requests, its tree of generations, and its end."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import orjson

from millrace.config.gateway import GatewayConfig
from millrace.errors import DataError
from millrace.fleet.client import FleetClient
from millrace.gateway.answer import Alternative, Answer
from millrace.gateway.call import ModelCall, Tool
from millrace.gateway.format import TurnFormat
from millrace.gateway.journal import Journal
from millrace.gateway.protocols.base import ContextFull, RequestError
from millrace.gateway.recent import Recent
from millrace.gateway.rules import NO_RULES, EpisodeRules, overruled, sampling_of
from millrace.gateway.samples import GatewaySample, samples_of
from millrace.gateway.tree import BranchReason, Node, Place, Tree
from millrace.gateway.turn import EpisodeClosed, Prepared, Reader, Turn, all_of, answer_again, answer_of
from millrace.rollout.agent import AbortedGeneration
from millrace.rollout.sample import images_in
from millrace.tracing import Trace, current_trace, within
from millrace.types import Capability, FinishReason, GenerateRequest, Generation, RoutingContext

MOST_SAMPLES = 128  # of one request, as at OpenAI
T = TypeVar("T")

ALLOWED_WHEN_STRICT = (None, BranchReason.RESAMPLED, BranchReason.SUB_AGENT, BranchReason.OTHER_CONVERSATION)


@dataclass(frozen=True, slots=True)
class Engines:
    """What all episodes of a gateway share: the fleet, the model's format, and the settings.

    tools: those of the latest requests, by their digest. Each request brings its own copy of the same tools, and
    thousands of kept copies would make garbage collection slow.
    """

    fleet: FleetClient
    format: TurnFormat
    config: GatewayConfig
    tools: Recent[bytes, tuple[Tool, ...]] = field(default_factory=Recent, repr=False)

    @property
    def follow_schemas(self) -> bool:
        """Whether the engines can make an answer match a JSON schema."""
        return Capability.JSON_SCHEMA in self.fleet.capabilities


class TurnsUsed(RequestError):
    """The episode has had all of its generations. After this code agents stop; litellm looks for the first words."""

    def __init__(self, turns: int) -> None:
        super().__init__(
            f"This model's maximum context length is reached: the episode has used its {turns} turns.",
            code="context_length_exceeded",
        )


@dataclass(slots=True)
class Episode:
    """One episode. `counts`: of what happened to its requests, by name; what was dropped is `dropped:NAME`.

    id: public. reward, parts: None and empty until it is finished. failures: of the engines, by the identities of the
    requests that were not answered later. trace: of the task that opened it.
    """

    id: str
    engines: Engines
    metadata: Mapping[str, object]
    created: float
    journal: Journal
    tree: Tree = field(default_factory=Tree)
    counts: Counter[str] = field(default_factory=Counter)
    closed: bool = False
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)  # that are being answered, or that the agent did not get
    rules: EpisodeRules = NO_RULES
    queue_seconds: float = 0.0  # of all requests, for room on an engine
    generate_seconds: float = 0.0  # of all requests, on engines
    failures: dict[bytes, BaseException] = field(default_factory=dict)
    trace: Trace | None = field(default_factory=current_trace)

    async def ask(self, call: ModelCall) -> Turn:
        """Start to answer a request, or join the turn whose answer to the same request the agent did not get.

        Raises EpisodeClosed, and RequestError if the request can't be answered.
        """
        if self.closed:
            raise EpisodeClosed
        identity = call.identity
        for turn in self.turns:
            same = turn.identity == identity and turn.call.lineage.agent == call.lineage.agent
            if turn.abandoned and same and not turn.failed:
                turn.abandoned = False
                self.counts["retried"] += 1
                return turn
        if (kept := self._kept(call)) is not None:
            self.counts["retried"] += 1
            return kept
        if self.rules.max_turns is not None and self._generations + call.n > self.rules.max_turns:
            self.counts["limit:turns"] += 1
            raise TurnsUsed(self.rules.max_turns)
        self.counts["requests"] += 1
        self.counts.update(f"dropped:{name}" for name in (*call.dropped, *overruled(call.wanted, self.rules)))
        if call.schema is not None and not self._follows(call):
            self.counts["dropped:json_schema"] += 1
        turn = Turn(call, identity, secrets.token_hex(8), int(time.time()))
        prepared = self._prepare(call)
        requests = self._requests(turn, prepared)
        turn.parent = prepared.place.parent
        self.turns.append(turn)
        with within(self.trace):  # this is the task of an HTTP request, which has none
            task = turn.start(self._generate(turn, prepared, requests))
        task.add_done_callback(lambda task: self._note(identity, task))
        return turn

    def delivered(self, turn: Turn) -> None:
        """Note that the agent has got the whole answer."""
        if turn in self.turns:
            self.turns.remove(turn)
        self._arrived([self.tree.nodes[number] for number in turn.numbers])

    def abandon(self, turn: Turn) -> None:
        """Note that the agent disconnected before it had the answer. The generation continues, and a retry joins it."""
        turn.abandoned = True
        self.counts["interrupted"] += 1
        if turn.failed and turn in self.turns:
            self.turns.remove(turn)

    def drop(self, turn: Turn) -> None:
        """Forget a turn that failed."""
        if turn in self.turns:
            self.turns.remove(turn)

    async def close(self, reward: float | None, parts: Mapping[str, float]) -> None:
        """Finish the episode. The requests that still run are cancelled."""
        if self.closed:
            raise EpisodeClosed
        self.closed, self.reward, self.parts = True, reward, dict(parts)
        await self.cancel()
        self.journal.closed(reward, parts)

    async def cancel(self) -> None:
        """Cancel the requests that still run."""
        tasks = [turn.task for turn in self.turns if turn.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.turns.clear()

    def samples(self) -> list[GatewaySample]:
        """Return the episode as sequences of tokens to train on, in which each sampled token is trained once."""
        return samples_of(self.tree)

    def count_tokens(self, call: ModelCall) -> int:
        """Return the number of tokens of a request's prompt. Raises RequestError."""
        return self._prepare(call).length

    def _kept(self, call: ModelCall) -> Turn | None:
        """Return a turn with the answer to the same request that a gateway before a restart could not deliver."""
        answering = {number for turn in self.turns for number in turn.numbers}
        found: dict[str, list[Node]] = {}
        for node in self.tree.answered(call):
            if not node.delivered and node.number not in answering:
                found.setdefault(node.request, []).append(node)
        for request, nodes in found.items():
            if len(nodes) == call.n:
                return self._turn_again(Turn(call, call.identity, request, int(time.time())), nodes)
        return None

    def _turn_again(self, turn: Turn, nodes: Sequence[Node]) -> Turn:
        engines, forced = self.engines, self._forced(turn.call)
        turn.parent = nodes[0].parent

        async def answer() -> Answer:
            return answer_again(turn, engines.format, forced, nodes, engines.config.model)

        self.turns.append(turn)
        turn.start(answer())
        return turn

    @property
    def _generations(self) -> int:
        """How many generations there are, with those that run. Requests that were refused, or failed, made none."""
        running = (turn.call.n for turn in self.turns if turn.task is not None and not turn.task.done())
        return len(self.tree.nodes) + sum(running)

    def _note(self, identity: bytes, task: "asyncio.Task[Answer]") -> None:
        """Note whether a request failed by no fault of the agent. The agent may never ask for the error."""
        if task.cancelled():
            return
        match task.exception():
            case None:
                self.failures.pop(identity, None)
            case RequestError():
                pass
            case error:
                self.failures[identity] = error

    def _prepare(self, call: ModelCall) -> Prepared:
        """Return where a request attaches and the tokens of its prompt. Raises RequestError."""
        if call.n > MOST_SAMPLES:
            raise RequestError(f"n is at most {MOST_SAMPLES}")
        try:
            place, before, context = self._placed(call)
            place = self._beside_running(place, call)
        except DataError as error:
            raise RequestError(f"the model can't read these messages: {error}") from error
        if self.engines.config.drift == "strict" and place.reason not in ALLOWED_WHEN_STRICT:
            raise RequestError(f"the request does not extend the conversation: {place.reason}", code="drift")
        forced = self._forced(call)
        if forced:
            context = (*context, *self.engines.format.encode(forced))
        path = place.parent.path if place.parent else []
        images = tuple(image for node in path for image in node.images)
        return Prepared(place, before, context, (*images, *images_in(place.added)), forced)

    def _beside_running(self, place: Place, call: ModelCall) -> Place:
        """Return the place with a reason to branch if another request that runs extends the same node."""
        if place.reason is not None or place.parent is None:
            return place
        beside = [turn for turn in self.turns if turn.parent is place.parent]
        if not beside:
            return place
        same = any(turn.call.prefixes[-1] == call.prefixes[-1] for turn in beside)
        return replace(place, reason=BranchReason.RESAMPLED if same else BranchReason.FORKED)

    def _placed(self, call: ModelCall) -> tuple[Place, tuple[int, ...], tuple[int, ...]]:
        """Return where a request attaches, the tokens of the path there, and those that come behind it."""
        place, turns = self.tree.place(call), self.engines.format
        if call.prompt is not None:
            prompt = turns.encode(call.prompt) if isinstance(call.prompt, str) else call.prompt
            return Place(None, call.messages, self.tree.why_new(call)), (), prompt
        if place.parent is not None:
            self._arrived([place.parent])  # or the agent could not extend it
            before = place.parent.token_ids
            if self.engines.config.drift == "template":
                whole = turns.prompt(call.messages, call.tools)
                if whole[: len(before)] == before:
                    return place, before, whole[len(before) :]
                return Place(None, call.messages, BranchReason.TEMPLATE_REWROTE), (), whole
            bridge = turns.bridge(before, place.parent.turn.message, place.added, call.tools)
            if bridge is not None:
                return place, before, bridge
            place = Place(None, call.messages, BranchReason.NO_BRIDGE)
        return place, (), turns.prompt(call.messages, call.tools)

    def _arrived(self, nodes: Sequence[Node]) -> None:
        """Note that the agent has the answers of these generations."""
        new = [node for node in nodes if not node.delivered]
        for node in new:
            node.delivered = True
        self.journal.delivered([node.number for node in new])

    def _follows(self, call: ModelCall) -> bool:
        """Return whether the answer is made to match the request's JSON schema.

        Not if a trainer fixes the sampling: the schema would change the distribution that it computes.
        """
        return call.schema is not None and self.rules.sampling is None and self.engines.follow_schemas

    def _forced(self, call: ModelCall) -> str:
        """Return the text with which the turn must begin. Raises RequestError if the format has none."""
        if not call.choice.required:
            return self.engines.format.unreasoned() if self._follows(call) else ""
        if not call.tools:
            raise RequestError("tool_choice asks for a tool call, and the request has no tools")
        text = self.engines.format.forced(call.choice.name)
        if text is None:
            raise RequestError("this model's format can't force a tool call; use tool_choice auto", code="unsupported")
        return text

    async def _generate(self, turn: Turn, prepared: Prepared, requests: Sequence[GenerateRequest]) -> Answer:
        call, config = turn.call, self.engines.config
        texts = [secrets.token_hex(4)[:7] for _ in requests]
        readers = [Reader(self.engines.format, call, index, prepared.forced, text) for index, text in enumerate(texts)]
        routing = RoutingContext(session=self.id)
        fleet = self.engines.fleet

        async def one(request: GenerateRequest, reader: Reader) -> Generation:
            if not call.stream or request.sampling.json_schema is not None:  # its tokens may be dropped
                return await fleet.generate(request, deadline=config.timeout, routing=routing, retries=config.retries)
            made: Generation | None = None
            stream = fleet.stream(request, deadline=config.timeout, routing=routing, retries=config.retries)
            async with aclosing(stream) as parts:
                async for made in parts:
                    reader.take(made)
                    turn.show(reader.grown())
            assert made is not None, "a stream has a last item"
            return made

        async def timed(request: GenerateRequest, reader: Reader) -> Generation:
            started = time.monotonic()
            made = await one(request, reader)
            self.queue_seconds += made.queue_seconds
            self.generate_seconds += time.monotonic() - started - made.queue_seconds
            return self._usable(made)

        made = await all_of([timed(*pair) for pair in zip(requests, readers, strict=True)])
        answer = answer_of(turn, readers, made, config.model)
        turn.numbers = tuple(
            self._keep(turn, prepared, generation, alternative, requests[0].sampling.temperature)
            for generation, alternative in zip(made, answer.alternatives, strict=True)
        )
        return answer

    def _usable(self, made: Generation) -> Generation:
        """Return a generation that can become a node. Raises AbortedGeneration if no retry was left, and DataError."""
        if made.finish_reason is FinishReason.ABORT:
            raise AbortedGeneration(made.request_id)
        if self.engines.format.has_placeholder(made.output_ids):  # the next request would have more of them than images
            raise DataError(f"request {made.request_id}: the model itself generated a placeholder of images")
        return made

    def _requests(self, turn: Turn, prepared: Prepared) -> list[GenerateRequest]:
        call, limit = turn.call, self.engines.fleet.context_length
        if self.rules.max_sample_tokens is not None:
            limit = min(limit, self.rules.max_sample_tokens)
        room = limit - prepared.length
        if room < 1:
            self.counts["limit:tokens"] += 1
            raise ContextFull(prepared.length, limit)
        schema = orjson.dumps(call.schema).decode() if self._follows(call) else None
        ends = self.engines.format.stop_token_ids
        sampling = sampling_of(call.wanted, self.engines.config, self.rules, room, ends=ends, json_schema=schema)
        request = GenerateRequest(
            prepared.token_ids,
            sampling,
            request_id=f"{self.id}-{turn.id}",
            images=prepared.images,
            routed_experts_start=prepared.routed,
        )
        if call.n == 1:
            return [request]
        return [
            replace(
                request,
                request_id=f"{request.request_id}-{index}",
                sampling=sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index),
            )
            for index in range(call.n)
        ]

    def _keep(
        self, turn: Turn, prepared: Prepared, made: Generation, alternative: Alternative, temperature: float
    ) -> int:
        """Add a generation to the tree and the journal, and return its number."""
        place, context = prepared.place, prepared.context
        if made.prompt_ids is not None:  # as the engine read it, with a run of placeholders for each image
            context = made.prompt_ids[len(prepared.before) :]
        node = self.tree.add(
            Node(
                number=0,
                parent=place.parent,
                tools=self.engines.tools.get(turn.call.prefixes[0], lambda: turn.call.tools),
                added=place.added,
                context_ids=context,
                output_ids=made.output_ids,
                logprobs=np.asarray(made.logprobs, np.float32),
                version_spans=made.version_spans,
                finish=made.finish_reason,
                turn=alternative.turn,
                identity=turn.identity,
                request=turn.id,
                reason=place.reason,
                lineage=turn.call.lineage,
                temperature=temperature,
                images=images_in(place.added),
                routed_experts=made.routed_experts,
            )
        )
        if node.reason is not None:
            self.counts[f"branch:{node.reason}"] += 1
        if alternative.turn.malformed is not None:
            self.counts["malformed"] += 1
        self.journal.added(node)
        return node.number
