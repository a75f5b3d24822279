"""Data sets of reasoning-gym as tasks: its questions and answers, our own scorers.

reasoning-gym's `score_answer` is never called: several of them evaluate the completion
or a field of the entry as code, and most pay partial credit. A completion here earns 1
when the text in its last pair of answer tags is right, and 0 otherwise; what right
means is one line of `SCORERS`. Only the data sets listed there can be asked.

Two nodes agree on a group only if they run the same reasoning-gym: its version is part
of the configuration hash.

Propositional logic: does a statement follow from premises, and is it worth saying?

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from decimal import Context, Decimal, localcontext
from functools import partial
from importlib.metadata import version
from io import StringIO
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from node.config import AnswerMode
from node.errors import UserError
from node.tasks import Item, TaskKey, config_hash, derive_seed
from node.tasks.answers import (
    INSTRUCTIONS,
    extract_answer,
    same_fraction,
    same_grid,
    same_number,
    same_output,
    same_text,
)

VERSION = 1
DRAWS = 64

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scorer:
    """How answers of one data set are judged.

    `same` compares an answer with the ground truth; `truth` takes that from an entry,
    `None` for one that no answer could satisfy (another is drawn). `defaults` replace
    options of the data set, `refuse` says what is wrong with options that could make a
    question never end, `hint` is added to the instruction, and `solution` makes a right answer of a
    ground truth that is not one itself.
    """

    same: Callable[[str, str], bool]
    truth: Callable[[Entry], str | None] = lambda entry: str(entry["answer"]).strip() or None
    defaults: Mapping[str, object] = field(default_factory=dict)
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda options: None
    hint: str = ""
    solution: Callable[[str], str] = lambda truth: ""


def _logic_truth(entry: Entry) -> str | None:
    """One conclusion, then the premises, a line each: the premises are what an answer is held to."""
    premises = entry["metadata"]["premises"]
    conclusion = find_conclusion(premises)
    return None if conclusion is None else "\n".join([conclusion, *premises])


def _same_conclusion(answer: str, truth: str) -> bool:
    return is_conclusion(answer, truth.split("\n")[1:])


def _decimal_truth(entry: Entry) -> str:
    return f"{Decimal(entry['answer']):f}"


def _refuse_arithmetic(options: Mapping[str, Any]) -> str | None:
    # The data set finds divisors by trial up to the root of a product of max_terms - 1 numbers: under its own
    # defaults, six terms of four digits, up to 10**10 trials. Such seeds are rare, but a peer may look for one.
    terms, digits = options.get("max_terms", 6), options["max_digits"]
    if terms > 6 or (terms - 1) * digits > 12:
        return "max_terms must be at most 6 and (max_terms - 1) * max_digits at most 12, or a question may take hours"
    return None


def _refuse_bf(options: Mapping[str, Any]) -> str | None:
    # At difficulty 3 one program in six counts past its target, wraps at 256 and does so again, for ever.
    if options.get("difficulty", 1) > 2:
        return "difficulty must be 1 or 2: programs of difficulty 3 may never end"
    return None


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        # The nine tasks of the SAPO paper.
        "base_conversion": Scorer(same_text, defaults={"min_value": 1}),  # it writes 0 as nothing in most bases
        "basic_arithmetic": Scorer(same_number, defaults={"max_digits": 2}, refuse=_refuse_arithmetic),
        "arc_1d": Scorer(same_grid),
        "bf": Scorer(same_output, refuse=_refuse_bf),
        "propositional_logic": Scorer(
            _same_conclusion,
            _logic_truth,
            hint="Conclude something that needs more than one of the premises. Do not answer with a conjunction.",
            solution=lambda truth: truth.split("\n")[0],
        ),
        "fraction_simplification": Scorer(same_fraction),
        # The data set rounds every step to 12 digits, so its last digits depend on the order of the steps: one answer
        # in ten differs from the exact value there. Within a thousandth, the precision of its numbers, all agree.
        "decimal_arithmetic": Scorer(partial(same_number, tolerance=Decimal("0.001")), _decimal_truth),
        "calendar_arithmetic": Scorer(same_text),
        "binary_matrix": Scorer(same_grid),
        # Others with one right answer. What is not here has several, or a scorer of ours is yet to be written, or (as
        # ransom_note and isomorphic_strings) it makes other questions of a seed in every process.
        "caesar_cipher": Scorer(same_text),
        "chain_sum": Scorer(same_number),
        "count_bits": Scorer(same_number),
        "course_schedule": Scorer(same_text),
        "gcd": Scorer(same_number),
        "largest_island": Scorer(same_number),
        "lcm": Scorer(same_number),
        "leg_counting": Scorer(same_number),
        "letter_counting": Scorer(same_number),
        "products": Scorer(same_number),
        "rotate_matrix": Scorer(same_grid),
        "rotten_oranges": Scorer(same_number),
        "spiral_matrix": Scorer(same_text),
        "syllogism": Scorer(same_text),
    }
)


@dataclass(frozen=True, slots=True)
class GymTask:
    """One data set under fixed options.

    A seed stands for the only item of a data set of size 1 that is made from a seed derived by
    hash: item i of a larger one shares its random stream with item 0 of the seed i further on.
    """

    answer_mode: ClassVar[AnswerMode] = "tags"

    key: TaskKey
    scorer: Scorer
    draw: Callable[[int], Entry | None]

    def make(self, seed: int) -> Item:
        """Return the item of `seed`; raise `RuntimeError` if `DRAWS` draws give none that can be answered."""
        for attempt in range(DRAWS):
            entry = self.draw(derive_seed(*self.key, seed, attempt))
            if entry is not None and (answer := self.scorer.truth(entry)) is not None:
                system = INSTRUCTIONS[self.answer_mode]
                if self.scorer.hint:
                    system = f"{system} {self.scorer.hint}"
                return Item(entry["question"], answer, system, solution=self.scorer.solution(answer))
        raise RuntimeError(f"no question with an answer in {DRAWS} draws")

    def verify(self, item: Item, text: str) -> float:
        answer = extract_answer(text)
        return float(answer is not None and self.scorer.same(answer, item.answer))


def load_reasoning_gym(name: str, options: Mapping[str, Any]) -> GymTask:
    """Return the data set `name` under `options`.

    Raises `UserError` if reasoning-gym is missing, the data set has no scorer here, or it refuses the options.
    """
    scorer = SCORERS.get(name)
    if scorer is None:
        raise UserError(f"task 'reasoning-gym/{name}': no safe scorer for it; there are {', '.join(sorted(SCORERS))}")
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(f"task 'reasoning-gym/{name}': run pip install 'gossamer[reasoning-gym]'") from None
    known = {option.name for option in fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := options.keys() - known:
        raise UserError(
            f"task 'reasoning-gym/{name}' has no option {min(unknown)!r}: there are {', '.join(sorted(known))}"
        )
    chosen = {**scorer.defaults, **options}
    try:
        if refusal := scorer.refuse(chosen):
            raise ValueError(refusal)
        config = config_hash({"reasoning-gym": version("reasoning-gym"), "options": chosen})
        draw = partial(_draw, partial(create_dataset, name, size=1, **chosen))
        task = GymTask(TaskKey(f"reasoning-gym/{name}", VERSION, config), scorer, draw)
        task.make(0)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"task 'reasoning-gym/{name}' does not accept its options: {error}") from None
    return task


def _draw(create: Callable[..., Any], seed: int) -> Entry | None:
    # One data set sets the precision of the thread's decimal context, another prints its progress, and a few of the
    # expressions that they compose divide by zero.
    with localcontext(Context()), redirect_stdout(StringIO()):
        try:
            return create(seed=seed)[0]
        except ArithmeticError:
            return None


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
    found = (str(formula) for formula in (*literals, *pairs) if _follows(formula, variables, tables))
    return next(found, None)


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
        case "¬", [one]:
            return full ^ one
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
