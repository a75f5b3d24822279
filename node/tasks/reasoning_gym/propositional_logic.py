"""Propositional logic: does a statement follow from premises, and is it worth saying?

A question with no single answer needs a rule for what earns a reward. Here it is a
statement that needs the premises *together*. It must

- be a well-formed formula over the variables of the premises;
- be true wherever all the premises are;
- not already follow from one premise alone (no premise repeated, reworded or weakened, no tautology);
- not be a conjunction, which would only list premises.

Formulas are parsed and compared by truth table: nothing is evaluated as code. From
loosest to tightest the connectives are ↔, → (to the right), ∨, ∧ and ¬; `<->`, `->`,
`|`, `&`, `~` and `!` are read as well.
"""

from collections import deque
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

MAX_SYMBOLS = 64
MAX_LENGTH = 512
MAX_VARIABLES = 10

_SPELLINGS = {"<->": "↔", "->": "→", "|": "∨", "&": "∧", "~": "¬", "!": "¬"}
_BINDING = {"↔": 1, "→": 2, "∨": 3, "∧": 4}


class Formula(NamedTuple):
    """A variable (its name, no parts) or a connective with its one or two parts."""

    symbol: str
    parts: tuple["Formula", ...] = ()

    def __str__(self) -> str:
        if not self.parts:
            return self.symbol
        if len(self.parts) == 1:
            return f"{self.symbol}{self.parts[0]}"
        return f"({self.parts[0]} {self.symbol} {self.parts[1]})"


class _MalformedError(ValueError):
    pass


def parse(text: str, variables: Sequence[str]) -> Formula | None:
    """Return the formula that `text` is, over one-letter `variables`; `None` if it is anything else."""
    if len(text) > MAX_LENGTH:
        return None
    for spelling, symbol in _SPELLINGS.items():
        text = text.replace(spelling, symbol)
    tokens = deque(character for character in text if not character.isspace())
    if len(tokens) > MAX_SYMBOLS:
        return None
    try:
        formula = _formula(tokens, variables, 1)
    except _MalformedError:
        return None
    return None if tokens else formula


def is_conclusion(text: str, premises: Sequence[str]) -> bool:
    """Whether `text` is a conclusion from `premises` in the sense of this module.

    Raises `ValueError` when a premise is not a formula: premises are our own.
    """
    variables, tables = _read(premises)
    conclusion = parse(text, variables)
    return conclusion is not None and _follows(conclusion, variables, tables)


def find_conclusion(premises: Sequence[str]) -> str | None:
    """Return a conclusion of at most two literals, the shortest first; `None` where there is none.

    Contradictory premises have none: from them everything follows.
    """
    variables, tables = _read(premises)
    if _all(tables, variables) == 0:
        return None
    positive = [Formula(name) for name in variables]
    literals = [*positive, *(Formula("¬", (formula,)) for formula in positive)]
    pairs = (Formula(symbol, (left, right)) for symbol, left, right in product("∨→↔", literals, literals))
    conclusions = (str(formula) for formula in (*literals, *pairs) if _follows(formula, variables, tables))
    return next(conclusions, None)


def _follows(conclusion: Formula, variables: Sequence[str], premises: Sequence[int]) -> bool:
    table = _table(conclusion, variables)
    entailed = _all(premises, variables) & ~table == 0
    alone = any(premise & ~table == 0 for premise in premises)
    return entailed and not alone and not _is_conjunction(conclusion)


def _read(premises: Sequence[str]) -> tuple[list[str], list[int]]:
    variables = sorted({character for premise in premises for character in premise if character.isalpha()})
    formulas = [parse(premise, variables) for premise in premises]
    if len(variables) > MAX_VARIABLES or any(formula is None for formula in formulas):
        raise ValueError("premises that are not formulas")
    return variables, [_table(formula, variables) for formula in formulas if formula is not None]


def _formula(tokens: deque[str], variables: Sequence[str], loosest: int) -> Formula:
    left = _operand(tokens, variables)
    while tokens and _BINDING.get(tokens[0], 0) >= loosest:
        symbol = tokens.popleft()
        right = _formula(tokens, variables, _BINDING[symbol] + (symbol != "→"))
        left = Formula(symbol, (left, right))
    return left


def _operand(tokens: deque[str], variables: Sequence[str]) -> Formula:
    token = tokens.popleft() if tokens else ""
    if token == "¬":
        return Formula(token, (_operand(tokens, variables),))
    if token == "(":
        inner = _formula(tokens, variables, 1)
        if not tokens or tokens.popleft() != ")":
            raise _MalformedError
        return inner
    if token not in variables:
        raise _MalformedError
    return Formula(token)


def _table(formula: Formula, variables: Sequence[str]) -> int:
    """Return the truth table as an integer: bit i is the value under assignment i, in which
    variable j is true when bit j of i is set.
    """
    full = _full(variables)
    parts = [_table(part, variables) for part in formula.parts]
    match formula.symbol, parts:
        case "¬", [negated]:
            return full ^ negated
        case "∧", [left, right]:
            return left & right
        case "∨", [left, right]:
            return left | right
        case "→", [left, right]:
            return (full ^ left) | right
        case "↔", [left, right]:
            return full ^ left ^ right
        case name, _:
            place = variables.index(name)
            return sum(1 << i for i in range(2 ** len(variables)) if i >> place & 1)


def _all(tables: Sequence[int], variables: Sequence[str]) -> int:
    result = _full(variables)
    for table in tables:
        result &= table
    return result


def _full(variables: Sequence[str]) -> int:
    return (1 << 2 ** len(variables)) - 1


def _is_conjunction(formula: Formula, positive: bool = True) -> bool:
    if formula.symbol == "¬":
        return _is_conjunction(formula.parts[0], not positive)
    return formula.symbol == "∧" if positive else formula.symbol in ("∨", "→")
