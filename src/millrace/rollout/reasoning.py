"""Where a model's reasoning ends and its answer begins, by the markers that its own chat template writes."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from millrace.errors import DataError

Message = Mapping[str, object]
Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the generation prompt follows them

QUESTION = "millrace-question"  # stands for a user's text where only the form of a rendering counts
_THOUGHT, _ANSWER = "millrace-thought", "millrace-answer"
_LAST_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
_OPEN_TAG = re.compile(r"<([^<>/\s]+)>\s*$")
_KNOWN = (("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))  # Mistral, Gemma 4
_USUAL = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A model's markers. `opened`: its generation prompt ends with the opening one, so each turn begins inside the
    reasoning."""

    opening: str
    closing: str
    opened: bool = False

    def answer(self, text: str) -> str:
        """What a turn says outside its reasoning; nothing where the reasoning has no end.

        A closing marker that nothing opened ends reasoning too: the opening one was in the prompt.
        """
        if self.opened:
            text = self.opening + text
        rest = re.sub(f"{re.escape(self.opening)}.*?{re.escape(self.closing)}", "", text, flags=re.DOTALL)
        if self.opening in rest:
            return ""
        return rest.rpartition(self.closing)[2]

    def is_open(self, text: str) -> bool:
        """Whether a text ends inside reasoning."""
        return text.rfind(self.opening) > text.rfind(self.closing)


def reasoning_keys(thought: str) -> dict[str, str]:
    """A message's reasoning, under each of the names that chat templates read it from."""
    return dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)


def find_reasoning(render: Render, template: str, added_tokens: Collection[str]) -> Reasoning:
    """The markers of the model whose template's source is `template`.

    They are what the template writes around a thought. Where it writes none, they are the tag that its generation
    prompt ends with, or those of a known family, or the usual `<think>` and `</think>`.
    Raises DataError, by `render`, where the template refuses a user's message.
    """
    question = {"role": "user", "content": QUESTION}
    prompt = render([question], True)
    tail = prompt.rpartition(QUESTION)[2]
    answer = {"role": "assistant", "content": _ANSWER, **reasoning_keys(_THOUGHT)}
    try:
        before, _, behind = render([question, answer], False).partition(_THOUGHT)
    except DataError:  # it refuses a turn with reasoning, so it writes none
        before, behind = "", ""
    between, answered, _ = behind.partition(_ANSWER)
    opening, closing = _opening(before, prompt), between.strip()

    def known(marker: str) -> bool:
        return marker in template or marker in added_tokens

    if not (answered and opening and closing):
        tags = [(f"<{tag}>", f"</{tag}>") for tag in _OPEN_TAG.findall(tail)]
        opening, closing = next((pair for pair in (*tags, *_KNOWN) if known(pair[1])), _USUAL)
    markers = Reasoning(opening, closing)
    return Reasoning(opening, closing, opened=markers.is_open(tail))


def _opening(before: str, prompt: str) -> str:
    """The marker before a thought: what follows the generation prompt, or the prompt's own last tag."""
    if before.startswith(prompt) and (written := before.removeprefix(prompt).strip()):
        return written
    tag = _LAST_TAG.search(before)
    return tag[1] if tag else ""
