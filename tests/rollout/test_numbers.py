"""A number in any usual notation is read exactly, and nothing else is read as a number."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.numbers import parse_number
from millrace.rollout.reward import final_number, rule_reward

SEPARATORS = ("", ",", "{,}", "\\,", "'", "\u2019", "_", "\u00a0", "\u2009", "\u202f")
AROUND = ("{}", " {} ", "**{}**", "__{}__", "*{}*", "`{}`", "${}$", "$${}$$", "\\({}\\)", "\\[\n{}\n\\]",
          "\\boxed{{{}}}", "\\text{{{}}}", "**\\boxed{{{}}}**", "$\\boxed{{{}}}$", "{}.", "**{}.**", "{}<|im_end|>",
          "<|begin_of_box|>{}<|end_of_box|>")  # fmt: skip
UNITS = ("{}", "${}", "\\${}", "€ {}", "{} €", "{}%", "{} %", "{}\\%", "{}\\,\\%")
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
Written = tuple[str, Fraction]


@st.composite
def wholes(draw: st.DrawFn) -> Written:
    number = draw(st.integers(0, 10**15))
    return f"{number:,}".replace(",", draw(st.sampled_from(SEPARATORS))), Fraction(number)


@st.composite
def decimals(draw: st.DrawFn) -> Written:
    text, whole = draw(wholes())
    digits = draw(st.text("0123456789", min_size=1, max_size=9))
    shown = "" if not whole and draw(st.booleans()) else text
    return f"{shown}.{digits}", whole + Fraction(int(digits), 10 ** len(digits))


@st.composite
def ratios(draw: st.DrawFn) -> Written:
    whole, top, bottom = draw(st.integers(0, 999)), draw(st.integers(1, 999)), draw(st.integers(1, 999))
    bar = draw(st.sampled_from(["{}/{}", "{} / {}", "{}\u2044{}", "\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}"]))
    if whole and top < bottom:
        space = "" if "frac" in bar else " "
        return f"{whole}{space}{bar.format(top, bottom)}", whole + Fraction(top, bottom)
    return bar.format(top, bottom), Fraction(top, bottom)


@st.composite
def powers(draw: st.DrawFn) -> Written:
    text, value = draw(decimals())
    power = draw(st.integers(-30, 30))
    way = draw(st.sampled_from(["{}e{}", "{}E{}", "{} \\times 10^{{{}}}", "{}\\cdot10^{}", "{} × 10^{}", "{}×10{}"]))
    shown = str(power).translate(SUPERSCRIPTS) if way == "{}×10{}" else str(power)
    return way.format(text, shown), value * Fraction(10) ** power


@st.composite
def numbers(draw: st.DrawFn) -> Written:
    """Draws a number in any usual notation, and its value."""
    text, value = draw(st.one_of(wholes(), decimals(), ratios(), powers()))
    text = draw(st.sampled_from(UNITS)).format(text)
    if sign := draw(st.sampled_from(["", "+", "-", "\u2212"])):
        text = sign + text
    return draw(st.sampled_from(AROUND)).format(text), value if sign in ("", "+") else -value


@given(numbers())
def test_any_usual_notation_is_read_exactly(written: Written) -> None:
    assert parse_number(written[0]) == written[1]
    assert final_number(f"So it is\n####{written[0]}") == written[1]


@given(numbers(), st.sampled_from([1, Fraction(1, 10**12)]), st.booleans())
def test_a_number_beside_the_answer_is_wrong(written: Written, off: Fraction, units: bool) -> None:
    text, value = written
    unit = " apples" if units else ""
    assert rule_reward(f"#### {text}{unit}", str(value)) == 1.0
    assert rule_reward(f"#### {text}{unit}", str(value + off)) == 0.0


@given(
    numbers(), numbers(), st.sampled_from([" or ", " and ", ", ", " ", "; ", "\n", " = ", "-", "+", ":", " to ", "~"])
)
def test_two_numbers_are_not_one_number(one: Written, other: Written, between: str) -> None:
    found = parse_number(f"{one[0]}{between}{other[0]}")
    # Only a whole number and a proper fraction after a space form one number (`1 1/2`), with signs too.
    assert found is None or (between in (" ", "\n") and found == one[1] + abs(other[1]) * (-1 if one[1] < 0 else 1))


@given(
    numbers(), st.sampled_from(["x", "k", "a", "?", "!", ",", ",5", " 5", ".5.", "...", "^2", "²", "!", ")", "/", "e"])
)
def test_text_after_a_number_makes_it_no_number(written: Written, behind: str) -> None:
    assert parse_number(written[0] + behind) is None


@pytest.mark.parametrize(
    "text",
    ["1,234,5", "3 or 4", "1.234,5", "12,34", "1,5", "0,123", "1.234.567", "1,234'567", "--5", "-$-3", "- 5", "+-5",
     "1/0", "1/2/3", "1 3/2", "3.5½", "½5", "\\frac125", "\\boxed{3}{4}", "{3}/{4}", "**3** or **4**", "5-3", "2^10",
     "2*3", "(5)", "1e", "e3", "10^{3", "1e999999999", "10^999999999", "9" * 10**6, "inf", "nan", "0x10", "٣", "²", "",
     "-", "$", ".", "**", "4<|x|>2", "1 234", "≈5", "<5", "5:30", "1\u202f23", "7k", "3\n/4\n5"],
)  # fmt: skip
def test_text_that_is_no_number_or_could_be_two_is_no_number(text: str) -> None:
    assert parse_number(text) is None
    assert final_number(f"#### {text}") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("84 apples", 84), ("18 dollars.", 18), ("**18 km**", 18), ("**18** km", 18), ("\\boxed{18\\text{ apples}}", 18),
     ("5 percent", 5), ("3 million", None), ("3 or", None), ("2 dozen", None), ("3 quarters", None), ("7 k", None),
     ("5 hundred", None), ("5 over", None), ("84 red apples", None), ("84 apples 3", None), ("7\nDone", None),
     ("7 over 2", None), ("3 or 4 apples", None), ("1,234,5 apples", None), ("about 5", None)],
)  # fmt: skip
def test_a_unit_is_one_word_that_is_no_part_of_a_number(text: str, value: int | None) -> None:
    assert final_number(f"#### {text}") == value


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "1e" + "9" * 10**6, "{" * 200, "1 " * 100, "*" * 10**6, "½" * 190, "1," * 95, " " * 10**6 + "x"],
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.thread_time()
    assert final_number(f"#### {text}") is None
    assert time.thread_time() - begun < 0.5
