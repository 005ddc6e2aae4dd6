"""Control tokens in external text stay text: a question or tool answer with `<|im_end|>` in it does not end a turn.

A tokenizer recognises control tokens anywhere in a text. So, before the chat template writes external text, each
control token in it is split after its first character by a mark that does not occur in the text. The rendered text is
cut at the marks and encoded piece by piece. Text without control tokens gets no marks and is encoded as usual.
"""

import re
from collections.abc import Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_PLAIN = re.compile(r"\s+|</?[a-z][a-z0-9]*>")  # added tokens for white space and HTML (Gemma), which are harmless
_PRIVATE_USE = range(0xF0000, 0x110000)  # Unicode code points without a meaning


def control_tokens(tokenizer: PreTrainedTokenizerBase, markup: str) -> tuple[str, ...]:
    """Return the texts of the tokens that external text must not turn into.

    These are the special tokens, the added tokens in `markup` (the chat template's source), and all other added tokens
    except white space and HTML. Tokens of a single character can't be split and are left out.
    """
    added = [(token.content, token.special) for token in tokenizer.added_tokens_decoder.values()]
    control = [text for text, special in added if special or text in markup or not _PLAIN.fullmatch(text)]
    return tuple(text for text in control if len(text) > 1)


def is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Return whether a token is special, with or without a role such as `eos_token`."""
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)


def unused_mark(texts: Iterable[str]) -> str:
    """Return a character that is in none of the texts."""
    used = set().union(*texts)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in used)


def break_control_tokens(text: str, control: Iterable[str], mark: str) -> str:
    """Return the text with `mark` after the first character of each control token in it. Tokens may overlap.

    Lone surrogates, which no tokenizer encodes, become question marks.
    """
    text = text.encode(errors="replace").decode()
    if not (present := [token for token in control if token in text]):
        return text
    return re.sub(f"(?=(?:{'|'.join(map(re.escape, present))}))(.)", rf"\1{mark}", text, flags=re.DOTALL)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the token ids of a text. Control tokens in it become control tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer) and not (backend.truncation or backend.padding or backend.encode_special_tokens):
        return tuple(
            backend.encode(text, add_special_tokens=False).ids
        )  # in this thread: a pool costs more than it saves
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str, mark: str, anchor: int) -> tuple[int, ...]:
    """Return the token ids of a text that is cut at the marks.

    anchor: a special token. Pieces are encoded after it, because some tokenizers put a space before the first word.
    """
    first, *rest = text.split(mark)
    before = str(tokenizer.convert_ids_to_tokens(anchor))
    pieces = [encode(tokenizer, first), *(encode(tokenizer, before + piece)[1:] for piece in rest)]
    return tuple(token for piece in pieces for token in piece)
