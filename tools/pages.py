"""What a page of the docs says: its headings and their anchors on GitHub, its links, its blocks of code."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

FENCE = re.compile(r"^ *(`{3,}|~{3,})(.*)$")
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)? *$")
LINK = re.compile(r"(?P<before>!?\[(?P<text>[^\[\]]*)\]\()(?P<target>[^()\s]+)(?P<after>\))")
INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the number of its first line, counted from 1, what stands behind the fence, and its text."""

    line: int
    info: str
    text: str


def parts(text: str) -> Iterator[tuple[int, str] | Block]:
    """Yield the lines of a page with their numbers, and its fenced blocks."""
    fence, start, info, inside = "", 0, "", list[str]()
    for number, line in enumerate(text.split("\n"), 1):
        found = FENCE.match(line)
        if not fence and found:
            fence, start, info, inside = found[1], number, found[2].strip(), []
        elif fence and found and found[1].startswith(fence) and not found[2].strip():
            yield Block(start + 1, info, "\n".join(inside))
            fence = ""
        elif fence:
            inside.append(line)
        else:
            yield number, line
    if fence:
        raise ValueError(f"the block that starts in line {start} has no end")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [part for part in parts(text) if isinstance(part, Block)]


def anchors(text: str) -> dict[int, str]:
    """The anchor that GitHub gives to each heading, by its line. Headings of the same text get numbers."""
    seen: Counter[str] = Counter()
    found = {}
    for part in parts(text):
        if not isinstance(part, Block) and (heading := HEADING.match(part[1])):
            words = LINK.sub(lambda link: link["text"], heading[1])
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found[part[0]] = f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
            seen[anchor] += 1
    return found


def links(text: str) -> list[tuple[int, str]]:
    """The targets of a page's links and pictures, with their lines."""
    lines = [""] * (text.count("\n") + 2)
    for part in parts(text):
        if not isinstance(part, Block):
            lines[part[0]] = part[1]
    prose = INLINE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), "\n".join(lines))
    return [(prose.count("\n", 0, found.start("target")), found["target"]) for found in LINK.finditer(prose)]


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with its prose changed, and its blocks of code as they are."""
    lines = text.split("\n")
    inside = {line for block in blocks(text) for line in range(block.line - 1, block.line + block.text.count("\n") + 2)}
    done: list[str] = []
    prose: list[str] = []
    for number, line in enumerate(lines, 1):
        if number not in inside:
            prose.append(line)
            continue
        if prose:
            done.append(change("\n".join(prose)))
            prose = []
        done.append(line)
    return "\n".join([*done, *([change("\n".join(prose))] if prose else [])])
