"""One request of an agent while it is answered: the generation, what is streamed of it, and who waits for it."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from millrace.engines.stop_texts import first_stop
from millrace.gateway.answer import Alternative, Answer, Delta, Finish, Usage
from millrace.gateway.call import ModelCall, ToolUse, TurnText
from millrace.gateway.format import TurnFormat, held_back
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.tree import Node, Place
from millrace.types import FinishReason, Generation

T = TypeVar("T")

INTERVAL = 0.02  # seconds between two readings of a turn's text while it grows
SHARE = 10  # at most one tenth of the time goes into reading a turn


class Reader:
    """Reads the text of one alternative while it grows, and finds what a stream may show of it.

    forced: the text that the gateway put at the beginning of the turn. call_id: the start of the ids of its calls.
    """

    def __init__(self, turns: TurnFormat, call: ModelCall, index: int, forced: str, call_id: str) -> None:
        self._format, self._call, self._index, self._call_id = turns, call, index, call_id
        self._tools = call.tools if call.choice.allowed else ()
        self._decode = turns.decoder()
        self._forced, self._text, self._read = forced, forced, 0
        self._shown = TurnText("", "")
        self._next = 0.0
        self.token_texts: list[str] = []

    def take(self, made: Generation) -> None:
        """Decode the tokens that are new."""
        for token in made.output_ids[self._read :]:
            text = self._decode((token,))
            self._text += text
            self.token_texts.append(text)
        self._read = len(made.output_ids)

    def grown(self) -> list[Delta]:
        """Return what can be shown since the last time. Empty if that was a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return []
        text, stop = self._cut()
        certain = held_back(text, *self._call.wanted.stop) if stop is None else text
        turn = self._limited(self._parsed(certain, ended=False))
        self._next = time.monotonic() + max(INTERVAL, SHARE * (time.monotonic() - now))
        return self._difference(turn)

    def ended(self, made: Generation) -> tuple[Alternative, list[Delta]]:
        """Return the whole alternative, and what had not been shown of it."""
        self.take(made)
        text, stop = self._cut()
        turn = self._limited(self._parsed(text))
        finish = Finish.LENGTH if made.finish_reason is FinishReason.LENGTH else Finish.STOP
        if stop is not None and finish is Finish.STOP:
            finish = Finish.STOP_TEXT
        if turn.calls and finish is not Finish.LENGTH:
            finish = Finish.TOOL_CALLS
        alternative = Alternative(turn, finish, stop, made.output_ids, made.logprobs, tuple(self.token_texts))
        return alternative, self._difference(turn)

    def reasoning_tokens(self, turn: TurnText) -> int:
        """Return how many of the output's tokens the reasoning takes, with its opening marker."""
        if not turn.reasoning:
            return 0
        end = self._text.find(turn.reasoning) + len(turn.reasoning) - len(self._forced)
        lengths = itertools.accumulate(len(text) for text in self.token_texts)
        return sum(length < end for length in lengths) + 1

    def _parsed(self, text: str, *, ended: bool = True) -> TurnText:
        """Return the parts of the turn. What continues a prompt without a template has none."""
        if self._call.prompt is not None:
            return TurnText("", text)
        return self._format.read(text, self._tools, ended=ended)

    def _cut(self) -> tuple[str, str | None]:
        """Return the text before a stop text of the request, and the stop text."""
        stops = self._call.wanted.stop
        if not stops or (place := first_stop(self._text, stops)) is None:
            return self._text, None
        return self._text[:place], next(one for one in stops if self._text.startswith(one, place))

    def _limited(self, turn: TurnText) -> TurnText:
        """Return the turn with ids for its calls, and only the first call if the request takes no parallel ones."""
        calls = turn.calls if self._call.choice.parallel else turn.calls[:1]
        named = tuple(ToolUse(c.id or f"{self._call_id}{i:02}", c.name, c.arguments) for i, c in enumerate(calls))
        return TurnText(turn.reasoning, turn.content, named, turn.malformed)

    def _difference(self, turn: TurnText) -> list[Delta]:
        shown, self._shown = self._shown, turn
        deltas = []
        if thought := turn.reasoning[len(shown.reasoning) :]:
            deltas.append(Delta(self._index, reasoning=thought))
        if content := turn.content[len(shown.content) :]:
            deltas.append(Delta(self._index, content=content))
        for place, call in enumerate(turn.calls[len(shown.calls) :], len(shown.calls)):
            deltas.append(Delta(self._index, call=call, call_index=place))
        return deltas


class EpisodeClosed(RequestError):
    """The episode has been finished."""

    def __init__(self) -> None:
        super().__init__("this episode is closed", status=409, code="episode_closed")


@dataclass(slots=True)
class Turn:
    """One request that is being answered, or was.

    task: makes the answer. deltas: what a stream shows, in order. abandoned: whether the agent went away before it had
    the answer; then the same request joins this turn. parent: the node that the request extends. numbers: of the
    generations in the tree, once the answer is there.
    """

    call: ModelCall
    identity: bytes
    id: str
    created: int
    deltas: list[Delta] = field(default_factory=list)
    abandoned: bool = False
    parent: Node | None = None
    numbers: tuple[int, ...] = ()
    task: "asyncio.Task[Answer] | None" = None
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def failed(self) -> bool:
        """Whether it ended without an answer."""
        task = self.task
        return task is not None and task.done() and (task.cancelled() or task.exception() is not None)

    def start(self, generation: "Coroutine[Any, Any, Answer]") -> "asyncio.Task[Answer]":
        """Start to generate. Those who stream the answer learn of its end."""
        self.task = asyncio.create_task(generation, name=f"turn {self.id}")
        self.task.add_done_callback(lambda _: self._grown.set())
        return self.task

    def show(self, deltas: Sequence[Delta]) -> None:
        """Add deltas for those who stream the answer."""
        if deltas:
            self.deltas.extend(deltas)
            self._grown.set()

    async def answer(self) -> Answer:
        """Wait for the answer. Cancelling the wait leaves the generation running.

        Raises EpisodeClosed if the generation is cancelled, and what it raises.
        """
        assert self.task is not None
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            waiting = asyncio.current_task()
            if self.task.cancelled() and waiting is not None and not waiting.cancelling():
                raise EpisodeClosed from None
            raise

    async def follow(self, patience: float) -> AsyncIterator[Delta | None]:
        """Yield all deltas from the first one on, and None whenever none has come for `patience` seconds.

        Ends with the answer. Raises what the generation raises.
        """
        assert self.task is not None
        shown = 0
        while True:
            while shown < len(self.deltas):
                yield self.deltas[shown]
                shown += 1
            if self.task.done():
                await self.answer()
                return
            self._grown.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._grown.wait()
            except TimeoutError:
                yield None


def answer_of(turn: Turn, readers: Sequence[Reader], made: Sequence[Generation], model: str) -> Answer:
    """Return the answer of which these generations are the samples, and show those who stream it the rest.

    readers: of the generations.
    """
    alternatives, thoughts = [], 0
    for generation, reader in zip(made, readers, strict=True):
        alternative, deltas = reader.ended(generation)
        turn.show(deltas)
        alternatives.append(alternative)
        thoughts += reader.reasoning_tokens(alternative.turn)
    return Answer(turn.id, model, turn.created, tuple(alternatives), usage_of(made, thoughts))


def answer_again(turn: Turn, turns: TurnFormat, forced: str, nodes: Sequence[Node], model: str) -> Answer:
    """Return the answer of which the generations in these nodes are the samples, and show it to those who stream it.

    forced: the text with which the gateway began the turns.
    """
    readers, made = [], []
    for index, node in enumerate(nodes):
        calls = node.turn.calls
        readers.append(Reader(turns, turn.call, index, forced, calls[0].id[:-2] if calls else ""))  # with the same ids
        prompt = len(node.token_ids) - len(node.output_ids)
        made.append(
            Generation(node.request, node.output_ids, node.logprobs, node.finish, node.version_spans, prompt, 0)
        )
    turn.numbers = tuple(node.number for node in nodes)
    return answer_of(turn, readers, made, model)


def usage_of(made: Sequence[Generation], reasoning: int) -> Usage:
    """Return the token counts of an answer's samples."""
    return Usage(
        prompt=max(one.prompt_tokens for one in made),
        cached=max(one.cached_tokens for one in made),
        output=sum(len(one.output_ids) for one in made),
        reasoning=reasoning,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request's prompt: the tokens of the path it attaches to, and those behind it, forced ones included."""

    place: Place
    before: tuple[int, ...]
    context: tuple[int, ...]
    images: tuple[bytes, ...]
    forced: str

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.before + self.context

    @property
    def length(self) -> int:
        return len(self.before) + len(self.context)

    @property
    def routed(self) -> int:
        """How many of the tokens have their routed experts, by the generations before."""
        return self.place.parent.routed if self.place.parent else 0


async def all_of(answers: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Wait for all. Raises the first error, and cancels the others."""
    if len(answers) == 1:
        return [await answers[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
