"""What a server's answer lacks when a request continues tokens of earlier calls. The server takes them as prompt.

Its penalties count the output of one call only. It looks for stop texts in that output only, and its text begins there.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from millrace.engines.stock.tokens import MOST_BIAS
from millrace.engines.stop_texts import CONTEXT_TOKENS, first_stop
from millrace.types import FinishReason, GenerateRequest, Generation

Detokenize = Callable[[Sequence[int]], Awaitable[str]]


def with_carried_penalties(request: GenerateRequest, *, counts_prompt: bool) -> tuple[GenerateRequest, bool]:
    """Return the request for the server, and whether its penalties count the continued tokens.

    A frequency penalty of these tokens becomes a bias. A presence penalty can't: the server would subtract it again at
    the next occurrence. counts_prompt: whether the server's repetition penalty counts the prompt.
    """
    sampling = request.sampling
    if not request.continued_tokens or not sampling.penalizes:
        return request, True
    repeats = sampling.repetition_penalty != 1.0
    exact = not sampling.presence_penalty and (not repeats or (counts_prompt and not sampling.frequency_penalty))
    if not sampling.frequency_penalty:
        return request, exact
    bias = dict(sampling.logit_bias)
    for token, times in Counter(request.input_ids[-request.continued_tokens :]).items():
        carried = bias.get(token, 0.0) - times * sampling.frequency_penalty
        bias[token] = min(max(carried, -MOST_BIAS), MOST_BIAS)
    return replace(request, sampling=replace(sampling, logit_bias=bias)), exact


async def with_text(request: GenerateRequest, made: Generation, detokenize: Detokenize) -> Generation:
    """Return the generation with its text, and cut after the token that completes a stop text.

    detokenize: returns the text of tokens, special tokens included.
    """
    split = len(request.input_ids) - request.continued_tokens
    context, earlier = request.input_ids[max(split - CONTEXT_TOKENS, 0) : split], request.input_ids[split:]
    before = await detokenize(context) if context else ""

    async def text_of(count: int) -> str:
        tokens = earlier + made.output_ids[:count]
        if not tokens:
            return ""
        whole = await detokenize(context + tokens)
        return whole.removeprefix(before) if whole.startswith(before) else await detokenize(tokens)

    stop, count = request.sampling.stop, len(made.output_ids)
    text = await text_of(count)
    if first_stop(text, stop) is None:
        ended_by_token = made.finish_reason is FinishReason.STOP and count > 0
        return replace(made, text=await text_of(count - 1) if ended_by_token else text)
    low, high = 0, count  # the fewest tokens whose text has a stop text are more than low, and at most high
    probe = count - 1  # the server has mostly found it
    while high - low > 1:
        shorter = await text_of(probe)
        if first_stop(shorter, stop) is None:
            low = probe
        else:
            high, text = probe, shorter
        probe = (low + high) // 2
    return replace(cut(made, high), text=text[: first_stop(text, stop)], finish_reason=FinishReason.STOP)


def cut(made: Generation, count: int) -> Generation:
    """Return the generation with its first `count` tokens."""
    experts = made.routed_experts
    return replace(
        made,
        output_ids=made.output_ids[:count],
        logprobs=made.logprobs[:count],
        version_spans=tuple(replace(s, end=min(s.end, count)) for s in made.version_spans if s.start < count),
        penalty_restarts=tuple(place for place in made.penalty_restarts if place < count),
        routed_experts=None if experts is None else experts[: len(experts) - (len(made.output_ids) - count)],
    )
