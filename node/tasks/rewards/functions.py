"""Reward functions in TRL's form, called as TRL calls them, in a process of their own.

    def accuracy(prompts, completions, answer, **kwargs) -> list[float | None]: ...

A function is named by where it is:

    ./rewards.py:accuracy                            a Python file, of which the bytes count
    trl:think_format_reward                          one of `trl.rewards`
    package.module:function                          an installed package
    trl:get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
                                                     what a call returns, with plain values by name
    judge:http://127.0.0.1:8000/v1                   another model (`node.tasks.rewards.judge`)

It gets what TRL 1.16 hands over (`GRPOTrainer._calculate_rewards`): prompts, completions, completion_ids and the other
columns of the rows, each a list; `log_extra` and `log_metric`, which do nothing here; and `trainer_state`, which raises
when it is used, since the receiver of a group cannot know how far its maker was. A completion is a text, or one message
of an assistant where the row's prompt is a list of messages. Functions may be async. A node's own texts of a round are
paid in one call, a peer's each alone, in a list of one. Token ids are those of the task's tokenizer, without an end of
text; without one, a token is a character.

TRL's sum: each reward times its weight, None and NaN left out. The reward is this sum, or (sum - low) / (high - low)
where the task states a range; nothing is clipped. If no function can tell, the text is unscorable.

`python -m node.tasks.rewards.functions CHANNEL LIFE` is the process (`node.processes.worker_process`). It confines
itself before it loads anything of somebody's (`node.processes.confinement`), and pays in this process. Or it pays each
text in a cage (`node.processes.cage`): then it loads the functions and pays nothing itself.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from node.config import FUNCTION_FILE
from node.errors import UserError, one_line
from node.processes.confinement import ConfinementError, confine
from node.processes.threads import awaited
from node.processes.worker_process import Message, Requests
from node.tasks import is_reward, scaled
from node.tasks.rewards.judge import Judge
from node.tasks.scoring.caged import CODE_CHANGED, CageWork, serve_in_cages
from node.tasks.scoring.verdicts import begin_worker
from node.tasks.third_party import described, run_file

Prompt = str | list[dict[str, str]]
Reward = float | None
SHOWN = 60  # characters of what a function returned instead of rewards
TOLERANCE = 1e-6  # as between a peer's reward and ours (`node.rollouts.screening`)
JUDGE = "judge"
TRL = "trl.rewards"
HERE = "here"  # in place of a module: a function that a Python program gave (`node.api`)
HELD = ": functions use no network and change no file here, unless the option judge is true"
IN_CAGE = '(in a cage: say isolate = "none" if the functions only read texts) '
# Their versions decide what a formula is worth, and a function that uses one uses all.
MATH_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")


class Spec(NamedTuple):
    """Where a function is: a file, a module or a judge's URL; its name there, and what it is made with, if it is."""

    where: str
    name: str
    arguments: dict[str, object] | None = None


class Answered(NamedTuple):
    """A text to be paid, with its row: the prompt, and what the row has beside it."""

    prompt: Prompt
    columns: Mapping[str, object]
    text: str


def parse_spec(text: str) -> Spec:
    """Read how a function is named; `UserError` if it is not."""
    if text.startswith(f"{JUDGE}:"):
        return Spec(JUDGE, text.removeprefix(f"{JUDGE}:"))
    file = FUNCTION_FILE.fullmatch(text)
    where, colon, call = file.groups() if file else text.partition(":")
    name, opened, rest = call.partition("(")
    if not (where and colon and name.isidentifier()):
        hint = f"{text}:NAME" if text.endswith(".py") else "FILE.py:NAME, trl:NAME, MODULE:NAME or judge:URL"
        raise UserError(f"a reward function is named as {hint}, not {text!r}")
    return Spec(TRL if where == "trl" else where, name, _arguments(text, rest) if opened else None)


def _arguments(text: str, rest: str) -> dict[str, object]:
    try:
        parsed: Any = ast.parse(f"f({rest}", mode="eval").body
        if parsed.args or not all(keyword.arg for keyword in parsed.keywords):
            raise ValueError("without names")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in parsed.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise UserError(f"{text!r}: the arguments of a reward function are plain values by name: (limit=3)") from None


@dataclass(frozen=True, slots=True)
class Function:
    """A function that was loaded; `digest` names its code."""

    name: str
    call: Callable[..., Any]
    digest: str

    def pay(self, answers: Sequence[Answered], tokens: Callable[[str], list[int]]) -> list[Reward]:
        """Return its rewards of `answers`, with None for NaN; raise `RewardError` for what is no list of them."""
        return [None if reward is None or math.isnan(reward) else reward for reward in self.give(answers, tokens)]

    def give(self, answers: Sequence[Answered], tokens: Callable[[str], list[int]]) -> list[Reward]:
        """Return what it pays for `answers`, NaN included; raise `RewardError` for what is no list of rewards."""
        columns = {name: [answer.columns[name] for answer in answers] for name in answers[0].columns}
        try:
            called = self.call(
                prompts=[answer.prompt for answer in answers],
                completions=[completion(answer) for answer in answers],
                completion_ids=[tokens(answer.text) for answer in answers],
                **columns,
                trainer_state=_NoState(),
                log_extra=_log_nothing,
                log_metric=_log_nothing,
            )
            paid = awaited(called)
            given = None if isinstance(paid, str | bytes | Mapping) or not hasattr(paid, "__iter__") else list(paid)
        except Exception as error:  # it may raise anything
            raise RewardError(f"{self.name} {described(error)}") from error
        if given is None:
            raise RewardError(f"{self.name} returned {shown(paid)}: a reward function returns a list of rewards")
        if len(given) != len(answers):
            raise RewardError(f"{self.name} returned {len(given)} rewards for {len(answers)} completions")
        return [self._checked(reward) for reward in given]

    def _checked(self, given: Any) -> Reward:
        try:
            reward = None if given is None or isinstance(given, str | bytes) else float(given)
        except Exception:  # noqa: BLE001  # somebody's object may raise anything
            reward = None
        if (reward is None and given is not None) or not (reward is None or math.isnan(reward) or is_reward(reward)):
            raise RewardError(f"{self.name} returned {shown(given)} as a reward: a reward is a finite number or None")
        return reward


def shown(value: Any) -> str:
    """Return a value in a few words, for the line that says what a function returned."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # somebody's object may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... (a {type(value).__name__})"


class RewardError(Exception):
    """A reward function raised, or returned what is no reward; the text names it."""


class _NoState:
    """Stands for the trainer's state, which no receiver of a group can know."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"rewards here know no trainer_state.{name}, since peers that check a reward have another state"
        )


def _log_nothing(*_: object) -> None: ...


def completion(answered: Answered) -> str | list[dict[str, str]]:
    """Return a completion as TRL has it: a text, or a message in answer to messages."""
    if isinstance(answered.prompt, str):
        return answered.text
    return [{"role": "assistant", "content": answered.text}]


def load_function(task: str, spec: Spec, judge: Mapping[str, Any]) -> Function:
    """Return the function that `spec` names, of `task`.

    Raises:
        UserError: it is not there, or raises when it is made.
    """
    if spec.where == HERE:
        raise UserError(f"task {task!r}: its function {spec.name} was given in Python: start the node there")
    if spec.where == JUDGE:
        return Function(JUDGE, Judge(spec.name, **judge), "")
    try:
        if spec.where.endswith(".py"):
            module, digest = run_file(task, Path(spec.where))
        else:
            module = importlib.import_module(spec.where)
            digest = hashlib.sha256(Path(inspect.getfile(getattr(module, spec.name))).read_bytes()).hexdigest()
        function = getattr(module, spec.name)
    except UserError:
        raise
    except AttributeError:
        raise UserError(f"task {task!r}: {spec.where} has no reward function {spec.name!r}") from None
    except TypeError:  # `inspect.getfile` of an object whose class is not in a file
        raise UserError(f"task {task!r}: {spec.where}:{spec.name} is no function of a Python file") from None
    except Exception as error:  # importing a package may raise anything
        raise UserError(f"task {task!r}: {spec.where} {described(error)}") from error
    try:
        call = function if spec.arguments is None else function(**spec.arguments)
    except Exception as error:  # it may raise anything
        raise UserError(f"task {task!r}: {spec.name} {described(error)}") from error
    if not callable(call):
        raise UserError(f"task {task!r}: {spec.where} has no reward function {spec.name!r}")
    return Function(getattr(call, "__name__", spec.name), call, digest)


@dataclass(frozen=True, slots=True)
class Functions:
    """The functions of a task, and how their rewards become one.

    Args:
        functions: in order.
        weights: one for each.
        low, high: the weighted sums that are rewards of 0 and 1.
        tokens: returns the token ids of a text.
    """

    functions: Sequence[Function]
    weights: Sequence[float]
    low: float
    high: float
    tokens: Callable[[str], list[int]]

    @property
    def names(self) -> list[str]:
        """The functions' names, as TRL has them; a second one of a name is numbered."""
        names: list[str] = []
        for function in self.functions:
            before = sum(name == function.name or name.startswith(f"{function.name}_") for name in names)
            names.append(f"{function.name}_{before + 1}" if function.name in names else function.name)
        return names

    def score(self, answers: Sequence[Answered]) -> list[Message]:
        """Return the reward of each text, and what each function gave, by one call of each function.

        Raises:
            RewardError: a function raises or gives what is no reward, or none can tell about one of the texts.
        """
        given = [function.give(answers, self.tokens) for function in self.functions]
        return [self._summed(of_text) for of_text in zip(*given, strict=True)]

    def _summed(self, given: Sequence[Any]) -> Message:
        paid = [None if reward is None or math.isnan(reward) else reward for reward in given]
        parts = {name: reward for name, reward in zip(self.names, paid, strict=True) if reward is not None}
        total = weighted_sum(self.weights, paid)
        if total is None:
            raise RewardError(
                ", ".join(f"{name} returned {reward}" for name, reward in zip(self.names, given, strict=True))
            )
        reward = scaled(total, self.low, self.high)
        if not is_reward(reward):
            raise RewardError(f"the weighted sum {total:g} is no reward: it is too large")
        return {"reward": reward, "parts": parts}

    def trial(self, answers: Sequence[Answered]) -> tuple[list[list[Reward]], str, list[float]]:
        """Pay some texts twice: return each function's rewards, the first function that pays otherwise again, and the
        seconds that each took for a text.

        A judge is asked about one text, to see that it answers. What a first call loads is not in the seconds.

        Raises:
            RewardError: one raises, or pays a text by what stands beside it.
        """
        rewards: list[list[Reward]] = []
        unlike = ""
        seconds: list[float] = []
        for function, name in zip(self.functions, self.names, strict=True):
            if isinstance(function.call, Judge):
                began = time.perf_counter()
                function.pay(answers[:1], self.tokens)
                seconds.append(time.perf_counter() - began)
                rewards.append([])
                continue
            alone = [function.pay([answer], self.tokens)[0] for answer in answers]
            began = time.perf_counter()
            again = [function.pay([answer], self.tokens)[0] for answer in answers]
            seconds.append((time.perf_counter() - began) / len(answers))
            together = function.pay(answers, self.tokens)
            if not same(alone, again):
                unlike = unlike or name
            elif not same(alone, together):
                raise RewardError(f"{name} pays a completion by those beside it: here each is paid alone")
            rewards.append(alone)
        return rewards, unlike, seconds


def weighted_sum(weights: Sequence[float], paid: Sequence[Reward]) -> float | None:
    """Return the sum of what functions paid a text, by their weights; None if no function could tell."""
    terms = [weight * reward for weight, reward in zip(weights, paid, strict=True) if reward is not None]
    return sum(terms) if terms else None


def same(some: Sequence[Reward], others: Sequence[Reward]) -> bool:
    """Tell whether rewards are equal, as a receiver of a group compares them."""
    return len(some) == len(others) and all(
        reward is other if reward is None or other is None else abs(reward - other) <= TOLERANCE
        for reward, other in zip(some, others, strict=True)
    )


def trial_texts(prompt: Prompt, columns: Mapping[str, object]) -> list[str]:
    """Return some completions to try functions on: empty, the question, and the row's answer as models give it."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    answer = answer_of(columns) or "7"
    return ["", question, answer, f"<think>\nSo it is.\n</think>\n\\boxed{{{answer}}}"]


def answer_of(columns: Mapping[str, object]) -> str:
    """Return the answer that a row comes with, in its `solution` or `answer`; nothing if it has neither."""
    answer = columns.get("solution", columns.get("answer"))
    return answer if isinstance(answer, str) else "" if answer is None else json.dumps(answer)


def tokens_of(tokenizer: str) -> Callable[[str], list[int]]:
    """Return what turns a text into token ids: a tokenizer's file, or none, for which a token is a character."""
    if not tokenizer:
        return lambda text: list(map(ord, text))
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    return lambda text: loaded.encode(text, add_special_tokens=False).ids


def load_functions(request: Message) -> Functions:
    """Return the functions that a first message names; raise `UserError`."""
    functions = [
        load_function(request["task"], parse_spec(spec), request.get("judge", {})) for spec in request["functions"]
    ]
    low, high = request["range"]
    return Functions(functions, request["weights"], low, high, tokens_of(request["tokenizer"]))


def code_of(functions: Functions) -> Message:
    """Return what names the functions' code: the hash of each one's file, and versions of packages for formulas."""
    packages = MATH_PACKAGES if "math_verify" in sys.modules else ()
    return {
        "digests": [function.digest for function in functions.functions],
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    """Load a task's functions, then score for the node at the other end of a channel."""
    requests, request, folder = begin_worker()
    if request["isolate"] == "text":
        _pay_in_cages(requests, request, folder)
        return
    try:
        functions, reply = begin(request)
    except UserError as error:
        requests.reply(_refused(request, error))
        return
    requests.reply(reply)
    while True:
        requests.reply(_answered(request, functions, requests.receive()))


def _pay_in_cages(requests: Requests, request: Message, folder: Path) -> None:
    """Pay each text in a cage of its own."""
    load, answer = partial(load_functions, request), partial(_answered, request)

    def describe(functions: Functions) -> Message:
        return {"code": code_of(functions), "names": functions.names, "unconfined": ""}

    files = [spec.where for spec in map(parse_spec, request["functions"]) if spec.where.endswith(".py")]
    hint = "" if request["declared"] else IN_CAGE
    serve_in_cages(requests, CageWork(load, describe, answer, request, hint, [*files, request["tokenizer"]]), folder)


def begin(request: Message) -> tuple[Functions, Message]:
    """Confine this process if the first message says so, and load its functions; return what to reply.

    Raises:
        UserError: a function is not there, its code has changed, or this machine does not confine as it did.
    """
    unconfined = ""
    if request["confine"]:
        try:
            confine()
        except ConfinementError as error:
            unconfined = str(error)
    if unconfined and "code" in request:
        raise UserError(unconfined)  # it was confined when the node began
    functions = load_functions(request)
    code = code_of(functions)
    if request.get("code", code) != code:  # peers would take its rewards for lies
        raise UserError(CODE_CHANGED)
    return functions, {"code": code, "names": functions.names, "unconfined": unconfined}


def _answered(first: Message, functions: Functions, request: Message) -> Message:
    """Answer a request that follows a worker's first one."""
    return _tried(functions, first, request["rows"]) if request["call"] == "trial" else _scored(functions, request)


def _tried(functions: Functions, first: Message, rows: Sequence[tuple[Prompt, Mapping[str, object]]]) -> Message:
    answers = [Answered(*row, text) for row in rows for text in trial_texts(*row)]
    try:
        rewards, unlike, seconds = functions.trial(answers)
    except RewardError as error:
        return _refused(first, error)
    return {"trial": rewards, "unlike": unlike, "seconds": seconds}


def _refused(first: Message, error: Exception) -> Message:
    line = one_line(error)
    return {"error": f"{line}{HELD}" if first["confine"] and "Permission" in line else line}


def _scored(functions: Functions, request: Message) -> Message:
    """Reply to a request for one text, or for a batch."""
    try:
        if "batch" not in request:
            return functions.score([Answered(*request["answered"])])[0]
        return {"scored": functions.score([Answered(*entry["answered"]) for entry in request["batch"]])}
    except RewardError as error:
        return {"error": one_line(error)}


if __name__ == "__main__":
    main()
