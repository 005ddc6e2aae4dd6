r"""Parse one number in any common notation, as an exact fraction. Pure functions.

math-verify 0.9 does not fit, because it searches a text for a number. It reads `1,234,5` as 1234, `3 or 4` as 4, `1e3`
as 1 and `12,34` as 12.34. It does not know the minus sign U+2212, takes 0.6 to 90 ms a text, needs sympy (90 MB), and
raises outside of the main thread, because it limits its time by a signal. For a reward the whole text must be one
number, and parsing must take microseconds on the event loop.
"""

import re
from fractions import Fraction

LONGEST = 200  # characters. No common notation is longer, so a text of a million digits is refused at once.

# Pairs that may surround a number without changing it.
_PAIRS = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"),
    (r"\[", r"\]"), (r"\boxed{", "}"), (r"\fbox{", "}"), (r"\text{", "}"), (r"\textbf{", "}"), (r"\mathbf{", "}"),
    (r"\mathrm{", "}"), ("{", "}"),
)  # fmt: skip
_SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>|</s>|<eos>|<end_of_turn>")

# Groups of three digits with the same separator. A plain space is not a separator: `3 400` may be two numbers.
_GROUPED = re.compile(
    r"(?<![0-9.,])[1-9][0-9]{0,2}(?P<mark>,|\{,\}|\\,|['\u2019_\u00a0\u2009\u202f])[0-9]{3}(?:(?P=mark)[0-9]{3})*"
    r"(?!(?P=mark)?[0-9])"
)
_SEPARATOR = re.compile("[^0-9]+")

_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_FRACTION = re.compile(
    r"(?P<whole>[0-9]\s*)?(?:\\[dt]?frac\s*(?:\{(?P<top>[+-]?[0-9]+)\}\s*\{(?P<bottom>[0-9]+)\}|(?P<short>[0-9]{2}))"
    rf"|(?P<vulgar>[{''.join(_VULGAR)}]))(?![0-9])"
)

_SIGNED = re.compile(r"(?P<sign>[+-])?(?:(?:\\?\$|US\$|[€£¥₹])\s*)?(?P<inner>[+-])?(?P<rest>[^+\s-].*)")
_SUFFIX = re.compile(r"(?:\s|\\[ ,;]|~)*(?:\\?[%$]|[€£¥₹])\Z")
_DECIMAL = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_EXPONENT = r"[+-]?[0-9]{1,3}"
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_PLAIN = re.compile(rf"(?P<mantissa>{_DECIMAL})(?:[eE](?P<exponent>{_EXPONENT}))?")
_POWER = re.compile(
    rf"(?:(?P<mantissa>{_DECIMAL})\s*(?:×|\\times|\\cdot|·|\*|x)\s*)?10"
    rf"(?:\^\{{(?P<braced>{_EXPONENT})\}}|(?:\^|\*\*)(?P<bare>{_EXPONENT})|(?P<raised>[⁺⁻]?[{_RAISED[:10]}]{{1,3}}))"
)
_RATIO = re.compile(r"(?:(?P<whole>[0-9]+)\s+)?(?P<top>[0-9]+)\s*[/\u2044]\s*(?P<bottom>[0-9]+)")
_AS_PLAIN = str.maketrans(_RAISED, "0123456789+-")


def parse_number(text: str) -> Fraction | None:
    r"""Return the number that the whole text is; None if it is not one number, or is ambiguous (`1,5`, `1.234,5`).

    Accepts signs (also U+2212), thousands separators, decimals, exponents (`1e3`, `2.5 \times 10^{3}`), fractions
    (`3/4`, `1 1/2`, `½`, `\frac{3}{4}`), a currency sign, a percent sign, and Markdown and LaTeX around these (`**7**`,
    `\boxed{7}`). A currency or percent sign is a unit: `50%` is 50.
    """
    text = text.strip()
    if len(text) > LONGEST:
        return None
    text = _bare(text).replace("\u2212", "-")
    text = _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), text)
    signed = _SIGNED.fullmatch(_FRACTION.sub(_as_ratio, text))
    if signed is None or (signed["sign"] and signed["inner"]):
        return None
    value = _unsigned(_SUFFIX.sub("", signed["rest"]))
    negative = "-" in (signed["sign"], signed["inner"])
    return -value if negative and value is not None else value


def _bare(text: str) -> str:
    """Return the text without surrounding pairs, special tokens at its ends, and a full stop."""
    if "<" in text:
        text = _SPECIAL_TOKEN.sub(lambda match: "" if match.start() == 0 or match.end() == len(text) else " ? ", text)
    peeled = True
    while peeled and not text[-1:].isdigit():
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        peeled = False
        for opening, closing in _PAIRS:
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                text, peeled = text[len(opening) : -len(closing)], True
                break
    return text


def _as_ratio(match: re.Match[str]) -> str:
    r"""Return `\frac{3}{4}` and `¾` as `3/4`, after a space if a whole number comes before."""
    if match["vulgar"]:
        ratio = _VULGAR[match["vulgar"]]
    else:
        ratio = f"{match['top']}/{match['bottom']}" if match["top"] else "/".join(match["short"])
    return f"{match['whole']} {ratio}" if match["whole"] else ratio


def _unsigned(text: str) -> Fraction | None:
    if match := _PLAIN.fullmatch(text):
        return Fraction(match[0])
    if match := _POWER.fullmatch(text):
        power = int((match["braced"] or match["bare"] or match["raised"]).translate(_AS_PLAIN))
        return Fraction(match["mantissa"] or 1) * Fraction(10) ** power
    if match := _RATIO.fullmatch(text):
        whole, top, bottom = int(match["whole"] or 0), int(match["top"]), int(match["bottom"])
        if bottom and (match["whole"] is None or top < bottom):
            return whole + Fraction(top, bottom)
    return None
