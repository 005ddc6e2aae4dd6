"""The turns of Qwen3 as text: what a script reads in a prompt, and what it writes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

THOUGHT = "I think about it."


@dataclass(frozen=True, slots=True)
class Said:
    """A message in a prompt. role: `tool` for the answers of tools."""

    role: str
    text: str


def said_in(prompt: str) -> list[Said]:
    """Returns the messages of a prompt, without the empty one at its end."""
    found = []
    for part in prompt.split("<|im_start|>")[1:-1]:
        role, _, text = part.partition("\n")
        text = text.rstrip().removesuffix("<|im_end|>")
        if role == "user" and text.startswith("<tool_response>"):
            answers = text.split("<tool_response>")[1:]
            found += [Said("tool", answer.replace("</tool_response>", "").strip()) for answer in answers]
        else:
            found.append(Said(role, text))
    return found


def last_question(said: Sequence[Said]) -> str:
    """Returns the user's last message."""
    return next(one.text for one in reversed(said) if one.role == "user")


def results(said: Sequence[Said]) -> int:
    """Returns how many answers of tools there are."""
    return sum(one.role == "tool" for one in said)


def answered(said: Sequence[Said]) -> bool:
    """Returns whether a tool has answered since the user's last message."""
    return next(one.role for one in reversed(said) if one.role in ("user", "tool")) == "tool"


def call(name: str, **arguments: object) -> str:
    """Returns a tool call."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def turn(text: str, *calls: str, thought: str = THOUGHT) -> str:
    """Returns a turn of the model."""
    return f"<think>\n{thought}\n</think>\n\n" + "\n".join([text, *calls] if text else calls)
