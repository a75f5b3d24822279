"""Reading and comparing answers that a model wrote, ours or a peer's.

The text is hostile. Nothing here evaluates, formats or looks anything up by it; every
text is cut to a bound before it is parsed, every pattern runs in linear time, and no
number is built from more than `MAX_DIGITS` digits on either side of its point. What
cannot be read is `None` or unequal, never an exception.
"""

import re
from decimal import Decimal
from fractions import Fraction

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


def extract_answer(text: str) -> str | None:
    """Return what stands between the last closed pair of answer tags, stripped; `None` without one."""
    if len(text) > MAX_TEXT:
        return None
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, end) if end >= 0 else -1
    return text[start + len(OPEN) : end].strip() if start >= 0 else None


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
