"""The separation of a model's reasoning from its answer, by the markers that its chat template writes."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from millrace.errors import DataError
from millrace.rollout.sample import Message

Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the generation prompt follows them

QUESTION = "millrace-question"  # a placeholder for a user's text
_THOUGHT, _ANSWER = "millrace-thought", "millrace-answer"
_LAST_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
_OPEN_TAG = re.compile(r"<([^<>/\s]+)>\s*$")
_KNOWN = (("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))  # Mistral, Gemma 4
_USUAL = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The markers around a model's reasoning.

    opened: whether the generation prompt ends with the opening marker, so that each turn begins inside the reasoning.
    """

    opening: str
    closing: str
    opened: bool = False

    def answer(self, text: str) -> str:
        """Return the text of a turn without its reasoning; empty if the reasoning has no end.

        A closing marker without an opening one ends reasoning too: the opening marker was in the prompt.
        """
        return self.split(text)[1]

    def split(self, text: str) -> tuple[str, str]:
        """Return the reasoning of a turn, without the markers, and the rest as `answer` does."""
        if self.opened:
            text = self.opening + text
        block = f"{re.escape(self.opening)}(.*?){re.escape(self.closing)}"
        thoughts, rest = re.findall(block, text, re.DOTALL), re.sub(block, "", text, flags=re.DOTALL)
        if self.opening in rest:
            return "".join([*thoughts, rest.partition(self.opening)[2]]), ""
        thought, _, rest = rest.rpartition(self.closing)
        return "".join([*thoughts, thought]), rest

    def is_open(self, text: str) -> bool:
        """Return whether a text ends inside reasoning."""
        return text.rfind(self.opening) > text.rfind(self.closing)


def reasoning_keys(thought: str) -> dict[str, str]:
    """Return a message's reasoning under each of the keys that chat templates use for it."""
    return dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)


def find_reasoning(render: Render, template: str, added_tokens: Collection[str]) -> Reasoning:
    """Return the reasoning markers of a model.

    The markers are the texts that the template writes around a message's reasoning. If it writes none, they are the tag
    at the end of its generation prompt, or those of a known model family, or `<think>` and `</think>`.

    render: renders messages. template: the template's source. added_tokens: of the tokenizer. Raises DataError if the
    template refuses a user's message.
    """
    question = {"role": "user", "content": QUESTION}
    prompt = render([question], True)
    tail = prompt.rpartition(QUESTION)[2]
    answer = {"role": "assistant", "content": _ANSWER, **reasoning_keys(_THOUGHT)}
    try:
        before, _, after = render([question, answer], False).partition(_THOUGHT)
    except DataError:  # the template refuses a turn with reasoning, so it writes none
        before, after = "", ""
    between, answered, _ = after.partition(_ANSWER)
    opening, closing = _opening(before, prompt), between.strip()

    def known(marker: str) -> bool:
        return marker in template or marker in added_tokens

    if not (answered and opening and closing):
        tags = [(f"<{tag}>", f"</{tag}>") for tag in _OPEN_TAG.findall(tail)]
        opening, closing = next((pair for pair in (*tags, *_KNOWN) if known(pair[1])), _USUAL)
    markers = Reasoning(opening, closing)
    return Reasoning(opening, closing, opened=markers.is_open(tail))


def _opening(before: str, prompt: str) -> str:
    """Return the marker before a thought: the text after the generation prompt, or the prompt's last tag."""
    if before.startswith(prompt) and (written := before.removeprefix(prompt).strip()):
        return written
    tag = _LAST_TAG.search(before)
    return tag[1] if tag else ""
