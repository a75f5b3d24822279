"""Around any task: solved examples before the question, an instruction, and where the answer is read.

The examples of a question are questions of the same task whose seeds are derived by hash from its own,
so they are the same whenever it is asked. None of them is held out for evaluation. How they are laid out, as turns of
a chat or as plain text, is the policy's matter (`node.policy.prompt`).

Examples and instruction are each node's own choice. They do not change what a text earns, so nodes that ask differently
have the same task, and train a peer's completion as an answer to their own prompt. Where the answer is read decides
what a text earns: it is part of the configuration hash.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from node.config import AnswerMode, TaskConfig
from node.errors import UserError
from node.tasks import Item, Task, TaskKey, Wrapper, config_hash, derive_seed
from node.tasks.answers import INSTRUCTIONS, READERS, show
from node.tasks.environments.episodes import start_of
from node.tasks.scoring.verdicts import Submission, Submit, Together, Verdict, already, submit_of
from node.tasks.task_set import HeldOut

VERSION = 1
DRAWS = 16  # seeds tried for each example: its question may repeat another one, or be held out
TRIALS = 4  # questions on which a task is tried when it is loaded
MORE = "So it is."  # text around an answer, to try whether a task takes more than the answer


@dataclass(frozen=True, slots=True)
class Prompted(Wrapper):
    """A task with `count` examples before each question, read by `mode`, under `instruction` if that is not None."""

    key: TaskKey
    count: int
    mode: AnswerMode | None
    instruction: str | None
    held_out: HeldOut

    @property
    def bare(self) -> Task:
        """The task itself: its questions are the same, without examples."""
        return self.base

    @property
    def submit(self) -> Submit | None:
        """Queues texts for worker processes; None if the task scores in this process."""
        submit = submit_of(self.base)
        if submit is None or self.mode is None:
            return submit

        def read_first(batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
            answers = self._read_all(batch)
            futures = iter(submit([answer for answer in answers if answer is not None], is_own))
            return [already(0.0) if answer is None else next(futures) for answer in answers]

        return read_first

    @property
    def verify_together(self) -> Together | None:
        """Scores several own texts in one call, in this process; None if the task has no such call."""
        together: Together | None = getattr(self.base, "verify_together", None)
        if together is None or self.mode is None:
            return together

        def read_first(batch: Sequence[Submission]) -> list[Verdict]:
            answers = self._read_all(batch)
            readable = [answer for answer in answers if answer is not None]
            verdicts = iter(together(readable) if readable else [])
            return [0.0 if answer is None else next(verdicts) for answer in answers]

        return read_first

    @property
    def answer_mode(self) -> AnswerMode:
        """The form in which `verify` looks for an answer."""
        return self.mode or own_mode(self.base)

    def make(self, seed: int) -> Item:
        """Return the item of `seed`; it has fewer examples where the task hardly has other questions.

        Without examples of this node's, the task's own stay.
        """
        item = self.base.make(seed)
        shown: dict[str, str] = {}
        for attempt in range(self.count * DRAWS):
            if len(shown) == self.count:
                break
            example = self.base.make(derive_seed("example", *self.key, seed, attempt))
            if example.question != item.question and not self.held_out(self.key.name, example.question):
                shown.setdefault(example.question, show(solution(example), self.answer_mode))
        return replace(item, system=self._system(item), examples=tuple(shown.items()) or item.examples)

    def verify(self, item: Item, text: str) -> Verdict:
        read = self._read(text)
        return 0.0 if read is None else self.base.verify(item, read)

    def _read(self, text: str) -> str | None:
        """Return the answer in `text`, in the form that the task itself looks for; None if there is no answer."""
        if self.mode is None:
            return text
        answer = READERS[self.mode](text)
        return None if answer is None else show(answer, own_mode(self.base))

    def _read_all(self, batch: Sequence[Submission]) -> list[Submission | None]:
        """Return the texts of `batch` as `_read` returns them."""
        return [None if (text := self._read(answer.text)) is None else answer._replace(text=text) for answer in batch]

    def _system(self, item: Item) -> str:
        if self.instruction is not None:
            return self.instruction
        # A task that tells the form of its own mode tells that of the chosen one.
        return item.system.replace(INSTRUCTIONS[own_mode(self.base)], INSTRUCTIONS[self.answer_mode])


def prompted(task: Task, config: TaskConfig, held_out: HeldOut | None = None) -> Task:
    """Return `task` as `config` wants it asked and read.

    No example is one of the questions that are `held_out`; None: those of the task alone, by the default split.

    Raises `UserError` if its own right answers earn nothing when read so, or it has too few questions for the examples.
    """
    if not config.prompting:
        return task
    key = task.key
    if config.answer is not None:
        if start_of(task) is not None:
            raise UserError(f"task {key.name!r} has an environment, which reads its turns itself: leave out answer")
        read = {"prompting": VERSION, "task": key.config, "answer": config.answer}
        key = key._replace(config=config_hash(read))
    wrapped = Prompted(task, key, config.examples, config.answer, config.instruction, held_out or HeldOut([task]))
    for trial in range(TRIALS):
        _check(wrapped, wrapped.make(derive_seed("trial", *key, trial)))
    return wrapped


def solution(item: Item) -> str:
    """Return a right answer to `item`, bare; empty where the task has none to show."""
    return item.solution or item.answer


def _check(task: Prompted, item: Item) -> None:
    name = task.key.name
    if len(item.examples) < task.count:
        raise UserError(f"task {name!r} has too few different questions for {task.count} examples: set fewer")
    if not solution(item):
        if task.count:
            raise UserError(f"task {name!r} shows no answers to its questions: leave out examples")
    elif task.mode is not None:
        verdict = task.verify(item, show(solution(item), task.mode))
        if verdict is None:
            raise UserError(f"task {name!r} could not score an answer of its own: the log says why")
        if verdict != 1.0:
            raise UserError(f"task {name!r} has answers that answer={task.mode!r} does not read: choose another")


def takes_more(task: Task, item: Item) -> bool:
    """Tell whether a task also pays the right answer with text before or after it.

    It is tried, as a task that names no mode, such as a data set, may read answers in several.
    """
    if own_mode(task) != "whole":
        return True
    shown = {show(item.answer, mode) for mode in READERS}
    texts = (text for answer in shown for text in (f"{MORE}\n{answer}", f"{answer}\n{MORE}"))
    return any((task.verify(item, text) or 0.0) >= 1.0 for text in texts)


def own_mode(task: Task) -> AnswerMode:
    """Return the form in which the task's `verify` looks for an answer."""
    return getattr(task, "answer_mode", "whole")
