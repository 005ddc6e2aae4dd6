"""verl's sampling parameters as Millrace's, and Millrace's generations as verl's token outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from millrace.fleet.labels import Label
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams

RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}  # vLLM's names, which verl may pass
OURS = frozenset(one.name for one in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Limits:
    """The lengths of verl's rollout, in tokens.

    prompt, response: of a whole sample. context: of prompt and output together, for one call.
    """

    prompt: int
    response: int
    context: int

    def of(self, prompt_tokens: int, asked: int | None) -> int:
        """Return how many tokens a call may generate. Raises ValueError if the prompt leaves no room.

        asked: what the caller asks for. None is what is left of the sample, as in verl's own servers.
        """
        room = self.context - prompt_tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, and prompt and output together may have {self.context}; "
                "shorten the prompts (data.max_prompt_length), or raise actor_rollout_ref.rollout.max_model_len"
            )
        if asked is None:
            asked = min(self.response, self.prompt + self.response - prompt_tokens)
        return max(1, min(asked, room))


def request_of(
    request_id: str, prompt_ids: Sequence[int], params: Mapping[str, Any], limits: Limits, *, ignore_eos: bool
) -> GenerateRequest:
    """Return the request for a call of verl.

    Parameters that Millrace has no name for go to the engine in `extra.sampling_params`, and an engine that does not
    know one refuses the request. Raises ValueError if the prompt leaves no room for output.
    """
    rest = {RENAMED.get(name, name): value for name, value in params.items() if value is not None}
    rest.pop("logprobs", None)  # engines always return them
    ours = {name: rest.pop(name) for name in OURS & rest.keys()}
    if ours.get("top_k") == 0:  # off, in other engines
        ours["top_k"] = -1
    limit = limits.of(len(prompt_ids), ours.pop("max_new_tokens", None))
    sampling = SamplingParams(limit, **{"ignore_eos": ignore_eos, **ours})
    extra = {"sampling_params": rest} if rest else {}
    return GenerateRequest(tuple(prompt_ids), sampling, request_id=request_id, extra=extra)


def output_of(generation: Generation, labels: Mapping[int, Label], *, logprobs: bool) -> dict[str, Any]:
    """Return the fields of verl's TokenOutput for a generation.

    labels: the trainer's steps, by version. A generation without tokens has the newest.
    """
    versions = {span.version for span in generation.version_spans} or {max(labels, default=None)}
    known = [step for version, step in labels.items() if version in versions]
    return {
        "token_ids": list(generation.output_ids),
        "log_probs": generation.logprobs.tolist() if logprobs else None,
        "stop_reason": "aborted" if generation.finish_reason is FinishReason.ABORT else "completed",
        "extra_fields": {
            # verl takes one step for each part of a sample that it continues, so it is that of the oldest weights.
            "global_steps": min(known, default=None),
            "min_global_steps": min(known, default=None),
            "max_global_steps": max(known, default=None),
            "num_cached_tokens": generation.cached_tokens,
        },
    }
