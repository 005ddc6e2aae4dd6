"""What must hold for the samples of an episode, as the control routes write them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Made = tuple[tuple[int, ...], tuple[int, ...]]


def assert_trained_once(
    samples: Iterable[Mapping[str, Any]], asked: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> None:
    """Asserts that each answer of the engine is trained in one sample, behind exactly the prompt that it answered.

    asked: the prompts and the answers, as the engine had them.
    """
    trained = Counter(made for sample in samples for made in _trained(sample))
    assert trained == Counter((tuple(prompt), tuple(output)) for prompt, output in asked)


def _trained(sample: Mapping[str, Any]) -> Iterator[Made]:
    """Yields the tokens before each piece that is trained, and the piece."""
    ids, place = tuple(sample["token_ids"]), 0
    for masked, run in groupby(sample["loss_mask"]):
        start, place = place, place + len(list(run))
        if masked:
            yield ids[:start], ids[start:place]
