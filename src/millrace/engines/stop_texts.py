"""Stop texts in the text of an output. Pure."""

from collections.abc import Sequence

CONTEXT_TOKENS = 5  # of the prompt before the output: a tokenizer may drop a space before the first token


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of the stop texts begins, or None if none is in the text."""
    return min((place for one in stop if (place := text.find(one)) >= 0), default=None)
