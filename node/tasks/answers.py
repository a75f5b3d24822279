"""Reading and comparing answers that a model wrote, ours or a peer's.

The text is hostile. Nothing here evaluates, formats or looks anything up by it; every text is cut to a bound before it
is parsed, every pattern runs in linear time, and no number is built from more than `MAX_DIGITS` digits on either side
of its point. An unreadable answer is `None` or unequal, never an exception.

An answer mode says where in a completion the answer is; `READERS` has a function for each, `show` is its opposite:

    tags          between the last closed pair of answer tags
    boxed         in the last closed \\boxed{...}
    last_number   the last number of the text, without sign + and commas
    first_line    the first line that is not blank
    whole         all of it
"""

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

from node.config import AnswerMode

MAX_TEXT = 1 << 17  # characters of a completion, 16 thousand tokens of eight; longer ones hold no answer
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
_SCIENTIFIC = re.compile(r"([^eE]{1,100})(?:[eE]([+-]?[0-9]{1,3}))?")
_HEX = re.compile(rf"([+-]?)0x([0-9a-f]{{1,{MAX_DIGITS}}})")
_COMPLEX = re.compile(r"(?:([+-]?[0-9.]{1,40})(?![0-9.ij]))?(?:([+-]?)([0-9.]{0,40})[ij])?")
_TERM = re.compile(r"[+-]?[^+-]{1,200}")
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


def same_compact(answer: str, truth: str) -> bool:
    """Whether both texts have the same characters in order: white space does not count."""
    return len(answer) <= MAX_ANSWER and "".join(answer.split()) == "".join(truth.split())


def same_words(answer: str, truth: str) -> bool:
    """Whether both texts have the same words: case, white space, commas and full stops do not count."""
    return len(answer) <= MAX_ANSWER and _words(answer) == _words(truth)


def same_list(answer: str, truth: str) -> bool:
    """Whether both texts list the same items in order, separated by commas; brackets around and quotes do not count."""
    return len(answer) <= MAX_ANSWER and _listed(answer) == _listed(truth)


def same_lists(answer: str, truth: str, *, ordered: bool) -> bool:
    """Whether both texts are JSON lists of the same lists of texts, in any order; inside them too unless `ordered`."""
    left, right = _json_lists(answer, ordered), _json_lists(truth, ordered)
    return left is not None and left == right


def same_factors(answer: str, truth: str) -> bool:
    """Whether both texts are products of the same whole numbers, in any order."""
    left, right = _factors(answer), _factors(truth)
    return left is not None and left == right


def same_hex(answer: str, truth: str) -> bool:
    """Whether both texts are the same hexadecimal number, as `-0x1f`."""
    left, right = _HEX.fullmatch(answer.strip().lower()[: MAX_DIGITS * 4]), _HEX.fullmatch(truth.strip().lower())
    return left is not None and right is not None and _hex(left) == _hex(right)


def same_close(answer: str, truth: str, relative: Decimal) -> bool:
    """Whether two numbers, with exponents or without, differ by at most that part of `truth`."""
    left, right = parse_scientific(answer), parse_scientific(truth)
    if left is None or right is None:
        return False
    return abs(Fraction(left) - Fraction(right)) <= Fraction(relative) * abs(Fraction(right))


def same_numbers(answer: str, truth: str, tolerance: Decimal, *, ordered: bool) -> bool:
    """Whether both texts are equally many numbers, all within `tolerance`; ( ) and degree signs are ignored."""
    left, right = _numbers(answer), _numbers(truth)
    if left is None or right is None or len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True) if ordered else zip(sorted(left), sorted(right), strict=True)
    return all(abs(a - b) <= Fraction(tolerance) for a, b in pairs)


def same_number_grid(answer: str, truth: str, tolerance: Decimal) -> bool:
    """Whether both texts have the same numbers in the same rows, each within `tolerance`."""
    if len(answer) > MAX_ANSWER:
        return False
    left, right = _rows(answer), _rows(truth)
    if list(map(len, left)) != list(map(len, right)):
        return False
    cells = zip((cell for row in left for cell in row), (cell for row in right for cell in row), strict=True)
    return all(same_number(a, b, tolerance) for a, b in cells)


def same_complex(answer: str, truth: str) -> bool:
    """Whether both texts are the same complex number: `3 - 2i`, `3` or `-2i`."""
    left, right = _complex(answer), _complex(truth)
    return left is not None and left == right


def same_polynomial(answer: str, truth: str, *, constant: bool = True) -> bool:
    """Whether both texts are the same expanded polynomial with `*` and `**`; without `constant` terms where it is off.

    A coefficient may be a fraction (`-x**5/7`). Nothing is multiplied out: a product of sums is no polynomial here.
    """
    left, right = _polynomial(answer, constant), _polynomial(truth, constant)
    return left is not None and left == right


def parse_scientific(text: str) -> Decimal | None:
    """Return the number that `text` is, like `parse_number`, or with an exponent of at most three digits."""
    match = _SCIENTIFIC.fullmatch(text.strip()) if len(text) <= MAX_ANSWER else None
    if match is None:
        return None
    number = parse_number(match[1])
    return None if number is None else number.scaleb(int(match[2] or 0))


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


def _words(text: str) -> list[str]:
    return text.casefold().replace(",", " ").replace(".", " ").split()


def _listed(text: str) -> list[str]:
    bare = text.strip().removeprefix("[").removesuffix("]")
    return [item.strip().strip("'\"") for item in bare.split(",")]


def _json_lists(text: str, ordered: bool) -> list[list[str]] | None:
    try:
        lists = json.loads(text) if len(text) <= MAX_ANSWER else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(lists, list) or not all(isinstance(words, list) for words in lists):
        return None
    if not all(isinstance(word, str) for words in lists for word in words):
        return None
    return sorted(words if ordered else sorted(words) for words in lists)


def _factors(text: str) -> list[int] | None:
    parts = [part.strip() for part in re.split("[×x*·]", text)] if len(text) <= MAX_ANSWER else []
    return sorted(map(int, parts)) if parts and all(re.fullmatch(_DIGITS, part) for part in parts) else None


def _hex(match: re.Match[str]) -> int:
    return int(match[1] + match[2], 16)


def _numbers(text: str) -> list[Fraction] | None:
    if len(text) > MAX_ANSWER:
        return None
    bare = text.strip().removesuffix("°").strip()
    if bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1]
    numbers = [parse_number(part) for part in bare.split(",")]
    return None if None in numbers else [Fraction(number) for number in numbers if number is not None]


def _complex(text: str) -> tuple[Decimal, Decimal] | None:
    compact = "".join(text.split()) if len(text) <= MAX_ANSWER else ""
    match = _COMPLEX.fullmatch(compact)
    if not compact or match is None:
        return None
    real = parse_number(match[1]) if match[1] else Decimal(0)
    imaginary = parse_number(match[2] + (match[3] or "1")) if match[3] is not None else Decimal(0)
    return None if real is None or imaginary is None else (real, imaginary)


def _polynomial(text: str, constant: bool) -> dict[tuple[tuple[str, int], ...], Fraction] | None:
    """Return each monomial, as its variables with their exponents, and its coefficient."""
    compact = "".join(text.split()).replace("**", "^") if len(text) <= MAX_ANSWER else ""
    terms = _TERM.findall(compact)
    if not compact or "".join(terms) != compact:
        return None
    total: dict[tuple[tuple[str, int], ...], Fraction] = {}
    for term in terms:
        parsed = _monomial(term)
        if parsed is None:
            return None
        powers, coefficient = parsed
        if constant or (powers and powers != (("C", 1),)):
            total[powers] = total.get(powers, Fraction(0)) + coefficient
    return {powers: coefficient for powers, coefficient in total.items() if coefficient}


def _monomial(term: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    coefficient = Fraction(-1 if term.startswith("-") else 1)
    powers: dict[str, int] = {}
    product, *divisors = term.lstrip("+-").split("/")
    for divisor in divisors:
        if not re.fullmatch(_DIGITS, divisor) or not int(divisor):
            return None
        coefficient /= int(divisor)
    for factor in product.split("*"):
        name, _, power = factor.partition("^")
        if re.fullmatch(_DIGITS, factor):
            coefficient *= int(factor)
        elif re.fullmatch("[A-Za-z]", name) and re.fullmatch("([0-9]{1,3})?", power):
            powers[name] = powers.get(name, 0) + int(power or 1)
        else:
            return None
    return tuple(sorted(powers.items())), coefficient


def _rows(text: str) -> list[list[str]]:
    return [cells for line in text.splitlines() if (cells := line.split())]
