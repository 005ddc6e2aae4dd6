"""Where tokens end in their text: for byte-level BPE, for SentencePiece's byte fallback, and for words in pieces."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from millrace.train.tiny import make_tiny_tokenizer
from millrace.train.token_ends import TokenEnds
from tests.rollout.real_models import real_models

TEXT = "Ein Süßer 你好 👩‍🔬 the  cat,\n\tthe <|im_end|> e\u0301 \ufffd !"


@cache
def byte_level() -> Tokenizer:
    return Tokenizer.from_str(make_tiny_tokenizer().backend_tokenizer.to_str())


@cache
def sentence_piece() -> Tokenizer:
    """As Llama 2's and Gemma's: spaces are `▁`, the first one is left out, and unknown characters are bytes."""
    words = ["<unk>", "▁", "▁▁", "▁the", "the", "▁a", "a", "cat", ",", "!", "ü", "e", "\u0301", "E", "i", "n"]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = models.BPE({word: i for i, word in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """As BERT's: words have spaces between them, but not before a comma."""
    words = ["[UNK]", "a", "the", "##e", "##s", ",", ".", "cat", "!", "do", "n't", "'", "##ü"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def ends_in(tokenizer: Tokenizer) -> TokenEnds:
    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

    return TokenEnds(decode, tokenizer.encode("a", add_special_tokens=False).ids[-1])


def check(tokenizer: Tokenizer, token_ids: Sequence[int], *, exact: bool) -> None:
    found = ends_in(tokenizer)
    text = found.text(token_ids)
    ends = found.ends(token_ids, text)
    assert len(ends) == len(token_ids)
    assert ends == sorted(ends)
    starts = [0, *ends]
    assert "".join(text[start:end] for start, end in zip(starts, ends, strict=False)) == text
    for place, end in enumerate(ends):
        so_far = found.text(token_ids[: place + 1])
        if exact and text.startswith(so_far):
            assert end == len(so_far), (place, token_ids)
        else:
            assert end <= len(text)


def tokens_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, and those of texts, which have many whole characters."""
    anything = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40)
    text = st.text(st.sampled_from(TEXT), max_size=20) | st.just(TEXT)
    written = text.map(lambda one: list(tokenizer.encode(one, add_special_tokens=False).ids))
    return st.lists(anything | written, max_size=4).map(lambda parts: [token for part in parts for token in part])


@cache
def real(name: str) -> Tokenizer:
    """Qwen's or Mistral's tokenizer, without control tokens."""
    return Tokenizer.from_file(str(real_models() / f"{name}.json"))


@pytest.mark.parametrize("name", ["tiny", "qwen", "mistral"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_byte_level_tokens_end_where_the_text_of_those_before_ends(name: str, data: st.DataObject) -> None:
    tokenizer = byte_level() if name == "tiny" else real(name)
    check(tokenizer, data.draw(tokens_of(tokenizer)), exact=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_of_sentence_piece_join_to_the_text(data: st.DataObject) -> None:
    check(sentence_piece(), data.draw(tokens_of(sentence_piece())), exact=False)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(TEXT.replace("\ufffd", "")), max_size=40))
def test_what_sentence_piece_writes_ends_exactly(text: str) -> None:
    check(sentence_piece(), sentence_piece().encode(text, add_special_tokens=False).ids, exact=True)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_of_words_join_to_the_text(data: st.DataObject) -> None:
    check(word_piece(), data.draw(tokens_of(word_piece())), exact=False)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()], ids=["byte level", "sentence piece"])
def test_a_token_within_a_character_has_the_end_of_the_text_before_it(tokenizer: Tokenizer) -> None:
    found = ends_in(tokenizer)
    ids = tokenizer.encode("a👩a", add_special_tokens=False).ids
    text = found.text(ids)
    ends = found.ends(ids, text)
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert [piece for piece in pieces if piece] == ["a", "👩", "a"]
    assert pieces.index("👩") == len(pieces) - 2  # all bytes but its last are empty


@pytest.mark.parametrize("garbage", [False, True])
def test_the_work_grows_with_the_length_and_not_with_its_square(garbage: bool) -> None:
    tokenizer, draw = byte_level(), random.Random(0)
    ids = tokenizer.encode(TEXT * 4, add_special_tokens=False).ids
    if garbage:
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(100)]
    decoded = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def work(times: int) -> int:
        nonlocal decoded
        decoded = 0
        TokenEnds(decode, tokenizer.encode("a").ids[-1]).ends(ids * times, tokenizer.decode(ids * times, False))
        return decoded

    assert work(200) < 12 * work(20)
