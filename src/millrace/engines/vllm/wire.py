"""Encode and decode vLLM's two wire formats for generation. Pure.

`/inference/v1/generate` takes and returns token ids. A server has it with `--enable-scale-out` (before 0.24:
`--tokens-only`). Other servers are called by OpenAI's `/v1/completions`, also with token ids.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.engines.experts import Experts, asked_from, with_experts
from millrace.engines.stock.images import data_url
from millrace.engines.versions import decode_spans
from millrace.types import FinishReason, Float32Array, GenerateRequest, Generation, VersionSpan

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
ROUTED_EXPERTS = "routed_experts"
NAN_LOGPROB = -9999.0  # what vLLM writes for NaN
# Fields of an answer that are decoded or not needed. The others are passed through as `extra`.
DECODED = frozenset({
    "index",
    "finish_reason",
    "token_ids",
    "logprobs",
    "weight_versions",
    "text",
    "prompt_token_ids",
    "prompt_logprobs",
})  # fmt: skip


def encode(path: str, request: GenerateRequest, *, stream: bool = False) -> dict[str, object]:
    """Return the body of a POST to `path`. A server that returns routed experts always does, from the start on."""
    sampling = request.sampling
    params: dict[str, object] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "stop_token_ids": sampling.stop_token_ids,
        "ignore_eos": sampling.ignore_eos,
        "logprobs": 0,  # only the sampled token's
        "min_tokens": sampling.min_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.json_schema is not None:
        params["structured_outputs"] = {"json": sampling.json_schema}
    if sampling.stop:
        params |= {"stop": sampling.stop, "skip_special_tokens": False}
    if request.prompt_logprobs:
        params["prompt_logprobs"] = 0  # only the prompt's own tokens
    if start := asked_from(request):
        params["routed_experts_prompt_start"] = start
    rest = {name: value for name, value in request.extra.items() if name not in ("sampling_params", "lora_path")}
    if (lora := request.extra.get("lora_path")) is not None:
        rest["model"] = lora  # vLLM treats a LoRA adapter as a model
    further: Any = request.extra.get("sampling_params", {})
    body: dict[str, object] = {**rest, "request_id": request.request_id, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if path == COMPLETIONS:
        return {**body, "prompt": request.input_ids, "return_token_ids": True, **further, **params}
    if request.images:
        parts = [{"type": "image_url", "url": data_url(image)} for image in request.images]
        body |= {"content_parts": parts, "return_token_ids": True}
    return {
        **body,
        "token_ids": request.input_ids,
        "sampling_params": {**further, **params, "detokenize": bool(sampling.stop)},
    }


def wire_id(path: str, request_id: str) -> str:
    """Return the id of a request on the server, which aborts need."""
    return f"cmpl-{request_id}-0" if path == COMPLETIONS else f"generate-tokens-{request_id}"


@dataclass(slots=True)
class Answer:
    """The answer to a request, which a stream brings in parts."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    spans: list[Mapping[str, Any]] | None = None
    prompt_logprobs: list[Mapping[str, Any] | None] | None = None
    prompt_ids: Sequence[int] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)

    def take(self, path: str, body: Mapping[str, Any]) -> None:
        """Add a whole answer or one event of a stream.

        Raises KeyError, IndexError, TypeError or ValueError if it does not have the shape that vLLM documents.
        """
        self.usage = body.get("usage") or self.usage
        self.prompt_ids = body.get("prompt_token_ids") or self.prompt_ids
        if not body["choices"]:
            return
        choice = body["choices"][0]
        self.prompt_logprobs = choice.get("prompt_logprobs") or body.get("prompt_logprobs") or self.prompt_logprobs
        self.token_ids += choice["token_ids"] or ()
        logprobs = choice["logprobs"] or {}
        if path == COMPLETIONS:
            fresh = logprobs.get("token_logprobs") or []
        else:
            fresh = [entry["logprob"] for entry in logprobs.get("content") or ()]
        self.logprobs += map(_logprob, fresh)
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.spans = choice.get("weight_versions") or self.spans
        self.extra |= {name: value for name, value in choice.items() if name not in DECODED and value is not None}

    def generation(self, request: GenerateRequest, version: int | None, experts: Experts | None = None) -> Generation:
        """Return the answer so far as a Generation.

        version: of the served weights, for a server that does not report it. experts: of the model, if the server
        returns the routed ones, which come with the finish reason. Without a `finish_reason`, the request is
        still running, or was aborted before its first token; the result says ABORT then. Raises ValueError if the parts
        are inconsistent.
        """
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} tokens came with {len(self.logprobs)} logprobs")
        details = self.usage.get("prompt_tokens_details") or {}
        extra = {name: value for name, value in self.extra.items() if experts is None or name != ROUTED_EXPERTS}
        made = Generation(
            request_id=request.request_id,
            output_ids=tuple(self.token_ids),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            finish_reason=FinishReason(self.finish_reason or "abort"),
            version_spans=self._version_spans(version),
            prompt_tokens=self.usage.get("prompt_tokens", len(request.input_ids)),
            cached_tokens=details.get("cached_tokens") or 0,
            extra=extra,
            prompt_ids=tuple(self.prompt_ids) if request.images and self.prompt_ids else None,
            prompt_logprobs=self._prompt_logprobs(request) if request.prompt_logprobs else None,
        )
        if experts is None or self.finish_reason is None:
            return made
        return with_experts(request, made, _table(self.extra.get(ROUTED_EXPERTS)), experts)

    def _prompt_logprobs(self, request: GenerateRequest) -> Float32Array | None:
        if self.prompt_logprobs is None:  # the request was aborted first
            return None
        rows = zip(request.input_ids, self.prompt_logprobs, strict=True)
        found = [nan if row is None else _logprob(row[str(token)]["logprob"]) for token, row in rows]
        return np.array(found, dtype=np.float32)

    def _version_spans(self, version: int | None) -> tuple[VersionSpan, ...]:
        length = len(self.token_ids)
        if not length:
            return ()
        if not self.spans or self.spans[-1]["end"] != length:  # a stream has them only in its last event
            return (VersionSpan(version, 0, length),)
        return decode_spans(self.spans, length)


def _table(text: Any) -> NDArray[Any] | None:
    """Return the array that vLLM wrote as the base64 text of a NumPy file. Raises ValueError if it is none."""
    if text is None:
        return None
    table: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return table


def _logprob(value: float | None) -> float:
    """Return a logprob as vLLM wrote it, which has no NaN."""
    return nan if value is None or value <= NAN_LOGPROB else value
