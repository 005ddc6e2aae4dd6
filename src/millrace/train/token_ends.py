"""Where each token of a sequence ends in the sequence's text."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from millrace.rollout.chat import ChatFormat

Decode = Callable[[Sequence[int]], str]

PARTS = 4  # tokens that a character can need: its bytes in UTF-8
REMEMBERED = 2**18  # pieces of tokens, as many as the largest vocabularies have


class TokenEnds:
    """Finds the ends of tokens in a text, for one tokenizer.

    Most tokens always have the same text after another token, which is remembered. The others are decoded with those
    before them: parts of characters, the first token, whose space some tokenizers leave out, and tokens whose text
    depends on those beside them.
    """

    def __init__(self, decode: Decode, before: int) -> None:
        """decode: returns the text of token ids. before: a token of which the text is the same wherever it stands."""
        self._decode = decode
        alone = len(decode([before]))
        self._piece = lru_cache(REMEMBERED)(lambda token: decode([before, token])[alone:])

    @classmethod
    def of(cls, chat: ChatFormat) -> "TokenEnds":
        """Return the one for a chat format's tokenizer, which another thread may use at the same time."""
        backend = getattr(chat.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return cls(chat.decode, chat.tokenizer.encode("question", add_special_tokens=False)[-1])
        own = Tokenizer.from_str(backend.to_str())  # one that two threads use at once may raise
        before = own.encode("question", add_special_tokens=False).ids[-1]
        return cls(lambda token_ids: str(own.decode(list(token_ids), skip_special_tokens=False)), before)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._decode(token_ids)

    def ends(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Return the end of each token in the text, in characters.

        A token that ends within a character has the end of the text before it. text: of all the tokens.
        """
        ends: list[int] = []
        first = whole = end = 0  # the tokens before `whole` end where `end` is; those from `first` on are one piece
        for place, token in enumerate(token_ids):
            piece = self._piece(token) if place and whole == place else ""
            if piece and "\ufffd" not in piece and text.startswith(piece, end):
                first, whole, end = place, place + 1, end + len(piece)
            else:
                rest = self._rest(token_ids, first, whole, place)
                if rest is not None and text.startswith(rest, end):
                    first, whole, end = (whole if rest else first), place + 1, end + len(rest)
                elif place + 1 - whole >= PARTS:
                    window = self._decode(token_ids[: place + 1])
                    if text.startswith(window):
                        first, whole, end = place, place + 1, max(end, len(window))
            ends.append(end)
        if ends:
            ends[-1] = len(text)
        return ends

    def _rest(self, token_ids: Sequence[int], first: int, whole: int, place: int) -> str | None:
        """Return what the tokens from `whole` to `place` add to the text of those from `first` on; None if they change
        it."""
        before = self._decode(token_ids[first:whole]) if whole else ""
        text = self._decode(token_ids[first : place + 1])
        return text[len(before) :] if text.startswith(before) else None
