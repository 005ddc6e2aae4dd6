"""SGLang's native wire format for generate, as values of Millrace. Pure: what goes out, and what the answer means."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from millrace.types import FinishReason, GenerateRequest, Generation, Segment


def encode_generate(request: GenerateRequest, *, stream: bool = False) -> dict[str, object]:
    """The body of POST /generate."""
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
    return {
        "rid": wire_id(request.request_id),
        "input_ids": request.input_ids,
        "sampling_params": params,
        "return_logprob": True,
        "stream": stream,
        **request.extra,
    }


def wire_id(request_id: str) -> str:
    """What the server calls a request. It aborts every request whose name begins like the given one; with an end mark
    `r1` is no beginning of `r10`."""
    return f"{request_id}#"


def decode_generate(request_id: str, body: Mapping[str, Any]) -> Generation:
    """The answer to POST /generate, or one cumulative chunk of its stream.

    Raises KeyError, TypeError or ValueError where the answer has not the shape that SGLang documents.
    """
    meta = body["meta_info"]
    output_ids = tuple(body["output_ids"])
    entries = meta.get("output_token_logprobs") or ()
    logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
    if len(logprobs) != len(output_ids):
        raise ValueError(f"{len(output_ids)} tokens came with {len(logprobs)} logprobs")
    finish = meta["finish_reason"]
    return Generation(
        request_id=request_id,
        output_ids=output_ids,
        logprobs=logprobs,
        finish_reason=FinishReason(finish["type"]) if finish else FinishReason.ABORT,
        segments=decode_segments(meta, len(output_ids)),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
    )


def decode_segments(meta: Mapping[str, Any], length: int) -> tuple[Segment, ...]:
    """Which version made which tokens, from `weight_versions`; they must cover the output without a gap."""
    segments = tuple(
        Segment(decode_version(span["version"]), span["start"], span["end"]) for span in meta["weight_versions"]
    )
    end = 0
    for segment in segments:
        if segment.start != end or segment.end <= segment.start:
            raise ValueError(f"the version spans {meta['weight_versions']} have a gap or an empty span")
        end = segment.end
    if end != length:
        raise ValueError(f"the version spans end at {end}, the output at {length}")
    return segments


def decode_version(text: str) -> int | None:
    """A version that Millrace published is a number; a server's own label (`default`, `unknown`) is none."""
    return int(text) if text.isascii() and text.isdigit() else None
