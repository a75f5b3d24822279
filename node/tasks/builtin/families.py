"""The built-in tasks: seven families with one right answer, one with many, and natural arithmetic.

A family is one function from a random stream and a difficulty to a question and its right answer; `Family` turns it
into a `Task`. All are in the standard library only.

    sums        whole numbers                            12+37=          49
    bases       a number from one base in another one    3a 16>4=        322
    fractions   a product, not reduced                   2/3*4/5=        8/15
    decimals    sums and differences of decimals         1.2+0.9=        2.1
    matrices    steps from each cell to the nearest 0    011011/111110=  011011/122110
    weekdays    three days, some days on or back         MonThuSun+2=    WedSatTue
    logic       truth tables of two variables            ((p&~q)|p)>q=   1101

Each has thousands of different questions at difficulty 1, so that some can be held out for evaluation, and what is
learnt on the others has to carry over to them. They are for policies that know characters, and `builtin` stands for all
seven. Two more are not among the seven. `summands` has one more right answer than the number that it asks for.
`arithmetic` has options of its own, and its questions are for models that know words.

    summands    two numbers that make another one     12=           5+7
    arithmetic  two or more whole numbers             What is 3 * 4?    12

To add a family: write its function, and give it a line above and in `BY_NAME`. `FAMILIES` are the seven that `builtin`
asks and that the built-in policy was made from.
"""

import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from pydantic import Field, ValidationError

from node.config import Section, option_complaint
from node.errors import UserError
from node.tasks import Item, Task, TaskKey, config_hash, derive_seed
from node.tasks.answers import same_number

Maker = Callable[[random.Random, int], tuple[str, str]]

VERSION = 2
MAX_DIFFICULTY = 10


@dataclass(frozen=True, slots=True)
class Family:
    """A built-in task: 1 for the right answer, white space around it aside, and 0 for anything else.

    `difficulty` is 1 to 10 and makes numbers larger, matrices wider or formulas longer. `accepts` tells whether a text
    is as right as the item's answer; unless a family says otherwise, only the answer itself is. With `partial` a wrong
    text earns the share of its characters that are the answer's characters at the same places.
    """

    name: str
    maker: Maker
    difficulty: int = 1
    accepts: Callable[[str, str], bool] = operator.eq
    partial: bool = False

    @property
    def key(self) -> TaskKey:
        config = {"difficulty": self.difficulty, **({"partial": True} if self.partial else {})}
        return TaskKey(self.name, VERSION, config_hash(config))

    def make(self, seed: int) -> Item:
        rng = random.Random(derive_seed(self.name, VERSION, self.difficulty, seed))
        question, answer = self.maker(rng, self.difficulty)
        return Item(question, answer)

    def verify(self, item: Item, text: str) -> float:
        answer = text.strip()
        if self.accepts(answer, item.answer):
            return 1.0
        return share_in_place(answer, item.answer) if self.partial else 0.0


def share_in_place(text: str, answer: str) -> float:
    """Return how many characters are the same at the same place, over the length of the longer text."""
    same = sum(left == right for left, right in zip(text, answer, strict=False))
    return same / max(len(text), len(answer), 1)


def build(name: str, maker: Maker, accepts: Callable[[str, str], bool] = operator.eq, /, **options: object) -> Family:
    """Return the family under its options; raise `UserError` for an unknown or bad one."""
    difficulty, partial = options.pop("difficulty", 1), options.pop("partial", False)
    if options:
        raise UserError(f"task {name!r} has no option {min(options)!r}: its options are difficulty and partial")
    if not isinstance(partial, bool):
        raise UserError(f"task {name!r}: partial must be true or false, got {partial!r}")
    if isinstance(difficulty, bool) or not isinstance(difficulty, int) or not 1 <= difficulty <= MAX_DIFFICULTY:
        raise UserError(
            f"task {name!r}: difficulty must be a whole number from 1 to {MAX_DIFFICULTY}, got {difficulty!r}"
        )
    return Family(name, maker, difficulty, accepts, partial)


def sums(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a sum or a difference of two numbers from 10 to 9 + 25 * 2**difficulty."""
    limit = 25 * 2**difficulty
    left, right = 10 + rng.randrange(limit), 10 + rng.randrange(limit)
    if rng.random() < 0.5:
        return f"{left}+{right}=", str(left + right)
    return f"{left}-{right}=", str(left - right)


BASES = (2, 4, 16)
DIGITS = "0123456789abcdef"


def bases(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a number below 256 * 4**difficulty in base 2, 4 or 16, to be written in another of them."""
    number = rng.randrange(256 * 4**difficulty)
    given, wanted = rng.sample(BASES, 2)
    return f"{to_base(number, given)} {given}>{wanted}=", to_base(number, wanted)


def to_base(number: int, base: int) -> str:
    """Return the digits of `number` >= 0 in `base` 2 to 16."""
    digits = ""
    while number >= base:
        number, digit = divmod(number, base)
        digits = DIGITS[digit] + digits
    return DIGITS[number] + digits


def fractions(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a product of two fractions with terms from 1 to 4 + 5 * difficulty; its answer is not reduced."""
    limit = 4 + 5 * difficulty
    upper, lower, factor, divisor = (rng.randint(1, limit) for _ in range(4))
    return f"{upper}/{lower}*{factor}/{divisor}=", f"{upper * factor}/{lower * divisor}"


def decimals(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a sum or a difference of two numbers with one decimal, below 2.5 * 2**difficulty."""
    limit = 25 * 2**difficulty
    left, right = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.5:
        return f"{_tenths(left)}+{_tenths(right)}=", _tenths(left + right)
    return f"{_tenths(left)}-{_tenths(right)}=", _tenths(left - right)


def _tenths(count: int) -> str:
    sign = "-" if count < 0 else ""
    return f"{sign}{abs(count) // 10}.{abs(count) % 10}"


ROWS = 2
ONES = 0.75  # with as many zeros as ones, most answers would merely repeat the question


def matrices(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a binary matrix of 2 rows and 5 + difficulty columns that holds at least one 0, and each cell's distance.

    A step goes up, down, left or right.
    """
    columns = 5 + difficulty
    cells = [[int(rng.random() < ONES) for _ in range(columns)] for _ in range(ROWS)]
    cells[rng.randrange(ROWS)][rng.randrange(columns)] = 0
    return f"{_write(cells)}=", _write(distances(cells))


def distances(cells: list[list[int]]) -> list[list[int]]:
    """Return each cell's city-block distance to the nearest 0 (one at least exists)."""
    zeros = [(row, column) for row, line in enumerate(cells) for column, cell in enumerate(line) if cell == 0]
    return [
        [min(abs(row - y) + abs(column - x) for y, x in zeros) for column in range(len(line))]
        for row, line in enumerate(cells)
    ]


def _write(cells: list[list[int]]) -> str:
    return "/".join("".join(map(str, line)) for line in cells)


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def weekdays(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return 2 + difficulty weekdays and 1 to 5 days to add to each of them, or to take away."""
    days = [rng.randrange(len(DAYS)) for _ in range(2 + difficulty)]
    shift = rng.choice((1, -1)) * rng.randint(1, 5)
    question = "".join(DAYS[day] for day in days)
    return f"{question}{shift:+d}=", "".join(DAYS[(day + shift) % len(DAYS)] for day in days)


ASSIGNMENTS = ((False, False), (False, True), (True, False), (True, True))
OPERATORS: Mapping[str, Callable[[bool, bool], bool]] = {
    "&": lambda left, right: left and right,
    "|": lambda left, right: left or right,
    "^": lambda left, right: left != right,
    ">": lambda left, right: not left or right,
}


def logic(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a formula of 2 + `difficulty` operators, grouped from the left, and its values at pq = 00, 01, 10, 11.

    `~` is not, `&` and, `|` or, `^` exclusive or, `>` implies.
    """
    text, values = _literal(rng)
    for depth in range(2 + difficulty):
        operator = rng.choice(tuple(OPERATORS))
        right_text, right_values = _literal(rng)
        left_text = f"({text})" if depth else text
        text = f"{left_text}{operator}{right_text}"
        values = [OPERATORS[operator](left, right) for left, right in zip(values, right_values, strict=True)]
    return f"{text}=", "".join("1" if value else "0" for value in values)


def _literal(rng: random.Random) -> tuple[str, list[bool]]:
    """Return a variable, negated or not, and its values over `ASSIGNMENTS`."""
    variable, negated = rng.randrange(2), rng.random() < 0.5
    values = [assignment[variable] != negated for assignment in ASSIGNMENTS]
    return f"{'~' if negated else ''}{'pq'[variable]}", values


def summands(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a number below 1000 * 2**difficulty, and two that make it."""
    total = rng.randrange(1000 * 2**difficulty)
    left = rng.randint(0, total)
    return f"{total}=", f"{left}+{total - left}"


SUM = re.compile(r"([0-9]{1,7})\+([0-9]{1,7})")  # no summand has more digits at any difficulty


def same_sum(text: str, answer: str) -> bool:
    """Tell whether both are two whole numbers with a plus between them, and make the same."""
    given, right = (SUM.fullmatch(side) for side in (text, answer))
    return bool(given and right and sum(map(int, given.groups())) == sum(map(int, right.groups())))


class ArithmeticOptions(Section):
    """The options of `builtin/arithmetic`."""

    digits: int = Field(1, ge=1, le=9)
    operations: str = Field("+-*", pattern=r"^[+*-]{1,3}$")
    terms: int = Field(2, ge=2, le=6)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`terms` numbers of `digits` digits with `operations` between them; 1 for the right number, and 0 otherwise."""

    digits: int
    operations: str
    terms: int

    @property
    def key(self) -> TaskKey:
        config = config_hash({"digits": self.digits, "operations": self.operations, "terms": self.terms})
        return TaskKey("builtin/arithmetic", VERSION, config)

    def make(self, seed: int) -> Item:
        rng = random.Random(derive_seed(*self.key, seed))
        low = 10 ** (self.digits - 1) if self.digits > 1 else 0
        numbers = [rng.randrange(low, 10**self.digits) for _ in range(self.terms)]
        between = [rng.choice(self.operations) for _ in numbers[1:]]
        question = "".join(f" {operation} {number}" for operation, number in zip(between, numbers[1:], strict=True))
        return Item(f"What is {numbers[0]}{question}?", str(calculate(numbers, between)))

    def verify(self, item: Item, text: str) -> float:
        return float(same_number(text, item.answer))


def calculate(numbers: Sequence[int], between: Sequence[str]) -> int:
    """Return what `numbers` come to with the operations `between` them, products before sums and differences."""
    summands = [numbers[0]]
    for operation, number in zip(between, numbers[1:], strict=True):
        if operation == "*":
            summands[-1] *= number
        else:
            summands.append(-number if operation == "-" else number)
    return sum(summands)


def load_arithmetic(options: Mapping[str, object]) -> Arithmetic:
    """Return the task under `digits` (1 to 9, default 1), `operations` (of `+-*`, default all) and `terms` (2 to 6)."""
    try:
        parsed = ArithmeticOptions.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"task 'builtin/arithmetic': {option_complaint(error, ArithmeticOptions)}") from None
    return Arithmetic(parsed.digits, "".join(sorted(set(parsed.operations))), parsed.terms)


FAMILIES: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {
        "sums": partial(build, "builtin/sums", sums),
        "bases": partial(build, "builtin/bases", bases),
        "fractions": partial(build, "builtin/fractions", fractions),
        "decimals": partial(build, "builtin/decimals", decimals),
        "matrices": partial(build, "builtin/matrices", matrices),
        "weekdays": partial(build, "builtin/weekdays", weekdays),
        "logic": partial(build, "builtin/logic", logic),
    }
)
"""Family name to constructor; each takes `difficulty` (1 to 10, default 1) and `partial` (default false)."""

BY_NAME: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {**FAMILIES, "summands": partial(build, "builtin/summands", summands, same_sum)}
)
"""The same, with the family that `builtin` does not stand for."""
