"""OpenAI's completions: `/v1/completions`. The model continues a text or token ids, without a chat template.

Such a prompt is no conversation. One message with a role that no chat has stands for it, so that each completion is a
root of its own, and a request that is sent again is found like any other.
"""

from collections.abc import Mapping
from typing import Any

from millrace.gateway.answer import Alternative, Answer, Delta, Finish
from millrace.gateway.call import ModelCall
from millrace.gateway.lineage import lineage_of
from millrace.gateway.protocols.base import RequestError, dropped
from millrace.gateway.protocols.chat import STREAM, WITHOUT_MEANING, ChunkStream, openai_error, usage
from millrace.gateway.protocols.fields import model_of, nested, unknown, wanted_of, whole
from millrace.rollout.sample import Message

KNOWN = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "logit_bias", "n", "stream", "stream_options", "logprobs",
)  # fmt: skip
REFUSED = ("echo", "suffix", "best_of")
MAX_TOKENS = 16  # OpenAI's default


class Completions:
    """The protocol. The turn of an answer has the whole text as its content: nothing in it is reasoning or a call."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        for name in REFUSED:
            if body.get(name):
                raise RequestError(f"{name} is not supported")
        prompt = prompt_of(body.get("prompt"))
        return ModelCall(
            messages=(message_of(prompt),),
            prompt=prompt,
            wanted=wanted_of(body, whole(body, "max_tokens") or MAX_TOKENS, body.get("stop")),
            n=whole(body, "n") or 1,
            stream=bool(body.get("stream")),
            logprobs=not (body.get("logprobs") is None or body["logprobs"] is False),  # 0 asks for the tokens' own
            lineage=lineage_of(headers),
            model=model_of(body),
            dropped=(
                *dropped(body, (*KNOWN, *WITHOUT_MEANING, *REFUSED)),
                *unknown(body, "stream_options", STREAM),
            ),
            stream_usage=bool(nested(body, "stream_options").get("include_usage")),
        )

    def answer(self, call: ModelCall, answer: Answer) -> Mapping[str, object]:
        choices = [
            choice(index, one.turn.content, _finish(one.finish), logprobs_of(one) if call.logprobs else None)
            for index, one in enumerate(answer.alternatives)
        ]
        return {
            **head(answer.id, answer.created, call.model or answer.model),
            "choices": choices,
            "usage": usage(answer.usage),
        }

    def stream(self, call: ModelCall, model: str) -> "CompletionStream":
        return CompletionStream(call, model)

    def error(self, error: RequestError) -> Mapping[str, object]:
        return openai_error(error)


class CompletionStream(ChunkStream):
    """The events of one answer."""

    def begin(self, answer_id: str, created: int) -> bytes:
        self._head = head(answer_id, created, self._model)
        return b""

    def delta(self, delta: Delta) -> bytes:
        return self._event(choice(delta.index, delta.content))

    def end(self, answer: Answer) -> bytes:
        chunks = [
            self._event(choice(index, "", _finish(one.finish), logprobs_of(one) if self._call.logprobs else None))
            for index, one in enumerate(answer.alternatives)
        ]
        return self._closed(chunks, answer.usage)


def prompt_of(prompt: Any) -> str | tuple[int, ...]:
    """Return the text or the token ids of a prompt; a list with one prompt is that prompt. Raises RequestError."""
    match prompt:
        case str() if prompt:
            return prompt
        case [str() | list()]:
            return prompt_of(prompt[0])
        case [int(), *_] if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            if min(prompt) < 0:
                raise RequestError("token ids are not negative")
            return tuple(prompt)
        case [_, _, *_]:
            raise RequestError("prompt has more than one prompt: send a request for each")
    raise RequestError("prompt is a text or a list of token ids that is not empty")


def message_of(prompt: str | tuple[int, ...]) -> Message:
    """Return the message that stands for a prompt."""
    if isinstance(prompt, str):
        return {"role": "prompt", "content": prompt}
    return {"role": "prompt_ids", "content": " ".join(map(str, prompt))}


def head(answer_id: str, created: int, model: str) -> dict[str, object]:
    """Return what all bodies of one answer start with."""
    return {"id": f"cmpl-{answer_id}", "object": "text_completion", "created": created, "model": model}


def choice(index: int, text: str, finish: str | None = None, logprobs: object = None) -> dict[str, object]:
    """Return one completion, or what a stream adds to it."""
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def logprobs_of(one: Alternative) -> dict[str, object]:
    """Return the logprobs of a completion's tokens, each with the place of its text."""
    offsets, place = [], 0
    for text in one.token_texts:
        offsets.append(place)
        place += len(text)
    return {
        "tokens": list(one.token_texts),
        "token_logprobs": [float(logprob) for logprob in one.logprobs],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def _finish(finish: Finish) -> str:
    return "length" if finish is Finish.LENGTH else "stop"
