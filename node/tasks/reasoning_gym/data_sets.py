"""Data sets of reasoning-gym as tasks: its questions and answers, and scorers of ours where one answer is right.

A completion earns 1 when the text in its last pair of answer tags is right, and 0 otherwise; what right means is one
line of `SCORERS`. Only the data sets listed there can be asked.

reasoning-gym's own `score_answer` is called for data sets whose questions have several right answers, and in a cage
alone (`node.tasks.scoring.caged`): right is what it pays in full. It is called for none that evaluates the completion,
or a field of the entry, as code: such a text could pay itself.

Two nodes agree on a group only if they run the same reasoning-gym: its version is part of the configuration hash.

`python -m node.tasks.reasoning_gym.data_sets CHANNEL LIFE` is a worker process (`node.processes.worker_process`). It
draws under a hash seed of 0 for the data sets that need it, tries options that somebody chose before they are used
here, and scores in cages.
"""

import functools
import json
import os
import resource
import signal
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from decimal import Context, Decimal, localcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from node.config import AnswerMode
from node.errors import UserError, how_to_install
from node.processes.cage import lacking, make_folder
from node.processes.worker_process import Message, WorkerError, WorkerProcess, connect, yield_memory
from node.tasks import Item, TaskKey, config_hash, derive_seed
from node.tasks.answers import (
    INSTRUCTIONS,
    MAX_ANSWER,
    extract_answer,
    same_close,
    same_compact,
    same_complex,
    same_factors,
    same_fraction,
    same_grid,
    same_hex,
    same_list,
    same_lists,
    same_number,
    same_number_grid,
    same_numbers,
    same_output,
    same_polynomial,
    same_text,
    same_words,
)
from node.tasks.choices import is_choice
from node.tasks.reasoning_gym.propositional_logic import find_conclusion, is_conclusion
from node.tasks.scoring.caged import CageWork, serve_in_cages
from node.tasks.scoring.verdicts import (
    LOAD_S,
    SCORE_S,
    Answer,
    Submission,
    Verdict,
    Workers,
    already,
    bound_memory,
    score,
)

VERSION = 1
DRAWS = 64
TRIALS = 16  # questions that are tried under options of somebody's choice
TRIAL_CPU_S = 8  # of processor time, for all of them
TRIAL_S = 120.0  # of a busy machine's time, the imports included
TRIAL_BYTES = 4 << 30  # of address space
MAX_QUESTION = 1 << 15  # characters: a model reads a thousand tokens or ten thousand, not a book
MAX_ENTRY = 1 << 14  # characters of an entry that `score_answer` gets
QUESTION_S = 60.0

Entry = Mapping[str, Any]


class GymQuestion(NamedTuple):
    """A question and its ground truth."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Scorer:
    """How answers of one data set are judged.

    `same` compares an answer with the ground truth, or is None where `score_answer` does. `truth` takes that from an
    entry, `None` for one that no answer could satisfy (another is drawn). `defaults` replace options of the data set,
    and `refuse` says what is wrong with options that could make a question never end. `hint` is added to the
    instruction. `solution` makes a right answer of a ground truth that is not one itself. `hashes` says that questions
    depend on the process's hash seed, and `seeds` is how many seeds the data set takes.
    """

    same: Callable[[str, str], bool] | None
    truth: Callable[[Entry], str | None] = lambda entry: str(entry["answer"]).strip() or None
    defaults: Mapping[str, object] = field(default_factory=dict)
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda options: None
    hint: str = ""
    solution: Callable[[str], str] = lambda truth: ""
    hashes: bool = False
    seeds: int = 2**63


def _logic_truth(entry: Entry) -> str | None:
    """One conclusion, then the premises, a line each: the premises are what an answer is held to."""
    premises = entry["metadata"]["premises"]
    conclusion = find_conclusion(premises)
    return None if conclusion is None else "\n".join([conclusion, *premises])


ITS_OWN = Scorer(None, json.dumps, solution=lambda truth: str(json.loads(truth)["answer"]))


def _same_numbers_in_rows(answer: str, truth: str) -> bool:
    """Compare grids without the signs between their cells, which were given."""
    return len(answer) <= MAX_ANSWER and same_grid(answer.translate(_SIGNS), truth.translate(_SIGNS))


_SIGNS = str.maketrans("<>∨∧", "    ")


def _refuse_arithmetic(options: Mapping[str, Any]) -> str | None:
    # The data set finds divisors by trial up to the root of a product of max_terms - 1 numbers. Under its own defaults,
    # six terms of four digits, these are up to 10**10 trials. Such seeds are rare, but a peer may look for one.
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
            lambda answer, truth: is_conclusion(answer, truth.split("\n")[1:]),
            _logic_truth,
            hint="Conclude something that needs more than one of the premises. Do not answer with a conjunction.",
            solution=lambda truth: truth.split("\n")[0],
        ),
        "fraction_simplification": Scorer(same_fraction),
        # The data set rounds every step to 12 digits, so its last digits depend on the order of the steps: one answer
        # in ten differs from the exact value there. Within a thousandth, the precision of its numbers, all agree.
        "decimal_arithmetic": Scorer(
            partial(same_number, tolerance=Decimal("0.001")), lambda entry: f"{Decimal(entry['answer']):f}"
        ),
        "calendar_arithmetic": Scorer(same_text),
        "binary_matrix": Scorer(same_grid),
        # Several right answers, of which an entry holds all, or one.
        "n_queens": Scorer(
            lambda answer, truth: answer in truth.split("\n\n"),
            lambda entry: "\n\n".join(entry["metadata"]["valid_answers"]),
            solution=lambda truth: truth.split("\n\n")[0],
        ),
        "cryptarithm": ITS_OWN,
        "jugs": ITS_OWN,
        "palindrome_generation": ITS_OWN,
        "shortest_path": ITS_OWN,
        "tower_of_hanoi": ITS_OWN,
        # Others with one right answer. Left out are sets that evaluate what is right (countdown, puzzle24), take
        # what is wrong (kakurasu), hold no answer (rubiks_cube), or run code (codeio). So are those that take a third
        # of a second a question (arc_agi), or make another question of a seed when asked again (list_functions).
        "ab": Scorer(same_text),
        "acre": Scorer(same_text),
        "advanced_geometry": Scorer(partial(same_numbers, tolerance=Decimal("0.01"), ordered=True)),
        "aiw": Scorer(same_number),
        "binary_alternation": Scorer(same_number),
        "bitwise_arithmetic": Scorer(same_hex),
        "caesar_cipher": Scorer(same_text),
        "chain_sum": Scorer(same_number),
        "circuit_logic": Scorer(same_number),
        "coin_flip": Scorer(partial(same_close, relative=Decimal("0.001"))),
        "color_cube_rotation": Scorer(same_text),
        "complex_arithmetic": Scorer(same_complex),
        "count_bits": Scorer(same_number),
        "count_primes": Scorer(same_number),
        "course_schedule": Scorer(same_text),
        "decimal_chain_sum": Scorer(same_number),
        "dice": Scorer(same_fraction),
        "emoji_mystery": Scorer(same_text),
        "family_relationships": Scorer(same_text),
        "figlet_font": Scorer(same_text),
        "futoshiki": Scorer(_same_numbers_in_rows),
        "game_of_life": Scorer(same_compact),
        "game_of_life_halting": Scorer(same_text),
        "gcd": Scorer(same_number),
        "group_anagrams": Scorer(partial(same_lists, ordered=False)),
        "gsm_symbolic": Scorer(same_number),
        "isomorphic_strings": Scorer(same_text, hashes=True),
        "knights_knaves": Scorer(same_words),
        "largest_island": Scorer(same_number),
        "lcm": Scorer(same_number),
        "leg_counting": Scorer(same_number),
        "letter_counting": Scorer(same_number),
        "letter_jumble": Scorer(same_text),
        "mahjong_puzzle": Scorer(same_text),
        "manipulate_matrix": Scorer(same_grid),
        "maze": Scorer(same_number),
        "mini_sudoku": Scorer(same_grid),
        "modulo_grid": Scorer(same_grid),
        "needle_haystack": Scorer(same_text),
        "number_filtering": Scorer(same_list),
        "number_format": Scorer(partial(same_close, relative=Decimal(0))),
        "number_sequence": Scorer(same_number),
        "number_sorting": Scorer(same_list),
        "palindrome_partitioning": Scorer(partial(same_lists, ordered=True)),
        "path_star": Scorer(same_text),
        "polynomial_equations": Scorer(partial(same_numbers, tolerance=Decimal("0.001"), ordered=False)),
        "polynomial_multiplication": Scorer(same_polynomial, hashes=True),
        "pool_matrix": Scorer(partial(same_number_grid, tolerance=Decimal("0.01")), seeds=2**32),
        # Correct to three figures is within half a unit of the third.
        "power_function": Scorer(partial(same_close, relative=Decimal("0.005"))),
        "prime_factorization": Scorer(same_factors),
        "products": Scorer(same_number),
        "ransom_note": Scorer(same_text, hashes=True),
        "rearc": Scorer(same_grid),
        "rectangle_count": Scorer(same_number),
        "rotate_matrix": Scorer(same_grid),
        "rotten_oranges": Scorer(same_number),
        "self_reference": Scorer(same_number),
        "sentence_reordering": Scorer(same_text),
        "simple_equations": Scorer(same_number),
        "simple_geometry": Scorer(same_number),
        "simple_integration": Scorer(partial(same_polynomial, constant=False)),
        "spell_backward": Scorer(same_text),
        "spiral_matrix": Scorer(same_text),
        "string_insertion": Scorer(same_text),
        "string_manipulation": Scorer(same_text),
        "string_splitting": Scorer(same_text),
        "string_synthesis": Scorer(same_text),
        "sudoku": Scorer(same_grid),
        "survo": Scorer(same_grid),
        "syllogism": Scorer(same_text),
        "time_intervals": Scorer(same_text),
        "tsumego": Scorer(same_text),
        "word_sequence_reversal": Scorer(same_list),
        "word_sorting": Scorer(same_list),
        "zebra_puzzles": Scorer(same_text),
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
    draw: Callable[[int], GymQuestion | None]

    def make(self, seed: int) -> Item:
        """Return the item of `seed`; raise `RuntimeError` if `DRAWS` draws give none that can be answered."""
        for attempt in range(DRAWS):
            drawn = self.draw(derive_seed(*self.key, seed, attempt))
            if drawn is not None:
                system = INSTRUCTIONS[self.answer_mode]
                if self.scorer.hint:
                    system = f"{system} {self.scorer.hint}"
                return Item(drawn.question, drawn.answer, system, solution=self.scorer.solution(drawn.answer))
        raise RuntimeError(f"no question with an answer in {DRAWS} draws")

    def verify(self, item: Item, text: str) -> Verdict:
        answer = extract_answer(text)
        return float(answer is not None and self.scorer.same is not None and self.scorer.same(answer, item.answer))


@dataclass(frozen=True, slots=True)
class CagedGymTask(GymTask):
    """A data set whose own `score_answer` judges, with the data set's `options`; `unshared` says why it stays at home.

    All data sets of this kind have the same workers: some for own texts, others for peers'.
    """

    options: Mapping[str, Any]
    unshared: str

    @property
    def apart(self) -> Workers:
        """The workers for peers' texts."""
        return _scorers(is_own=False)

    def verify(self, item: Item, text: str) -> Verdict:
        return score([Answer(self, item, text)], LOAD_S)[0]

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        """Queue texts that have an answer of bounded length for worker processes; others earn nothing."""
        return [self._submitted(submitted, is_own) for submitted in batch]

    def _submitted(self, submitted: Submission, is_own: bool) -> "Future[Verdict]":
        answer = extract_answer(submitted.text)
        if answer is None or len(answer) > MAX_ANSWER:
            return already(0.0)
        _, _, name = self.key.name.partition("/")
        fields = {"call": "score", "name": name, "options": dict(self.options), "answer": answer}
        request = {**fields, "entry": submitted.item.answer}
        return _scorers(is_own).submit(request, is_own, submitted.quota)


@functools.cache
def _scorers(is_own: bool) -> Workers:
    """Return the workers that score this node's own texts, or peers'."""
    first = {"call": "load", "isolate": "text", "whole": not lacking(), "seconds": SCORE_S}
    return Workers("reasoning-gym", "node.tasks.reasoning_gym.data_sets", first)


def load_reasoning_gym(name: str, options: Mapping[str, Any]) -> GymTask:
    """Return the data set `name` under `options`.

    Raises `UserError` if reasoning-gym is missing, the data set has no scorer here, or it refuses the options; also
    where `TRIALS` questions under them take too long or are too large, which is tried in a process of its own.
    """
    scorer = SCORERS.get(name)
    if scorer is None:
        raise UserError(f"task 'reasoning-gym/{name}': no safe scorer for it; there are {', '.join(sorted(SCORERS))}")
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f"task 'reasoning-gym/{name}': run {how_to_install('reasoning-gym')}") from None
    known = {option.name for option in fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := options.keys() - known:
        raise UserError(
            f"task 'reasoning-gym/{name}' has no option {min(unknown)!r}: there are {', '.join(sorted(known))}"
        )
    chosen = {**scorer.defaults, **options}
    try:
        if refusal := scorer.refuse(chosen):
            raise ValueError(refusal)
        if options:
            _try(name, chosen)
        config = config_hash({"reasoning-gym": version("reasoning-gym"), "options": chosen})
        draw = GymProcess(name, chosen).draw if scorer.hashes else partial(draw_here, name, chosen)
        key = TaskKey(f"reasoning-gym/{name}", VERSION, config)
        task = GymTask(key, scorer, draw) if scorer.same else CagedGymTask(key, scorer, draw, chosen, _unshared())
        task.make(0)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"task 'reasoning-gym/{name}' does not accept its options: {error}") from None
    return task


def _unshared() -> str:
    lacks = lacking()
    return f"a stranger's text cannot be caged here ({lacks})" if lacks else ""


def may_choose(name: str, option: str, value: object) -> bool:
    """Tell whether a swarm's founder may give `option` of the data set `name` this value at a joiner's.

    The data set's own configuration tells what is usual. If there is no such option, or no reasoning-gym, the loader
    refuses the task anyway, so the answer is yes.
    """
    if name not in SCORERS or not find_spec("reasoning_gym"):
        return True
    from reasoning_gym.factory import DATASETS

    _, config = DATASETS[name]
    annotations = get_type_hints(config)
    if option not in annotations:
        return True
    choices = get_args(annotations[option]) if get_origin(annotations[option]) is Literal else ()
    return is_choice(value, getattr(config(), option), choices)


def draw_here(name: str, options: Mapping[str, Any], seed: int) -> GymQuestion | None:
    """Return the question that the data set makes of `seed`; None for one that no answer could satisfy."""
    from reasoning_gym.factory import create_dataset

    scorer = SCORERS[name]
    # One data set sets the precision of the thread's decimal context, another prints its progress, and a few of the
    # expressions that they compose divide by zero.
    with localcontext(Context()), redirect_stdout(StringIO()):
        try:
            entry = create_dataset(name, size=1, seed=seed % scorer.seeds, **options)[0]
        except ArithmeticError:
            return None
    answer = scorer.truth(entry)
    most = MAX_ANSWER if scorer.same else MAX_ENTRY
    return None if answer is None or len(answer) > most else GymQuestion(entry["question"], answer)


class GymProcess:
    """A data set in a process whose hash seed is 0: some make other questions of a seed under another one.

    The process is started with the first question, and again after its death.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._request = {"call": "draw", "name": name, "options": dict(options)}
        self._worker: WorkerProcess | None = None

    def draw(self, seed: int) -> GymQuestion | None:
        """Return what `draw_here` does there; raise `RuntimeError` if it takes more than `QUESTION_S` seconds."""
        if self._worker is None:
            self._worker = _start_worker()
            weakref.finalize(self, self._worker.kill)
        try:
            drawn = self._worker.call(self._request | {"seed": seed}, QUESTION_S)["drawn"]
        except WorkerError as error:
            self._worker = None
            raise RuntimeError(f"its process failed: {error}") from None
        return None if drawn is None else GymQuestion(*drawn)


def _try(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless questions under `options` are made in time and of a size that a model could read."""
    worker = _start_worker()
    try:
        reply = worker.call({"call": "try", "name": name, "options": dict(options), "cpu_s": TRIAL_CPU_S}, TRIAL_S)
    except TypeError as error:  # options that are no JSON
        raise ValueError(str(error)) from None
    except WorkerError as error:
        slow = error.status in (None, -signal.SIGXCPU, -signal.SIGKILL)
        raise ValueError(f"{TRIALS} questions take more than {TRIAL_CPU_S} s" if slow else str(error)) from None
    finally:
        worker.kill()
    if "error" in reply:
        raise ValueError(reply["error"])
    if reply["longest"] > MAX_QUESTION:
        raise ValueError(f"a question of {reply['longest']} characters; {MAX_QUESTION} are allowed")


def _start_worker() -> WorkerProcess:
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-P", "-m", "node.tasks.reasoning_gym.data_sets"]
    return WorkerProcess(command, {"PYTHONHASHSEED": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def main() -> None:
    """Draw or score for the node at the other end of a channel, under limits on processor time and memory."""
    channel, life = map(int, sys.argv[1:3])
    folder = make_folder()
    requests = connect(channel, life, folder=folder)
    request = requests.receive()
    if request["call"] == "load":
        yield_memory()
        bound_memory()
        serve_in_cages(
            requests, CageWork(_loaded, lambda _: {"code": version("reasoning-gym")}, _scored, request, "", ()), folder
        )
        return
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    while True:
        name, options = request["name"], request["options"]
        if request["call"] == "draw":
            requests.reply({"drawn": draw_here(name, options, request["seed"])})
        else:
            requests.reply(_trial(name, options, request["cpu_s"]))
        request = requests.receive()


def _loaded() -> Callable[..., Any]:
    from reasoning_gym.factory import create_dataset

    return create_dataset


def _scored(create: Callable[..., Any], request: Message) -> Message:
    """Score an answer; in a cage. What the data set's own scorer cannot read earns nothing."""
    data_set = create(request["name"], size=1, seed=0, **request["options"])
    with redirect_stdout(StringIO()):
        try:
            paid = data_set.score_answer(request["answer"], entry=json.loads(request["entry"]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return {"reward": 0.0}
    return {"reward": float(paid == 1)}


def _trial(name: str, options: Mapping[str, Any], cpu_s: int) -> Message:
    from reasoning_gym import factory  # noqa: F401  # so that its import is not counted as the questions' time

    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, used + cpu_s + 1))
    longest = 0
    for index in range(TRIALS):
        try:
            drawn = draw_here(name, options, derive_seed("trial", name, index))
        except MemoryError:
            return {"error": f"a question takes more than {TRIAL_BYTES >> 30} GiB"}
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            return {"error": str(error)}
        longest = max(longest, 0 if drawn is None else len(drawn.question))
    return {"longest": longest}


if __name__ == "__main__":
    main()
