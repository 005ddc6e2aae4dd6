"""One episode: the model's turns and what answers them, until the answer is the end or a limit is reached."""

import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from millrace.continuation import joined_experts
from millrace.errors import DataError, MillraceError
from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Episode, EpisodeEnd, Message, images_in, unmarked
from millrace.rollout.tools import (
    BadToolCall,
    Tool,
    ToolAnswer,
    ToolCall,
    answer_tool_call,
    parse_tool_calls,
    without_tool_calls,
)
from millrace.types import (
    ExpertArray,
    FinishReason,
    Float32Array,
    GenerateRequest,
    Generation,
    SamplingParams,
    VersionSpan,
)

Generate = Callable[[GenerateRequest], Awaitable[Generation]]


class AbortedGeneration(MillraceError):
    """The engine aborted a turn, so the episode can't be used. The runner decides whether it starts again."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"the engine aborted request {request_id}")
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """The limits of one episode.

    max_turns: turns of the model; None is no limit. max_turn_tokens: output tokens of one turn. max_sample_tokens:
    tokens of the whole conversation. context_length: of the engine, in tokens.
    """

    max_turns: int | None
    max_turn_tokens: int
    max_sample_tokens: int
    context_length: int

    @property
    def total(self) -> int:
        """The limit on the whole conversation, in tokens."""
        return min(self.max_sample_tokens, self.context_length)

    def end_when_full(self) -> EpisodeEnd:
        """Return the end of an episode that reaches `total`: which of the two limits is the lower one."""
        return EpisodeEnd.CONTEXT_FULL if self.context_length < self.max_sample_tokens else EpisodeEnd.TOKEN_LIMIT


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of the model: its text without the reasoning, and the tool calls in it.

    last: whether it is the last turn that the limits allow. cut: whether a limit on its tokens cut it off.
    """

    text: str
    calls: tuple[ToolCall | BadToolCall, ...]
    last: bool
    cut: bool


# What follows a turn: the messages to append, or the end of the episode.
Respond = Callable[[Turn], Awaitable[Sequence[Message] | EpisodeEnd]]


async def run_episode(
    sample_id: str,
    prompt_ids: tuple[int, ...],
    *,
    generate: Generate,
    chat: ChatFormat,
    tools: Mapping[str, Tool],
    limits: EpisodeLimits,
    sampling: SamplingParams,
    on_tool_answer: Callable[[ToolAnswer], None],
    images: Sequence[bytes] = (),
) -> Episode:
    """Run one conversation of a model with its tools and return it.

    tools: the tools that the prompts of `chat` describe, by name; without any, the first turn is the answer.
    on_tool_answer: called with the answer to each tool call. The other arguments and the errors are those of
    `converse`.
    """

    async def respond(turn: Turn) -> Sequence[Message] | EpisodeEnd:
        if not turn.calls:
            return EpisodeEnd.ANSWERED
        if turn.last:
            return EpisodeEnd.TURN_LIMIT
        answers = [await answer_tool_call(call, tools) for call in turn.calls]
        for answer in answers:
            on_tool_answer(answer)
        return [answer.message for answer in answers]

    return await converse(
        sample_id,
        prompt_ids,
        respond,
        generate=generate,
        chat=chat,
        calls_tools=bool(tools),
        takes_cut_turns=False,
        limits=limits,
        sampling=sampling,
        images=images,
    )


async def converse(
    sample_id: str,
    prompt_ids: tuple[int, ...],
    respond: Respond,
    *,
    generate: Generate,
    chat: ChatFormat,
    calls_tools: bool,
    takes_cut_turns: bool,
    limits: EpisodeLimits,
    sampling: SamplingParams,
    images: Sequence[bytes] = (),
) -> Episode:
    """Run one conversation and return it.

    sample_id: prefix of the request ids, `<sample_id>/<turn>`, with turns from 0. prompt_ids: [T] token ids. respond:
    called with each turn of the model. takes_cut_turns: whether it is also called with turns that a limit cuts off;
    otherwise such a turn ends the episode. generate: sends one request. calls_tools: whether tool calls are read from
    the turns. sampling: each turn gets its own `max_new_tokens`, stop tokens and, if there is a seed, seed. images: the
    contents of the prompt's image files, each with one placeholder in `prompt_ids`.

    Raises DataError if the prompt leaves no room for an answer, the engine read another prompt, or the model generated
    a placeholder of images; AbortedGeneration if the engine aborts a turn; and whatever `generate` and `respond` raise.
    """
    draft = _Draft(list(prompt_ids), list(images), added=chat.added(images))
    if draft.length >= limits.total:
        raise DataError(
            f"sample {sample_id}: its prompt has {draft.length} tokens and leaves no room to answer in "
            f"{limits.total} (the smaller of max_sample_tokens and the engine's context)"
        )
    while True:
        room = min(limits.max_turn_tokens, limits.total - draft.length)
        request_id = f"{sample_id}/{draft.turns}"
        turn_sampling = _turn_sampling(sampling, draft.turns, room, chat.end_of_turn)
        generation = await generate(
            GenerateRequest(
                tuple(draft.token_ids),
                turn_sampling,
                request_id=request_id,
                images=tuple(draft.images),
                routed_experts_start=draft.routed,
            )
        )
        if generation.finish_reason is FinishReason.ABORT:
            raise AbortedGeneration(request_id)
        if chat.has_placeholder(generation.output_ids):
            raise DataError(f"request {request_id}: the model itself generated a placeholder of images")
        thought, text = chat.split(generation.output_ids)
        calls = parse_tool_calls(text) if calls_tools else ()
        draft.append_turn(generation, _message(thought, text, calls))
        cut = generation.finish_reason is FinishReason.LENGTH
        if cut and not takes_cut_turns:
            full = len(draft.token_ids) >= limits.total
            return draft.finish(limits.end_when_full() if full else EpisodeEnd.TOKEN_LIMIT)
        response = await respond(Turn(text, calls, draft.turns == limits.max_turns, cut))
        if isinstance(response, EpisodeEnd):
            return draft.finish(response)
        turn_ended = generation.output_ids[-1:] == (chat.end_of_turn,)
        appended, new_images = chat.reply(unmarked(response), turn_ended=turn_ended), images_in(response)
        added = chat.added(new_images)
        if draft.length + len(appended) + added >= limits.total:
            return draft.finish(limits.end_when_full())
        draft.append_messages(response, appended, new_images, added)


def last_turn(episode: Episode) -> tuple[int, ...]:
    """Return the token ids of the model's last turn: those after the last token that the model did not generate."""
    not_model = np.flatnonzero(~episode.loss_mask)
    return episode.token_ids[int(not_model[-1]) + 1 :] if not_model.size else episode.token_ids


def last_answer(episode: Episode, chat: ChatFormat) -> str:
    """Return the text of the model's last turn, without its reasoning and its end-of-turn token.

    Empty if the reasoning has no end.
    """
    return chat.answer(last_turn(episode))


@dataclass(slots=True)
class _Draft:
    """An unfinished episode. Tokens without an entry in `turn_logprobs` were not generated by the model.

    added: how many tokens the engine will add, because it has not yet read the images after the model's last turn.
    read: how many of the tokens the engine has read or generated.
    """

    token_ids: list[int]
    images: list[bytes]
    added: int
    read: int = 0
    messages: list[Message] = field(default_factory=list)
    turn_logprobs: list[tuple[int, Float32Array]] = field(default_factory=list)  # (first position, [T] logprobs)
    version_spans: list[VersionSpan] = field(default_factory=list)
    routed_experts: list[ExpertArray] = field(default_factory=list)  # one after the other, from the first token on
    turns: int = 0

    @property
    def routed(self) -> int:
        """How many of the tokens have their routed experts."""
        return sum(map(len, self.routed_experts))

    @property
    def length(self) -> int:
        """The number of tokens, as the engine will read them."""
        return len(self.token_ids) + self.added

    def append_messages(
        self, messages: Sequence[Message], token_ids: Sequence[int], images: Sequence[bytes], added: int
    ) -> None:
        self.messages.extend(messages)
        self.token_ids.extend(token_ids)
        self.images.extend(images)
        self.added = added

    def append_turn(self, generation: Generation, message: Message) -> None:
        if self.images:
            self._take_prompt(generation)
        start = len(self.token_ids)
        self.token_ids.extend(generation.output_ids)
        self.turn_logprobs.append((start, generation.logprobs))
        self.version_spans.extend(
            VersionSpan(s.version, s.start + start, s.end + start) for s in generation.version_spans
        )
        if generation.routed_experts is not None:
            self.routed_experts.append(generation.routed_experts)
        self.messages.append(message)
        self.turns += 1
        self.read = len(self.token_ids)

    def _take_prompt(self, generation: Generation) -> None:
        """Replace the tokens so far by those that the engine read, with a run of placeholders for each image."""
        read = generation.prompt_ids
        if read is None or list(read[: self.read]) != self.token_ids[: self.read]:
            how = "did not say how it read the prompt" if read is None else "read other tokens than it did before"
            raise DataError(f"request {generation.request_id} has images, and the engine {how}")
        self.token_ids, self.added = list(read), 0

    def finish(self, end: EpisodeEnd) -> Episode:
        loss_mask = np.zeros(len(self.token_ids), np.bool_)
        logprobs = np.zeros(len(self.token_ids), np.float32)
        for start, turn_logprobs in self.turn_logprobs:
            loss_mask[start : start + len(turn_logprobs)] = True
            logprobs[start : start + len(turn_logprobs)] = turn_logprobs
        return Episode(
            tuple(self.token_ids),
            loss_mask,
            logprobs,
            tuple(self.version_spans),
            turns=self.turns,
            end=end,
            messages=tuple(self.messages),
            images=tuple(self.images),
            routed_experts=joined_experts(self.routed_experts),
        )


def _message(thought: str, text: str, calls: Sequence[ToolCall | BadToolCall]) -> Message:
    """Return a turn of the model as a chat message. Tool calls that can't be parsed stay in the content."""
    message: dict[str, object] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning"] = thought
    if parsed := [call for call in calls if isinstance(call, ToolCall)]:
        message["content"] = without_tool_calls(text)
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}} for call in parsed
        ]
    return message


def _turn_sampling(sampling: SamplingParams, turn: int, room: int, end_of_turn: int) -> SamplingParams:
    # With one seed for all turns, each turn would draw the same random numbers.
    seed = None if sampling.seed is None else zlib.crc32(f"{sampling.seed}/{turn}".encode())
    stops = tuple(sorted({*sampling.stop_token_ids, end_of_turn}))
    return replace(sampling, max_new_tokens=room, stop_token_ids=stops, seed=seed)
