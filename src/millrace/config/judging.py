"""The default prompt and grade pattern of a judge, and the validators for custom ones."""

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
# The group matches the whole expression (`7/10`, `7 or 8`, `1,5`), so that a part of it is never read as the grade.
VERDICT = r"(?i)grade[\s:=*_`\"'(]*+((?:\S*\d\S*)(?:\s+(?:or|to|and a)\s+\S*\d\S*)?)"


def check_template(template: str) -> str:
    """Return the judge's prompt template. Raises ValueError if it can't be filled in or does not name {answer}."""
    try:
        named = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"it is not a format string ({error}); write {{{{ and }}}} for plain braces") from None
    if unknown := sorted(named - set(FIELDS)):
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ValueError(f"it names {{{unknown[0]}}}; it may name {known}; write {{{{ and }}}} for plain braces")
    if "answer" not in named:
        raise ValueError("it does not name {answer}, so every answer would get the same grade")
    try:
        template.format(**dict.fromkeys(FIELDS, ""))
    except (ValueError, LookupError) as error:
        raise ValueError(f"it can't be filled in: {error}") from None
    return template


def check_verdict(pattern: str) -> str:
    """Return the pattern of the grade. Raises ValueError unless it is a regular expression with exactly one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"it has {groups} groups; it needs one, around the number ((?:...) does not count)")
    return pattern
