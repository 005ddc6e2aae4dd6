"""The text of an output is the tokenizer's, and ends before the first stop text, however the tokens cut it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.embedded.text import StopTexts, load_tokenizer
from millrace.errors import DataError

WORDS = ["Grüße aus 東京 ", "🙂🙃 ", "END", " of it\n", "\x00", "naïve", "  "]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def found(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], cut: int, stop: Sequence[str]
) -> tuple[str, int]:
    """The text, and how many tokens it took to end, with the first `cut` tokens from an earlier call."""
    texts = StopTexts(tokenizer, prompt, tokens[:cut], stop, skip_special_tokens=False)
    for count, token in enumerate(tokens[cut:], cut + 1):
        if texts.add(token) is not None:
            return texts.text, count
    return texts.text, len(tokens)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.integers(0, 60), st.data())
def test_it_ends_before_the_first_stop_text(tokenizer: Any, words: list[str], cut: int, data: st.DataObject) -> None:
    text = "".join(words)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    prompt = tokenizer.encode("The start.", add_special_tokens=False).ids
    assert found(tokenizer, prompt, tokens, 0, ["never there"]) == (text, len(tokens))
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = [text[begin : data.draw(st.integers(begin + 1, min(begin + 4, len(text))))], "never there"]
    place = text.index(stop[0])
    ended, count = found(tokenizer, prompt, tokens, 0, stop)
    assert ended == text[:place]
    assert stop[0] in tokenizer.decode(tokens[:count], skip_special_tokens=False)
    if cut < count:  # the earlier call did not complete it
        assert found(tokenizer, prompt, tokens, cut, stop) == (ended, count)


def test_special_tokens_are_text_or_not(tokenizer: Any, tiny_model: Path) -> None:
    special = tokenizer.token_to_id("<|im_end|>")
    tokens = [*tokenizer.encode("so", add_special_tokens=False).ids, special]
    for skip, text in ((True, "so"), (False, "so<|im_end|>")):
        texts = StopTexts(tokenizer, [], [], ["never"], skip_special_tokens=skip)
        assert [texts.add(token) for token in tokens] == [None] * len(tokens)
        assert texts.text == text


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json can't be read, and stop texts need it"):
        load_tokenizer(tmp_path)
