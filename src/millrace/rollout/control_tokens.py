"""Text from outside stays text: a question or a tool's answer that spells `<|im_end|>` does not end a turn.

A tokenizer reads control tokens wherever a text spells them. So each one that is spelled in data is broken behind its
first character, by a mark that no text here contains, before the chat template writes the data. The rendered text is
then cut at the marks and encoded piece by piece. Text without control tokens gets no mark, and is encoded as usual.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_PLAIN = re.compile(r"\s+|</?[a-z][a-z0-9]*>")  # what some vocabularies add to save tokens: white space, HTML (Gemma)
_PRIVATE_USE = range(0xF0000, 0x110000)  # code points that mean nothing in Unicode


def control_tokens(tokenizer: PreTrainedTokenizerBase, markup: str) -> tuple[str, ...]:
    """The tokens that data must not become: special ones, those in `markup` (the chat template's source), and all other
    added tokens but white space and HTML. A token of a single character can't be broken and is left out."""
    added = [(token.content, token.special) for token in tokenizer.added_tokens_decoder.values()]
    control = [text for text, special in added if special or text in markup or not _PLAIN.fullmatch(text)]
    return tuple(text for text in control if len(text) > 1)


def is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether it is one of the vocabulary's special tokens, also one that has no role such as `eos_token`."""
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)


def unused_mark(texts: Iterable[str]) -> str:
    """A character that is in none of the texts."""
    used = set().union(*texts)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in used)


def break_control_tokens(text: str, control: Iterable[str], mark: str) -> str:
    """The text with `mark` behind the first character of each control token in it, also where two overlap. Half of a
    surrogate pair, which no tokenizer encodes, becomes a question mark."""
    text = text.encode(errors="replace").decode()
    if not (found := [token for token in control if token in text]):
        return text
    return re.sub(f"(?=(?:{'|'.join(map(re.escape, found))}))(.)", rf"\1{mark}", text, flags=re.DOTALL)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The token ids of a text. Control tokens in it are read as such."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str, mark: str, anchor: int) -> tuple[int, ...]:
    """The token ids of a text that is cut at the marks. `anchor` is a special token: a piece is encoded behind it,
    because some tokenizers put a space before the first word of a text."""
    first, *rest = text.split(mark)
    before = str(tokenizer.convert_ids_to_tokens(anchor))
    pieces = [encode(tokenizer, first), *(encode(tokenizer, before + piece)[1:] for piece in rest)]
    return tuple(token for piece in pieces for token in piece)
