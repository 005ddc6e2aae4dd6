"""A conversation in token ids. What is there is never encoded again; later turns only append (invariant 4).

The prompt is rendered once by the tokenizer's chat template. After that the model's own tokens stand as they were
sampled, and what lies between two of its turns (the tools' answers and the next generation prompt) is rendered behind a
stand-in turn and cut off there. The cut is at the end-of-turn token, which no tokenizer merges with its neighbours, so
the appended tokens are those that the template would have given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from millrace.errors import DataError

_STAND_IN = "millrace-stand-in-for-the-turn"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """One model's way to write a conversation. `end_of_turn` is the token that ends each of the model's turns."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int

    def prompt(
        self, question: str, tools: Sequence[Mapping[str, object]] = (), system_prompt: str | None = None
    ) -> tuple[int, ...]:
        """The token ids up to where the model's first turn begins. `tools` are their JSON schemas."""
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        text = _render(self.tokenizer, [*messages, {"role": "user", "content": question}], tools)
        return _encode(self.tokenizer, text)

    def continuation(self, tool_answers: Sequence[str], *, turn_ended: bool = True) -> tuple[int, ...]:
        """The token ids from behind the model's turn to where its next one begins. With `turn_ended` False the
        end-of-turn token comes first: the model stopped without it."""
        _, after_turn = _around_turn(self.tokenizer, tool_answers)
        ids = _encode(self.tokenizer, after_turn)
        return ids[1:] if turn_ended else ids

    def turn(self, text: str) -> tuple[int, ...]:
        """A whole turn of the model as its tokens, the end-of-turn token included: what supervised steps teach."""
        return (*_encode(self.tokenizer, text), self.end_of_turn)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


def load_chat_format(path: str) -> ChatFormat:
    """Reads the tokenizer and the chat template of a model folder (or Hub name) and checks that turns can be appended.

    Raises DataError where either is missing, or where the template has no form for a tool's answer, rewrites earlier
    turns, or ends a turn with no special token.
    """
    return check_chat_format(_load_tokenizer(path), path)


def load_prompt_format(path: str) -> ChatFormat:
    """The same for a model that makes one turn and is told nothing of tools: its template needs no form for them.

    Raises DataError where tokenizer or template is missing, or no token ends a turn.
    """
    tokenizer = _load_tokenizer(path)
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(f"{path}: the tokenizer names no end-of-sequence token, which ends a turn")
    return ChatFormat(tokenizer, tokenizer.eos_token_id)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if _means_a_folder(path) and not Path(path).is_dir():
        raise DataError(f"{path}: there is no such model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(f"{path}: no tokenizer could be loaded from it ({_first_line(error)})") from error
    if not _encode(tokenizer, "question"):  # transformers makes an empty tokenizer where only a config.json is found
        raise DataError(f"{path}: it has no tokenizer; put the model's tokenizer.json into the folder")
    if tokenizer.chat_template is None:
        raise DataError(f"{path}: the tokenizer has no chat template; put a chat_template.jinja into the folder")
    return tokenizer


def check_chat_format(tokenizer: PreTrainedTokenizerBase, name: str) -> ChatFormat:
    """Wraps a tokenizer after checking its template. Raises DataError, whose message starts with `name`."""
    try:
        before, after = _around_turn(tokenizer, ["17"])
        other_before, _ = _around_turn(tokenizer, ["another answer", "and one more"])
    except jinja2.TemplateError as error:
        raise DataError(f"{name}: the chat template can't write a tool's answer ({_first_line(error)})") from error
    if not after or "17" not in after:
        raise DataError(f"{name}: the chat template does not write a tool's answer behind the model's turn")
    if before != other_before:
        raise DataError(f"{name}: the chat template rewrites earlier turns when a tool has answered")
    after_ids = _encode(tokenizer, after)
    if after_ids[0] not in tokenizer.all_special_ids:
        raise DataError(f"{name}: the chat template ends the model's turn with no special token")
    if _encode(tokenizer, before + after) != _encode(tokenizer, before) + after_ids:
        raise DataError(f"{name}: the tokens of a turn change with what follows it; its turns can't be appended to")
    return ChatFormat(tokenizer, after_ids[0])


def _around_turn(tokenizer: PreTrainedTokenizerBase, tool_answers: Sequence[str]) -> tuple[str, str]:
    """A rendered conversation, cut behind the text of the model's turn. The second part is empty where it was lost."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _STAND_IN}]
    messages += [{"role": "tool", "content": answer} for answer in tool_answers]
    before, turn, after = _render(tokenizer, messages).partition(_STAND_IN)
    return before + turn, after


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], tools: Sequence[Mapping[str, object]] = ()
) -> str:
    schemas = [dict(tool) for tool in tools] or None
    return str(tokenizer.apply_chat_template(messages, tools=schemas, add_generation_prompt=True, tokenize=False))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _means_a_folder(path: str) -> bool:
    """Whether it can't be a name on the Hub, which is `name` or `owner/name`; so that no one asks the Hub for it."""
    return path.startswith((".", "~", "/")) or path.count("/") > 1


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
