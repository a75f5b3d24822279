"""Reading and comparing answers that a model wrote, ours or a peer's.

The text is hostile. Nothing here evaluates, formats or looks anything up by it; every
text is cut to a bound before it is parsed, every pattern runs in linear time, and no
number is built from more than `MAX_DIGITS` digits on either side of its point. What
cannot be read is `None` or unequal, never an exception.

An answer mode says where in a completion the answer is; `READERS` has a function for each, `show` is its opposite:

    tags          between the last closed pair of answer tags
    boxed         in the last closed \\boxed{...}
    last_number   the last number of the text, without sign + and commas
    first_line    the first line that is not blank
    whole         all of it
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

from node.config import AnswerMode

MAX_TEXT = 1 << 16  # characters of a completion; longer ones hold no answer
MAX_ANSWER = 1 << 12  # characters of an answer
MAX_DIGITS = 40

OPEN, CLOSE = "<answer>", "</answer>"

_DIGITS = rf"[0-9]{{1,{MAX_DIGITS}}}"
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3}){1,12}"
_NUMBER = re.compile(rf"([+-]?)({_GROUPED}|{_DIGITS})(?:\.([0-9]{{0,{MAX_DIGITS}}}))?")
_FRACTION = re.compile(rf"({_DIGITS})\s{{0,8}}/\s{{0,8}}({_DIGITS})")
_LATEX_FRACTION = re.compile(
    rf"\\d?frac\s{{0,8}}\{{\s{{0,8}}({_DIGITS})\s{{0,8}}\}}\s{{0,8}}\{{\s{{0,8}}({_DIGITS})\s{{0,8}}\}}"
)
_BOX = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
_LAST_NUMBER = re.compile(r"(?:(?<![\w)\]}.])[+-])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


def extract_answer(text: str) -> str | None:
    """Return what stands between the last closed pair of answer tags, stripped; `None` without one."""
    if len(text) > MAX_TEXT:
        return None
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, end) if end >= 0 else -1
    return text[start + len(OPEN) : end].strip() if start >= 0 else None


def extract_boxed(text: str) -> str | None:
    r"""Return what the last closed `\boxed{...}` holds, stripped; `None` without one. Escaped braces open nothing."""
    if len(text) > MAX_TEXT:
        return None
    opened: list[int | None] = []  # where the contents of each open brace begin; None for a brace that is no box's
    box: tuple[int, int] | None = None
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "}" and opened:
            start = opened.pop()
            if start is not None and (box is None or start > box[0]):
                box = start, match.start()
        elif token == "{":
            opened.append(None)
        elif token.startswith("\\boxed"):
            opened.append(match.end())
    return text[slice(*box)].strip() if box is not None else None


def extract_last_number(text: str) -> str | None:
    """Return the last decimal number in `text`, without + and commas; `None` without one.

    A minus belongs to it unless it stands after a letter, a digit or a closing bracket, as in `5-3`.
    """
    if len(text) > MAX_TEXT:
        return None
    last = None
    for match in _LAST_NUMBER.finditer(text):
        last = match[0]
    return None if last is None else last.removeprefix("+").replace(",", "")


def extract_first_line(text: str) -> str | None:
    """Return the first line that is not blank, stripped; `None` without one."""
    bare = text.strip() if len(text) <= MAX_TEXT else ""
    return bare.splitlines()[0].rstrip() if bare else None


def extract_whole(text: str) -> str | None:
    """Return all of `text`, stripped; `None` for one over the bound."""
    return text.strip() if len(text) <= MAX_TEXT else None


READERS: Mapping[AnswerMode, Callable[[str], str | None]] = MappingProxyType(
    {
        "tags": extract_answer,
        "boxed": extract_boxed,
        "last_number": extract_last_number,
        "first_line": extract_first_line,
        "whole": extract_whole,
    }
)
"""Answer mode to the function that reads an answer out of a completion."""

_FORM = "in exactly the form that the problem asks for."
INSTRUCTIONS: Mapping[AnswerMode, str] = MappingProxyType(
    {
        "tags": "Solve the problem step by step. Then write the final answer, and nothing else, between <answer> and "
        f"</answer>, {_FORM}",
        "boxed": "Solve the problem step by step. Then write the final answer, and nothing else, in \\boxed{}, "
        f"{_FORM}",
        "last_number": "Solve the problem step by step. Then end with the final answer, a number.",
        "first_line": f"Write the answer, and nothing else, on the first line, {_FORM}",
        "whole": f"Write the answer, and nothing else, {_FORM}",
    }
)
"""What a model may be told of each mode."""


def show(answer: str, mode: AnswerMode) -> str:
    """Return a text from which `mode` reads `answer`."""
    if mode == "tags":
        return f"{OPEN}{answer}{CLOSE}"
    return f"\\boxed{{{answer}}}" if mode == "boxed" else answer


def same_text(answer: str, truth: str) -> bool:
    """Whether both texts have the same words: case and the amount of white space do not count."""
    return len(answer) <= MAX_ANSWER and answer.casefold().split() == truth.casefold().split()


def same_output(answer: str, truth: str) -> bool:
    """Whether both texts are the same characters, surrounding white space aside."""
    return len(answer) <= MAX_ANSWER and answer.strip() == truth.strip()


def same_grid(answer: str, truth: str) -> bool:
    """Whether both texts have the same cells in the same rows: blank lines and spacing do not count."""
    return len(answer) <= MAX_ANSWER and _rows(answer) == _rows(truth)


def same_number(answer: str, truth: str, tolerance: Decimal = Decimal(0)) -> bool:
    """Whether both texts are decimal numbers that differ by at most `tolerance`."""
    left, right = parse_number(answer), parse_number(truth)
    return left is not None and right is not None and abs(Fraction(left) - Fraction(right)) <= Fraction(tolerance)


def same_fraction(answer: str, truth: str) -> bool:
    """Whether `answer` is the fraction `truth` in lowest terms; a whole number may leave out its denominator."""
    left, right = parse_fraction(answer), parse_fraction(truth)
    if left is None or right is None or right[1] == 0:
        return False
    lowest = Fraction(*right)
    return left == (lowest.numerator, lowest.denominator)


def parse_number(text: str) -> Decimal | None:
    """Return the decimal number that `text` is, exactly; `None` if it is anything else.

    A sign, thousands separated by commas and a decimal point are read; exponents,
    infinities and digits of other scripts are not.
    """
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= MAX_ANSWER else None
    if match is None:
        return None
    sign, whole, part = match.groups(default="")
    return Decimal(f"{sign}{whole.replace(',', '')}.{part or '0'}")


def parse_fraction(text: str) -> tuple[int, int] | None:
    r"""Return numerator and denominator of `3/4`, `$3/4$`, `\frac{3}{4}`, `\dfrac{3}{4}` or `3`, not reduced."""
    if len(text) > MAX_ANSWER:
        return None
    bare = text.strip().removeprefix("$").removesuffix("$").strip()
    match = _FRACTION.fullmatch(bare) or _LATEX_FRACTION.fullmatch(bare)
    if match is not None:
        return int(match[1]), int(match[2])
    return (int(bare), 1) if re.fullmatch(_DIGITS, bare) else None


def _rows(text: str) -> list[list[str]]:
    return [cells for line in text.splitlines() if (cells := line.split())]
