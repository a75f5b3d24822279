"""Tasks: what is asked, and how an answer is judged without running it.

A task is a pure function from a seed to a question, and a verifier. It is named by `TaskKey`: two
nodes with equal keys make the same item from the same seed and give the same reward to the same
text, so a receiver can rebuild what a peer claims to have been asked instead of believing it.

    answers          reading and comparing answers that a model wrote
    questions        which questions are the same, and which are held out for evaluation
    quotations       does a text give away a question and its answer
    task_set         the tasks of a node: what training asks next, what evaluation asks
    prompting        around any task: solved examples, an instruction, where its answer is read
    choices          what a swarm's founder may choose for who joins
    scoring/         what an answer earns; other people's code scores in worker processes, in a cage
    check            what `gossamer tasks check` tries
    fuzz             what it tries to fool a verifier with

The kinds of tasks:

    builtin/         small families, natural arithmetic and a game, in the standard library only
    dataset          questions and answers from a file, or from a set on the hub
    rewards/         rows and reward functions in TRL's form
    environments/    tasks of several turns; rows and environments in TRL's form, with tools
    reasoning_gym/   data sets of reasoning-gym, with scorers of our own, or its own in a cage
    verifiers/       task sets of verifiers, scored and played in processes of their own
    third_party      a Python file of yours, and entry points of installed packages

`load_tasks` goes from the `tasks` table of a configuration to the tasks themselves, by `KINDS`. Any other name is an
entry point in the group `gossamer.tasks`, which is called with the options.

To add a kind of task: write its file with a `load_...` that returns a `Task`. Give the file a line above, and the kind
one in `KINDS` and in the table of docs/tasks.md. If its options name files of this machine, name it in `is_file_task`
of node/config.py too, which makes their paths absolute. A swarm's founder may choose numbers and booleans of its
options, and no text: see `node.tasks.choices` for more.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from node.config import AnswerMode, TaskConfig
from node.tasks.questions import DEFAULT_SPLIT, Split

if TYPE_CHECKING:
    from node.tasks.environments.episodes import StartEpisode
    from node.tasks.task_set import TaskSet

MAX_QUESTION_BYTES = 64 << 10
MAX_REWARD = 1e15  # so that the squares of a round's rewards are numbers of single precision
UNIT = (0.0, 1.0)
ROUNDING = 1e-9  # of a sum of weighted rewards that would be 0 or 1


Isolate = Literal["none", "text"] | None


class TaskKey(NamedTuple):
    """Identity of a task: its name, the version of its code, the hash of its configuration."""

    name: str
    version: int
    config: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    `question` is what the policy is asked, `system` an optional instruction before it, and
    `examples` are solved questions to show before it, each with its answer as a completion
    should give it; both are how this node asks its own model, and no verifier goes by them.
    `answer` is the ground truth, private to the verifier; `solution` is a right
    answer where `answer` is not one itself. `content` names all that the verifier goes by, where
    a seed does not: it travels with a group, and a node with other content has another question.
    `tools` are those that the policy may call, as a JSON list of schemas that a chat template takes.
    """

    question: str
    answer: str
    system: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    solution: str = ""
    content: str = ""
    tools: str = ""


class Task(Protocol):
    """A family of questions with a verifier. Both methods are pure and deterministic.

    It may say more of itself in attributes:

        answer_mode   the form in which `verify` looks for an answer, one of the modes of `node.tasks.answers`;
                      without it, the bare answer must be right
        size          how many rows it has, if it has rows: then `make(i)` is row i, and training goes through them by
                      epochs
        test_ids      ids (`node.tasks.questions`) of its own test questions: these are held out, in place of those
                      that the hash chooses
        unshared      why its groups stay at home: they train their maker, are not published, and no peer's is taken;
                      without it, or where it is empty, they are shared
        range         the two numbers that a person knows as rewards 0 and 1; without it, these
        outside       what it pays outside of 0 to 1, as far as was found when it was loaded; a line for a person
        submit        queues texts for worker processes (`node.tasks.scoring.verdicts.Submit`); other people's tasks get
                      theirs when they are loaded
        verify_together  scores several of this node's own texts in one call (`node.tasks.scoring.verdicts.Together`)
        start         begins an episode of several turns, which then takes the place of `verify`; and
        replayable    whether peers may play it again: see `node.tasks.environments.episodes`
        judge         whether somebody's `verify` and episodes need the network, or write files: then they are not
                      confined, and the task is not shared
        isolate       "none" if they only read texts, "text" if they run some; without it, nobody knows: a peer's text
                      is scored in a cage unless it is "none" (`node.tasks.scoring.caged`)
    """

    @property
    def key(self) -> TaskKey: ...

    def make(self, seed: int) -> Item:
        """Return the item that `seed` (0 <= seed < 2**63) stands for."""
        ...

    def verify(self, item: Item, text: str) -> float | None:
        """Return the reward of `text`; None where it cannot be scored here. Never executes the text.

        1 is wholly right, and 0 is nothing. Any other number of at most `MAX_REWARD` trains its maker as it is, and its
        group is not shared if it is outside of 0 to 1.
        """
        ...


def is_reward(value: Any) -> bool:
    """Tell whether a value is a number of at most `MAX_REWARD`."""
    return isinstance(value, Real) and -MAX_REWARD <= value <= MAX_REWARD  # type: ignore[operator]  # as numbers do


def is_in_range(reward: float) -> bool:
    """Tell whether a group with this reward may be shared: peers take no others."""
    return 0 <= reward <= 1


def scaled(total: float, low: float, high: float) -> float:
    """Return the reward of a sum, where sums of `low` and `high` are rewards of 0 and 1."""
    reward = (total - low) / (high - low)
    nearest = 0.0 if reward < 0.5 else 1.0
    return nearest if abs(reward - nearest) < ROUNDING else reward


def told_outside(task: str, reward: float, parts: Mapping[str, float], bounds: tuple[float, float]) -> str:
    """Return a line on a reward outside of 0 to 1 of a task that is shared.

    Args:
        task: its name.
        reward: the reward.
        parts: what each function paid, if the task has functions.
        bounds: the task's `range`.
    """
    low, high = bounds
    whose = f" ({', '.join(f'{name} {part:g}' for name, part in parts.items())})" if parts else ""
    return (
        f"task {task!r} pays {low + reward * (high - low):g}{whose}, outside of its range {low:g} to {high:g}: groups "
        "with such rewards train this node and are not shared; set the option range, or scale what it pays"
    )


def is_text(value: object) -> bool:
    """Tell whether a value is a text that UTF-8 can hold: one without half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A task around another one, whose attributes it has unless it defines them anew."""

    base: Task

    @property
    def answer_mode(self) -> AnswerMode:
        """The form in which `verify` looks for an answer."""
        return getattr(self.base, "answer_mode", "whole")

    @property
    def size(self) -> int | None:
        """How many rows the task has; None if it makes a question of any seed."""
        return getattr(self.base, "size", None)

    @property
    def test_ids(self) -> frozenset[bytes] | None:
        """The ids of the task's own test questions; None if it has none of its own."""
        return getattr(self.base, "test_ids", None)

    @property
    def unshared(self) -> str:
        """Why the task's groups are not shared with peers; empty if they are."""
        return getattr(self.base, "unshared", "")

    @property
    def range(self) -> tuple[float, float]:
        """The numbers that a person knows as rewards 0 and 1."""
        return getattr(self.base, "range", UNIT)

    @property
    def outside(self) -> str:
        """What it was found to pay outside of 0 to 1, in a line for a person."""
        return getattr(self.base, "outside", "")

    @property
    def start(self) -> "StartEpisode | None":
        """Begins an episode; None if the task has no environment."""
        return getattr(self.base, "start", None)

    @property
    def replayable(self) -> bool:
        """Whether peers may play its episodes again."""
        return getattr(self.base, "replayable", False)

    @property
    def judge(self) -> bool:
        """Whether `verify` and episodes get the network and files to write."""
        return getattr(self.base, "judge", False)

    @property
    def isolate(self) -> Isolate:
        """What `verify` and episodes do with texts; None where nobody knows."""
        return getattr(self.base, "isolate", None)


def config_hash(config: Mapping[str, object]) -> str:
    """Return 16 hex digits that name a task's configuration (canonical JSON, SHA-256)."""
    canonical = json.dumps(dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from `parts` by hash, so that neighbours give unrelated streams."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def load_tasks(
    configs: Sequence[TaskConfig],
    split: Split = DEFAULT_SPLIT,
    trained: "TaskSet | None" = None,
    given: Mapping[str, Task] = MappingProxyType({}),
) -> "TaskSet":
    """Build the tasks that `configs` name; other people's tasks score in worker processes.

    Args:
        configs: of the tasks.
        split: which questions are held out for evaluation.
        trained: the tasks that are trained on, if they are others: an evaluation leaves their questions out.
        given: tasks of this process by their names: they are not loaded, whatever their options say.

    Raises:
        UserError: an unknown name, a bad option, a missing file or a missing extra.
    """
    from node.tasks.prompting import prompted
    from node.tasks.scoring.verdicts import isolated
    from node.tasks.task_set import HeldOut, TaskSet
    from node.tasks.third_party import ThirdPartyTask

    loaded = [
        (config, task, weight)
        for config in configs
        for task, weight in ([(given[config.name], config.weight)] if config.name in given else _load(config))
    ]
    held_out = HeldOut([task for _, task, _ in loaded], split)
    tasks = []
    for config, task, weight in loaded:
        scored = task
        if isinstance(task, ThirdPartyTask):
            scored = isolated(replace(task, held_out=held_out), config, is_here=config.name in given)
        tasks.append((prompted(scored, config, held_out), weight))
    return TaskSet(tasks, split, trained)


def load_task(config: TaskConfig) -> Task:
    """Return the one task that `config` names, without prompting around it; it scores in this process.

    Raises as `load_tasks` does.
    """
    ((task, _),) = _load(config)
    return task


def _load(config: TaskConfig) -> Iterator[tuple[Task, float]]:
    from node.tasks import third_party

    kind = kind_of(config.name)
    tasks = kind.load(config.name, config.options) if kind else []
    for task in tasks or [third_party.load_entry_point(config)]:
        yield task, config.weight / max(len(tasks), 1)


Options = Mapping[str, Any]


class TaskKind(NamedTuple):
    """A kind of task. Its own name is what a task's name begins with, up to the first "/".

    `load` takes a task's name and options. It returns the task, several for a name that stands for several, or none for
    an unknown name. `names` are those that `gossamer tasks list` shows.
    """

    load: Callable[[str, Options], Sequence[Task]]
    names: Callable[[], Sequence[str]] = list
    own_code: str = ""  # the owner's code that it runs: no founder of a swarm chooses that
    code_option: str = ""  # the option that names the code
    package_code: bool = False  # it runs code of an installed package
    own_options: frozenset[str] = frozenset()  # options that each node sets for itself: they are in no manifest
    safe_texts: frozenset[str] = frozenset()  # options whose text a founder may choose, as it names nothing here
    may_choose: Callable[[str, str, Any], bool] | None = None  # a task's name, option, value: may a founder choose it?


def _builtin() -> Mapping[str, Callable[..., Task]]:
    """Return the built-in tasks by name, each a function of the options."""
    from node.tasks.builtin import families, guess

    by_name = {f"builtin/{name}": family for name, family in families.BY_NAME.items()}
    return by_name | {
        "builtin/arithmetic": lambda **options: families.load_arithmetic(options),
        guess.NAME: guess.load_guess,
    }


def _load_builtin(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.builtin.families import FAMILIES

    if name == "builtin":
        return [family(**options) for family in FAMILIES.values()]
    named = _builtin()
    return [named[name](**options)] if name in named else []


def _load_dataset(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.dataset import load_dataset

    return [load_dataset(name, options)]


def _load_rewards(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.rewards.rows import load_rewards

    return [load_rewards(name, options)]


def _load_environment(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.environments.trl import load_environment

    return [load_environment(name, options)]


def _load_file(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.third_party import load_file

    return [load_file(name, options)]


def _load_reasoning_gym(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.reasoning_gym.data_sets import load_reasoning_gym

    _, _, data_set = name.partition("/")
    return [load_reasoning_gym(data_set, options)] if data_set else []


def _load_verifiers(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.verifiers.task_sets import load_verifiers

    _, _, task_set = name.partition("/")
    return [load_verifiers(task_set, options)] if task_set else []


def _gym_names() -> Sequence[str]:
    from node.tasks.reasoning_gym.data_sets import SCORERS

    return [f"reasoning-gym/{name}" for name in sorted(SCORERS)] if find_spec("reasoning_gym") else []


def _gym_may_choose(name: str, option: str, value: Any) -> bool:
    from node.tasks.reasoning_gym.data_sets import may_choose

    _, _, data_set = name.partition("/")
    return may_choose(data_set, option, value)


KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        # Small families in the standard library only. "builtin" is seven of them, which share the weight.
        "builtin": TaskKind(
            _load_builtin,
            lambda: ["builtin", *_builtin()],
            safe_texts=frozenset({"operations"}),  # out of +-*
        ),
        # Questions and answers from a file, or from a set on the hub. dataset/LABEL: the label is free, here and below.
        "dataset": TaskKind(
            _load_dataset,
            lambda: ["dataset"],
            safe_texts=frozenset({"system"}),  # an instruction
        ),
        # Rows and an environment in TRL's form.
        "environment": TaskKind(_load_environment, lambda: ["environment"], "an environment", "factory"),
        # A Python file of yours.
        "file": TaskKind(_load_file, lambda: ["file"]),
        # Rows and reward functions in TRL's form.
        "rewards": TaskKind(_load_rewards, lambda: ["rewards"], "reward functions", "functions"),
        # Data sets of reasoning-gym (an extra): reasoning-gym/NAME.
        "reasoning-gym": TaskKind(_load_reasoning_gym, _gym_names, may_choose=_gym_may_choose),
        # Installed task sets of verifiers (an extra): verifiers/NAME.
        "verifiers": TaskKind(_load_verifiers, package_code=True, own_options=frozenset({"isolate"})),
    }
)


def kind_of(name: str) -> TaskKind | None:
    """Return the kind of a task of this name; None for an entry point's."""
    return KINDS.get(name.partition("/")[0])


def has_own_code(name: str) -> bool:
    """Tell whether a task of this name runs code that its options name: a node's owner chooses it, and no founder."""
    kind = kind_of(name)
    return kind is not None and bool(kind.own_code)


def own_options(name: str) -> frozenset[str]:
    """Return the options of the task `name` that each node sets for itself."""
    kind = kind_of(name)
    return frozenset() if kind is None else kind.own_options


def founder_may_choose(name: str, option: str, value: Any) -> bool:
    """Tell whether a swarm's founder may give `option` of the task `name` this value of JSON at a joiner's."""
    from node.tasks.choices import is_plain, is_safe_text

    kind = kind_of(name)
    if kind is not None and option in kind.safe_texts:
        return is_safe_text(value)
    if kind is not None and kind.may_choose is not None:
        return kind.may_choose(name, option, value)
    return is_plain(value)


def task_names() -> list[str]:
    """Return the names of all kinds of task that there are here, entry points included."""
    from node.tasks.third_party import installed

    return [*(name for kind in KINDS.values() for name in kind.names()), *sorted(installed())]
