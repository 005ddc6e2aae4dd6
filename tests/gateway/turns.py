"""Random turns of a model, and the ways in which agents write down what they replay."""

import json
from typing import Any

from hypothesis import strategies as st

from millrace.gateway.call import ToolUse, TurnText

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 5.0, 1e21]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    """A JSON object as models write it: with any white space, and escapes or none."""
    made = draw(st.dictionaries(text, values, max_size=4))
    return json.dumps(
        made,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 2])),
        separators=draw(st.sampled_from([None, (",", ":"), (" , ", " : ")])),
    )


@st.composite
def turns(draw: st.DrawFn) -> TurnText:
    """A turn with or without reasoning, content and calls."""
    names = draw(st.lists(st.sampled_from(["weather", "time", "shell"]), max_size=3))
    calls = tuple(ToolUse(f"call_{place}", name, draw(arguments())) for place, name in enumerate(names))
    return TurnText(draw(text), draw(text), calls)


def written_by_javascript(value: Any) -> Any:
    """Return a JSON value as it comes back from an agent that reads and writes it in JavaScript."""
    match value:
        case bool():
            return value
        case int() | float():
            number = float(value)
            return int(number) if number.is_integer() and abs(number) < 1e21 else number
        case list():
            return [written_by_javascript(one) for one in value]
        case dict():
            return {key: written_by_javascript(one) for key, one in reversed(value.items())}
    return value
