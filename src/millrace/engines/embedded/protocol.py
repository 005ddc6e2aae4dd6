"""The wire protocol: request bodies as pydantic models, and answers in SGLang's format. Pure."""

import secrets
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from millrace.buckets import TensorSpec
from millrace.engines.embedded.penalties import LogitChanges
from millrace.engines.embedded.runner import ModelInfo
from millrace.engines.embedded.sampling import stream_key
from millrace.engines.embedded.scheduler import Finish, Output, Request
from millrace.engines.embedded.text import StopTexts
from millrace.types import FinishReason, MemoryTag, SamplingParams

COLDEST = 1e-4  # the lowest temperature above 0; below it, logits / temperature overflows float32


class BadRequest(ValueError):
    """The body is invalid or not supported. The message says why."""


class Body(BaseModel):
    """A request body. An unknown field is an error, since it would be ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SamplingBody(Body):
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=4096)] = 1
    sampling_seed: int | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = []
    skip_special_tokens: bool = True
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    frequency_penalty: FiniteFloat = 0.0
    presence_penalty: FiniteFloat = 0.0
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]+$")], FiniteFloat] = {}

    @field_validator("temperature")
    @classmethod
    def _warm_enough(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"must be 0 or at least {COLDEST}")
        return value

    @field_validator("top_k")
    @classmethod
    def _all_or_some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 (all) or at least 1")
        return value


class GenerateBody(Body):
    input_ids: list[int]
    sampling_params: SamplingBody = SamplingBody()
    return_logprob: bool = False
    logprob_start_len: Literal[-1, 0] = -1  # 0: logprobs of the whole prompt
    continued_tokens: Annotated[int, Field(ge=0)] = 0  # of the last input_ids: output of earlier calls (not in SGLang)
    rid: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    stream: bool = False
    lora_path: Annotated[str, Field(min_length=1)] | None = None  # a LoRA adapter's name, not a path; as in SGLang
    # Fields that sglang-router adds to every request. These values change nothing, and others are refused.
    model: None = None
    return_text_in_logprobs: Literal[False] = False
    log_metrics: Literal[True] = True
    return_hidden_states: Literal[False] = False
    background: Literal[False] = False
    no_logs: Literal[False] = False
    return_bytes: Literal[False] = False
    return_entropy: Literal[False] = False


class AbortBody(Body):
    rid: str = ""
    abort_all: bool = False


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class EmptyBody(Body):
    pass


class TagsBody(Body):
    tags: list[Literal["weights", "kv_cache"]] | None = None

    def memory(self) -> frozenset[MemoryTag]:
        return frozenset(MemoryTag) if self.tags is None else frozenset(MemoryTag(tag) for tag in self.tags)


class TensorBody(Body):
    name: str
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int


class SharedMemoryBody(Body):
    path: str
    tensors: list[TensorBody]

    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(t.name, t.dtype, tuple(t.shape), t.offset, t.nbytes) for t in self.tensors]


class GroupBody(Body):
    """The body of /init_weights_update_group. timeout: seconds for joining and for each broadcast (not in SGLang)."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: Literal["gloo", "nccl"] = "nccl"
    timeout: Annotated[FiniteFloat, Field(gt=0)] = 120.0


class GroupNameBody(Body):
    group_name: str = "weight_update_group"


class DistributedBody(Body):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"

    def specs(self) -> list[TensorSpec]:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise BadRequest("names, dtypes and shapes must have the same length")
        rows = zip(self.names, self.dtypes, self.shapes, strict=True)
        return [TensorSpec(name, dtype.removeprefix("torch."), tuple(shape), 0, 0) for name, dtype, shape in rows]


class DiskBody(Body):
    model_path: str
    weight_version: str | None = None


class OfferBody(Body):
    """The body of /offer_weights (not in SGLang). names: of the tensors that another engine may read."""

    names: list[str]


class PeerBody(Body):
    """The body of /update_weights_from_peer (not in SGLang). url, ticket: of an engine that offers its weights.
    timeout: seconds for all of them."""

    url: str
    ticket: str
    timeout: Annotated[FiniteFloat, Field(gt=0)]


class VersionBody(Body):
    weight_version: str


class RenameBody(Body):
    new_version: str
    abort_all_requests: bool = True


class CheckBody(Body):
    """The body of /weights_checker. lora_name: checksums of this adapter instead (not in SGLang)."""

    action: Literal["checksum"] = "checksum"
    lora_name: str | None = None


class LoadLoraBody(Body):
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: str


class UnloadLoraBody(Body):
    lora_name: str


class FaultBody(Body):
    kind: Literal["crash", "poison", "hang", "slow", "drop_connection", "refuse_update"]
    after_tokens: Annotated[int, Field(ge=1)] | None = None  # crash: after so many tokens; None: at once
    tokens: list[int] = []  # poison: crash at a prompt with these consecutive tokens; empty: stop doing so
    where: Literal["model", "http"] = "model"  # hang
    seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0  # slow: delay of each step
    count: Annotated[int, Field(ge=0)] = 1  # drop_connection: number of answers; refuse_update: number of the load


B = TypeVar("B", bound=Body)


def parse(model: type[B], raw: bytes) -> B:
    """Parse a body. A missing body counts as empty. Raises BadRequest, which names the field."""
    try:
        return model.model_validate(orjson.loads(raw) if raw else {})
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:3]]
        raise BadRequest("; ".join(faults)) from error


def to_requests(body: GenerateBody, info: ModelInfo, fallback_seed: int, tokenizer: Any = None) -> list[Request]:
    """Return the n requests of one call. Their ids are the call's rid, with a number if n > 1. Raises BadRequest.

    tokenizer: needed if there are stop texts.
    """
    prompt = _prompt(body.input_ids, info)
    params = body.sampling_params
    own_stop = frozenset(params.stop_token_ids or ())
    _require_known("stop_token_ids", own_stop, info)
    stop = own_stop if params.ignore_eos else own_stop | info.eos_token_ids
    bias = {int(token): value for token, value in params.logit_bias.items()}
    _require_known("logit_bias", bias, info)
    if body.continued_tokens > len(body.input_ids):
        raise BadRequest(f"continued_tokens: there are only {len(body.input_ids)} input_ids")
    split = len(body.input_ids) - body.continued_tokens
    asked, continued = body.input_ids[:split], body.input_ids[split:]
    sampling = SamplingParams(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.sampling_seed,
        stop_token_ids=tuple(own_stop),
        ignore_eos=params.ignore_eos,
        stop=tuple(params.stop),
        min_new_tokens=params.min_new_tokens,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=bias,
    )
    seed = fallback_seed if sampling.seed is None else sampling.seed
    rid = body.rid or secrets.token_hex(16)
    return [
        Request(
            id=rid if params.n == 1 else f"{rid}-{index}",
            prompt=prompt,
            sampling=sampling,
            stream_key=stream_key(seed, index),
            stop=stop,
            limit=min(sampling.max_new_tokens, info.context_length - len(prompt)),
            streams=body.stream,
            lora_path=body.lora_path,
            scored=body.logprob_start_len == 0,
            changes=LogitChanges(sampling, asked, continued, stop) if LogitChanges.needed(sampling) else None,
            texts=StopTexts(tokenizer, asked, continued, params.stop, skip_special_tokens=params.skip_special_tokens)
            if params.stop
            else None,
        )
        for index in range(params.n)
    ]


def _prompt(input_ids: list[int], info: ModelInfo) -> NDArray[np.int64]:
    if not input_ids:
        raise BadRequest("input_ids: the prompt is empty")
    _require_known("input_ids", input_ids, info)
    if len(input_ids) >= info.context_length:
        raise BadRequest(f"input_ids: {len(input_ids)} tokens leave no room in a context of {info.context_length}")
    return np.asarray(input_ids, np.int64)


def _require_known(field: str, tokens: Collection[int], info: ModelInfo) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < info.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise BadRequest(f"{field}: token {wrong} is outside the vocabulary of {info.vocab_size}")


def answer(request_id: str, output: Output, *, prompt: Sequence[int], logprobs: bool, seconds: float) -> dict[str, Any]:
    """Return an output, final or not, in SGLang's format. seconds: since the call arrived."""
    meta: dict[str, Any] = {
        "id": request_id,
        "finish_reason": None if output.finish is None else _finish(output.finish),
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": len(output.output_ids),
        "cached_tokens": output.cached_tokens,
        "weight_version": output.spans[-1].version if output.spans else output.version,
        "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in output.spans],
        "num_retractions": output.retractions,
        "e2e_latency": seconds,
    }
    if logprobs:
        meta["output_token_logprobs"] = [[p, t, None] for p, t in zip(output.logprobs, output.output_ids, strict=True)]
    if output.prompt_logprobs is not None:
        meta["input_token_logprobs"] = [[p, t, None] for p, t in zip(output.prompt_logprobs, prompt, strict=True)]
    return {"output_ids": output.output_ids, "text": output.text, "meta_info": meta}


def _finish(finish: Finish) -> dict[str, Any]:
    detail = {FinishReason.STOP: "matched", FinishReason.LENGTH: "length", FinishReason.ABORT: "message"}
    return {"type": finish.reason.value, detail[finish.reason]: finish.detail}
