"""What a judge is asked, and how its grade is read: the default, and what can't be right."""

import re
from string import Formatter

FIELDS = ("question", "answer", "reference")
TEMPLATE = """\
Question:
{question}

Reference answer: {reference}

Answer to be graded:
{answer}

How good is this answer? Say in a few sentences what is right and what is wrong about it, and end with a line \
"Grade: N", where N is a number from 0 (worthless) to 10 (nothing to improve).
"""
# The group takes all that belongs to the number (`7/10`, `7 or 8`, `1,5`), so that no part of it is read as the grade.
VERDICT = r"(?i)grade[\s:=*_`\"'(]*+((?:\S*\d\S*)(?:\s+(?:or|to|and a)\s+\S*\d\S*)?)"


def check_template(template: str) -> str:
    """Raises ValueError for one that can't be filled in."""
    try:
        named = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"it is no format string ({error}); write {{{{ and }}}} for plain braces") from None
    if unknown := sorted(named - set(FIELDS)):
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ValueError(f"it names {{{unknown[0]}}}; it may name {known}, and {{{{ }}}} are plain braces")
    if "answer" not in named:
        raise ValueError("it does not name {answer}, so every answer would get the same grade")
    try:
        template.format(**dict.fromkeys(FIELDS, ""))
    except (ValueError, LookupError) as error:
        raise ValueError(f"it can't be filled in: {error}") from None
    return template


def check_verdict(pattern: str) -> str:
    """Raises ValueError for one that finds no grade."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"it has {groups} groups; give it one, around the number ((?:...) counts as none)")
    return pattern
