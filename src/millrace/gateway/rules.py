"""What a trainer fixes for an episode, and how the requests of its agent are sampled."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from millrace.config.gateway import GatewayConfig
from millrace.gateway.call import Wanted
from millrace.types import SamplingParams

T = TypeVar("T")

FIXED = ("temperature", "top_p", "top_k", "min_p")
# They would change the distribution that the trainer computes, or make the samples of a group equal.
LEFT_OUT = ("seed", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """What a trainer fixes for all requests of an episode. Its journal does not keep them.

    sampling: temperature, top_p, top_k and min_p, whatever the agent asks for. The agent's penalties, biases and seeds
    are dropped then. max_turns: generations of the whole episode. max_turn_tokens: output tokens of one request.
    max_sample_tokens: tokens of one conversation, prompt and output together. None leaves all of this to the agent, the
    settings and the engines.
    """

    sampling: SamplingParams | None = None
    max_turns: int | None = None
    max_turn_tokens: int | None = None
    max_sample_tokens: int | None = None


NO_RULES = EpisodeRules()


def sampling_of(
    wanted: Wanted,
    config: GatewayConfig,
    rules: EpisodeRules,
    room: int,
    *,
    ends: tuple[int, ...] = (),
    json_schema: str | None = None,
) -> SamplingParams:
    """Return the sampling parameters of a request.

    room: the most output tokens, at least 1. ends: the tokens that end a turn. json_schema: that the answer must match.
    """
    limits = (room, wanted.max_tokens, config.max_turn_tokens, rules.max_turn_tokens)
    most = max(min(one for one in limits if one is not None), 1)
    if rules.sampling is not None:
        return replace(
            rules.sampling, max_new_tokens=most, stop=wanted.stop, stop_token_ids=ends, json_schema=json_schema
        )
    return SamplingParams(
        max_new_tokens=most,
        temperature=_first(config.temperature, wanted.temperature, 1.0),
        top_p=_first(config.top_p, wanted.top_p, 1.0),
        top_k=_first(config.top_k, wanted.top_k, -1),
        min_p=_first(wanted.min_p, 0.0),
        seed=wanted.seed,
        stop=wanted.stop,
        stop_token_ids=ends,
        json_schema=json_schema,
        repetition_penalty=_first(wanted.repetition_penalty, 1.0),
        frequency_penalty=_first(wanted.frequency_penalty, 0.0),
        presence_penalty=_first(wanted.presence_penalty, 0.0),
        logit_bias=dict(wanted.logit_bias),
    )


def overruled(wanted: Wanted, rules: EpisodeRules) -> Iterator[str]:
    """Yield the names of the sampling parameters that an agent gave and does not get."""
    if rules.sampling is None:
        return
    for name in FIXED:
        if getattr(wanted, name) not in (None, getattr(rules.sampling, name)):
            yield name
    default = Wanted()
    for name in LEFT_OUT:
        if getattr(wanted, name) != getattr(default, name):
            yield name


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)
