"""The wire format of vLLM's token routes, from the server's side. Pure.

`/inference/v1/generate` and `/v1/completions` take prompts as token ids. The bodies are those of vLLM 0.32. A field
that a fleet can't honour is refused. Those that are ignored change no token.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from millrace.types import GenerateRequest, Generation, SamplingParams

TokenIds = Annotated[list[NonNegativeInt], Field(min_length=1)]


class Sampling(BaseModel):
    """The sampling parameters of both routes.

    `skip_special_tokens`, `spaces_between_special_tokens`, `detokenize` and `include_stop_str_in_output` only change
    the text of an answer, and these routes answer with token ids, so they have no effect. Nor has
    `routed_experts_prompt_start`, which verifiers sends with each later turn: an answer has no routed experts.
    """

    model_config = ConfigDict(extra="forbid")

    n: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    min_tokens: NonNegativeInt = 0
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    include_stop_str_in_output: bool = False
    routed_experts_prompt_start: NonNegativeInt = 0

    def params(self, room: int) -> SamplingParams:
        """Return the parameters as Millrace's. `room`: the tokens that are left in the context."""
        return SamplingParams(
            max_new_tokens=room if self.max_tokens is None else self.max_tokens,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or -1,  # vLLM takes 0 and -1 for off
            min_p=self.min_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias or {},
        )


class StreamOptions(BaseModel):
    """What a stream has besides its tokens."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class Body(BaseModel):
    """The fields that both routes share.

    `cache_salt` and `priority` are accepted and have no effect: no prefix of one weight version is reused by another,
    and engines serve requests in order.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    request_id: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int = 0


class GenerateBody(Body):
    """The body of `/inference/v1/generate`."""

    token_ids: TokenIds
    sampling_params: Sampling = Sampling()

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts: one."""
        return [self.token_ids]

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters."""
        return self.sampling_params


class CompletionBody(Body, Sampling):
    """The body of `/v1/completions`: one prompt or several, as token ids."""

    prompt: Annotated[list[TokenIds], Field(min_length=1)]  # a single prompt becomes a list of one
    max_tokens: PositiveInt | None = 16  # OpenAI's default
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_prompts(cls, body: Any) -> Any:
        match body:
            case {"prompt": str() | [str(), *_]}:
                raise ValueError("prompt is text; this server takes prompts as token ids")
            case {"prompt": [int(), *_] as prompt}:
                return {**body, "prompt": [prompt]}
            case _:
                return body

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts, as token ids."""
        return self.prompt

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters."""
        return self


def answer(
    body: GenerateBody | CompletionBody,
    model: str,
    requests: Sequence[GenerateRequest],
    made: Sequence[Generation],
) -> dict[str, object]:
    """Return the whole answer. `made`: the generations, `n` for each request, in order."""
    n = body.sampling.n
    choices = [
        _choice(body, index, generation, 0, requests[index // n], finish_reason=generation.finish_reason.value)
        for index, generation in enumerate(made)
    ]
    whole = {**_head(body, model, made[0].request_id), "choices": choices, "usage": _usage(requests, made)}
    if isinstance(body, GenerateBody):
        whole["prompt_token_ids"] = body.token_ids if body.return_token_ids else None
        whole["prompt_logprobs"] = _prompt_logprobs(requests[0], made[0])
    return whole


def chunk(body: GenerateBody | CompletionBody, model: str, made: Generation, sent: int) -> dict[str, object]:
    """Return an event of a stream: the tokens after the first `sent`."""
    choice = _choice(body, 0, made, sent, None, finish_reason=None)
    return {**_head(body, model, made.request_id), "choices": [choice]}


def last_chunk(
    body: GenerateBody | CompletionBody, model: str, request: GenerateRequest, made: Generation
) -> dict[str, object]:
    """Return the last event of a stream, which has no tokens."""
    choice = _choice(body, 0, made, len(made.output_ids), None, finish_reason=made.finish_reason.value)
    event = {**_head(body, model, made.request_id), "choices": [choice]}
    return {**event, "usage": _usage([request], [made])} if body.stream_options.include_usage else event


def _head(body: Body, model: str, request_id: str) -> dict[str, object]:
    common = {"created": int(time.time()), "model": model}
    if isinstance(body, CompletionBody):
        return {"id": f"cmpl-{body.request_id or request_id}", "object": "text_completion", **common}
    return {"request_id": body.request_id or request_id, **common}


def _choice(
    body: GenerateBody | CompletionBody,
    index: int,
    made: Generation,
    start: int,
    request: GenerateRequest | None,
    *,
    finish_reason: str | None,
) -> dict[str, object]:
    """Return one choice: the tokens from `start` on. `request`: if the answer is whole, the request."""
    choice: dict[str, object] = {"index": index, "finish_reason": finish_reason, "stop_reason": None}
    wants_logprobs = body.sampling.logprobs is not None
    if finish_reason is not None:
        choice["weight_versions"] = [
            {"version": str(span.version), "start": span.start, "end": span.end} for span in made.version_spans
        ]
    if isinstance(body, GenerateBody):
        logprobs = _token_logprobs(made, start) if wants_logprobs else None
        return {**choice, "token_ids": made.output_ids[start:], "logprobs": logprobs}
    choice |= {"text": made.text or "" if finish_reason is not None else ""}
    choice["logprobs"] = _completion_logprobs(made, start) if wants_logprobs else None
    if body.return_token_ids:
        choice["token_ids"] = made.output_ids[start:]
        choice["prompt_token_ids"] = None if request is None else request.input_ids
    if request is not None and body.sampling.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(request, made)
    return choice


def _usage(requests: Sequence[GenerateRequest], made: Sequence[Generation]) -> dict[str, int]:
    prompt = sum(len(request.input_ids) for request in requests)
    completion = sum(len(generation.output_ids) for generation in made)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _token_logprobs(made: Generation, start: int) -> dict[str, object]:
    """vLLM 0.32 names each token by `token_id`, earlier versions by `token`. Clients read one of the two."""
    pairs = zip(made.output_ids[start:], made.logprobs[start:].tolist(), strict=True)
    return {
        "content": [
            {"token": f"token_id:{token}", "token_id": token, "logprob": logprob, "top_logprobs": []}
            for token, logprob in pairs
        ]
    }


def _completion_logprobs(made: Generation, start: int) -> dict[str, object]:
    return {
        "tokens": [f"token_id:{token}" for token in made.output_ids[start:]],
        "token_logprobs": made.logprobs[start:].tolist(),
        "top_logprobs": None,
        "text_offset": [],
    }


def _prompt_logprobs(request: GenerateRequest, made: Generation) -> list[dict[str, object] | None] | None:
    """Return the logprob of each prompt token but the first, in vLLM's form; None if they were not asked for."""
    if made.prompt_logprobs is None:
        return None
    pairs = zip(request.input_ids[1:], made.prompt_logprobs[1:].tolist(), strict=True)
    scored: list[dict[str, object] | None] = [
        {str(token): {"logprob": logprob, "rank": None}} for token, logprob in pairs
    ]
    return [None, *scored]
