"""Requests that crash a server, or that it answers differently than the request says.

To add one, add a line with its name and a function that makes it from the engine's info and a valid request.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from millrace.types import EngineInfo, GenerateRequest

Maker = Callable[[EngineInfo, GenerateRequest], GenerateRequest]


def _tokens(*ids: int) -> Maker:
    return lambda _info, request: replace(request, input_ids=ids)


def _extra(**fields: object) -> Maker:
    return lambda _info, request: replace(request, extra=fields)


def _sampling_extra(**fields: object) -> Maker:
    return _extra(sampling_params=fields)


def _sampling(**fields: object) -> Maker:
    def make(_info: EngineInfo, request: GenerateRequest) -> GenerateRequest:
        return replace(request, sampling=replace(request.sampling, **fields))  # type: ignore[arg-type]

    return make


def _beyond(info: EngineInfo, request: GenerateRequest) -> GenerateRequest:
    return replace(request, input_ids=(*request.input_ids, info.vocab_size))


def _too_long(info: EngineInfo, request: GenerateRequest) -> GenerateRequest:
    return replace(request, input_ids=request.input_ids[:1] * (info.context_length + 1))


def _no_room(info: EngineInfo, request: GenerateRequest) -> GenerateRequest:
    return replace(request, input_ids=request.input_ids[:1] * info.context_length)


def _images(*images: bytes) -> Maker:
    return lambda _info, request: replace(request, images=images)


# Every engine must refuse these, since no answer could be right.
REFUSED: Mapping[str, Maker] = {
    "a token beyond the vocabulary": _beyond,
    "a token far beyond the vocabulary": _tokens(2**31 - 1),
    "a token of 64 bits": _tokens(2**63 - 1),
    "a negative token": _tokens(-1),
    "an empty prompt": _tokens(),
    "a prompt longer than the context": _too_long,
    "a prompt that fills the context": _no_room,
    "an image without a placeholder": _images(b"\x89PNG\r\n\x1a\n...IEND"),
    "no tokens to make": _sampling(max_new_tokens=0),
    "a negative temperature": _sampling(temperature=-1.0),
    "a top_p of 0": _sampling(temperature=1.0, top_p=0.0),
    "a top_p above 1": _sampling(temperature=1.0, top_p=1.5),
    "a top_k of 0": _sampling(temperature=1.0, top_k=0),
    "a min_p above 1": _sampling(temperature=1.0, min_p=1.5),
    "a huge bias": _sampling(logit_bias={1: 1e300}),
    "a bias for a token beyond the vocabulary": lambda info, request: replace(
        request, sampling=replace(request.sampling, logit_bias={info.vocab_size: 1.0})
    ),
    "no repetition penalty at all": _sampling(repetition_penalty=0.0),
    "a huge presence penalty": _sampling(presence_penalty=1e300),
    "an empty stop text": _sampling(stop=("",)),
    "fewer tokens than the least": _sampling(min_new_tokens=100),
    "more continued tokens than tokens": lambda _info, request: replace(request, continued_tokens=1000),
    "extra with a text beside the tokens": _extra(text="both"),
    "extra with embeddings beside the tokens": _extra(input_embeds=[[0.0]]),
    "extra with other tokens": _extra(input_ids=[1]),
    "extra with another name": _extra(rid="other"),
    "extra without logprobs": _extra(return_logprob=False),
    "extra that streams": _extra(stream=True),
    "extra with another number of tokens": _sampling_extra(max_new_tokens=1),
    "extra with several samples": _sampling_extra(n=2),
    "extra with sampling that is no mapping": _extra(sampling_params=3),
}

# An engine may refuse these or answer them completely. Each has crashed some server.
SURVIVED: Mapping[str, Maker] = {
    "a top_k of 32 bits": _sampling(temperature=1.0, top_k=2**31),
    "a temperature next to 0": _sampling(temperature=1e-30),
    "a huge temperature": _sampling(temperature=1e30),
    "a min_p of 1": _sampling(temperature=1.0, min_p=1.0),
    "a seed of 64 bits": _sampling(temperature=1.0, seed=2**63 - 1),
    "a negative seed": _sampling(temperature=1.0, seed=-1),
    "a stop token beyond the vocabulary": _sampling(ignore_eos=False, stop_token_ids=(2**31 - 1,)),
    "a name like a health check's": lambda _info, request: replace(
        request, request_id=f"HEALTH_CHECK{request.request_id}"
    ),
    "more top logprobs than tokens": lambda info, request: replace(
        request, extra={"top_logprobs_num": info.vocab_size + 1}
    ),
}
