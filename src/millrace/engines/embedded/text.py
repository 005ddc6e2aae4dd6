"""The text of a request's output, token by token, and the stop texts in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.engines.stop_texts import CONTEXT_TOKENS, first_stop
from millrace.errors import DataError

TOKENIZER = "tokenizer.json"
UNFINISHED = "\ufffd"  # the end of a text whose last character lacks bytes, which the next token brings


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model's folder. Raises DataError if it has none that can be read."""
    from tokenizers import Tokenizer  # here: only requests with stop texts need it

    path = model / TOKENIZER
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain exceptions
        raise DataError(f"{path} can't be read, and stop texts need it: {error}") from error


class StopTexts:
    """Finds stop texts in one request's output. The continued tokens of earlier calls are part of the output.

    text: the output's text so far, without the last character while it lacks bytes, and without a stop text that was
    found and what followed it.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        continued: Sequence[int],
        stop: Sequence[str],
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer, self._stop, self._skip = tokenizer, stop, skip_special_tokens
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._before, self._read = 0, len(self._tokens)  # the text of the tokens up to `_read` is known
        self.text = ""
        for token in continued:
            self._extend(token)

    def add(self, token: int) -> str | None:
        """Append a token. Return the stop text that its text completes."""
        self._extend(token)
        place = first_stop(self.text, self._stop)
        if place is None:
            return None
        found = next(one for one in self._stop if self.text.startswith(one, place))
        self.text = self.text[:place]
        return found

    def _extend(self, token: int) -> None:
        self._tokens.append(token)
        known = self._decode(self._tokens[self._before : self._read])
        longer = self._decode(self._tokens[self._before :])
        if len(longer) > len(known) and not longer.endswith(UNFINISHED):
            self.text += longer[len(known) :]
            self._before, self._read = self._read, len(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
        return text
