"""Encode and decode SGLang's native wire format, which the embedded engine has too. Pure."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from millrace.buckets import ProcessGroup, ProcessGroupBucket
from millrace.engines.experts import Experts, asked_from, with_experts
from millrace.engines.versions import decode_spans, decode_version
from millrace.types import EngineLoad, FinishReason, GenerateRequest, Generation, PauseMode, VersionSpan

PROMPT_LOGPROBS = "input_token_logprobs"
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
PAUSE_MODES = {PauseMode.ABORT: "abort", PauseMode.RETRACT: "retract", PauseMode.KEEP: "in_place"}

ROUTED_EXPERTS = "routed_experts"
# Fields of an answer that are decoded. The others (hidden states, ...) are passed through as `extra`.
DECODED = frozenset({
    "id",
    "finish_reason",
    "prompt_tokens",
    "cached_tokens",
    "output_token_logprobs",
    "weight_version",
    "weight_versions",
})  # fmt: skip


def encode_generate(request: GenerateRequest, *, stream: bool = False, experts: bool = False) -> dict[str, object]:
    """Return the body of POST /generate. experts: whether to ask for the routed experts."""
    sampling = request.sampling
    params: dict[str, object] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop_token_ids": sampling.stop_token_ids,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    if sampling.stop:
        params |= {"stop": sampling.stop, "skip_special_tokens": False}
    if sampling.min_new_tokens:
        params["min_new_tokens"] = sampling.min_new_tokens
    if sampling.json_schema is not None:
        params["json_schema"] = sampling.json_schema
    if sampling.penalizes:
        params |= {name: getattr(sampling, name) for name in PENALTIES}
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    further: Any = request.extra.get("sampling_params", {})
    scored = {"logprob_start_len": 0} if request.prompt_logprobs else {}
    routed = {"return_routed_experts": True, "routed_experts_start_len": asked_from(request)} if experts else {}
    return {
        **request.extra,
        **scored,
        **routed,
        "rid": wire_id(request.request_id),
        "input_ids": request.input_ids,
        "sampling_params": {**further, **params},
        "return_logprob": True,
        "stream": stream,
    }


def wire_id(request_id: str) -> str:
    """Return the id of a request on the server.

    The server aborts every request whose id starts with the given one. The end mark keeps `r1` from matching `r10`.
    """
    return f"{request_id}#"


def decode_generate(request: GenerateRequest, body: Mapping[str, Any], experts: Experts | None = None) -> Generation:
    """Decode the answer to POST /generate, or one cumulative event of its stream.

    A request that was aborted in the waiting queue has no token counts. experts: of the model, if the request asked for
    the routed ones, which come at the end.

    Raises KeyError, TypeError or ValueError if the answer does not have the shape that SGLang documents.
    """
    meta = body["meta_info"]
    output_ids = tuple(body["output_ids"])
    entries = meta.get("output_token_logprobs") or ()
    logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)  # null stands for NaN
    if len(logprobs) != len(output_ids):
        raise ValueError(f"{len(output_ids)} tokens came with {len(logprobs)} logprobs")
    finish = meta["finish_reason"]
    dropped = DECODED | {PROMPT_LOGPROBS} if request.prompt_logprobs else DECODED
    dropped |= {ROUTED_EXPERTS} if experts is not None else set()
    scored = meta.get(PROMPT_LOGPROBS) if request.prompt_logprobs else None  # a request aborted in the queue has none
    prompt_logprobs = np.array([entry[0] for entry in scored], dtype=np.float32) if scored else None
    if prompt_logprobs is not None and len(prompt_logprobs) != len(request.input_ids):
        raise ValueError(f"{len(request.input_ids)} tokens of the prompt came with {len(prompt_logprobs)} logprobs")
    made = Generation(
        request_id=request.request_id,
        output_ids=output_ids,
        logprobs=logprobs,
        finish_reason=FinishReason(finish["type"]) if finish else FinishReason.ABORT,
        version_spans=decode_version_spans(meta, len(output_ids)),
        prompt_ids=tuple(prompt) if request.images and (prompt := body.get("prompt_token_ids")) else None,
        prompt_tokens=meta.get("prompt_tokens", len(request.input_ids)),
        cached_tokens=meta.get("cached_tokens", 0),
        extra={key: value for key, value in meta.items() if key not in dropped},
        text=body["text"] if finish and request.sampling.stop else None,
        prompt_logprobs=prompt_logprobs,
    )
    if experts is None or not finish:
        return made
    text = meta.get(ROUTED_EXPERTS)
    table = None if text is None else np.frombuffer(base64.b64decode(text), dtype=np.int32)
    return with_experts(request, made, table, experts)


def decode_version_spans(meta: Mapping[str, Any], length: int) -> tuple[VersionSpan, ...]:
    """Return which version made which tokens.

    `weight_versions` must cover the output without a gap. Without it, the answer has only the version at its end, which
    is correct if no update came during the call.
    """
    if not length:
        return ()
    if (spans := meta.get("weight_versions")) is None:
        return (VersionSpan(decode_version(meta["weight_version"]), 0, length),)
    return decode_spans(spans, length)


def group_body(group: ProcessGroup, timeout: float) -> Mapping[str, object]:
    """Return the body of POST /init_weights_update_group."""
    return {
        "master_address": group.address,
        "master_port": group.port,
        "rank_offset": group.rank_offset,
        "world_size": group.world_size,
        "group_name": group.name,
        "backend": group.backend,
        "timeout": timeout,  # read by the embedded engine; SGLang uses torch's default
    }


def distributed_body(bucket: ProcessGroupBucket) -> Mapping[str, object]:
    """Return the body of POST /update_weights_from_distributed."""
    return {
        "names": [t.name for t in bucket.tensors],
        "dtypes": [t.dtype for t in bucket.tensors],
        "shapes": [t.shape for t in bucket.tensors],
        "group_name": bucket.group_name,
    }


def decode_loads(body: Mapping[str, Any]) -> EngineLoad:
    """Decode the answer to GET /v1/loads, summed over all data-parallel ranks."""
    ranks = body["loads"]
    return EngineLoad(
        running_requests=sum(r["num_running_reqs"] for r in ranks),
        waiting_requests=sum(r["num_waiting_reqs"] for r in ranks),
        used_tokens=sum(r["num_used_tokens"] for r in ranks),
        max_tokens=sum(r["max_total_num_tokens"] for r in ranks),
        tokens_per_second=sum(r["gen_throughput"] for r in ranks),
    )
