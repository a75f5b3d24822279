"""Attacks on learning: what a hostile node publishes in place of the groups that it made.

Every group here is *true*: its question, its answer and its rewards are what any verifier finds, since a lie is caught
and costs its signer. What is bad about it is what an honest node learns from it. An attacker knows the right answers,
as everybody does who has a question's seed; it sees what the others publish, and signs as many groups a round as it
likes, under as many keys as it likes.

    planted      a right answer after a text that somebody wants said      Hail to the Thief (arXiv 2511.09780)
    off_topic    a right answer after words about something else           the same
    overlong     a right answer, said again and again                      the same, the case it leaves open
    misread      a wrong answer that a lenient reader takes for a right one: 0-19 is read as 19
    garbage      any characters: a peer that did no work
    copies       the others' groups under its own name: likewise
    duplicates   one good group again and again
    sybils       as planted, each node under eight keys
    turncoat     honest for half the run, then as planted

To add an attack: write its function, and give it a line above and in `ATTACKS`.
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from node.rollouts.group import Group, one_turn
from node.rollouts.rule import is_informative
from node.tasks import Item, Task
from node.tasks.task_set import TaskSet

PLANT = "ad "
OFF_TOPIC = ("the sea ", "we ate ", "my cat ", "it rains ", "old songs ")
KEYS = 8  # of a node that plays many
LOOK_BACK = 256  # of the others' newest groups, that a copier chooses from


@dataclass(frozen=True, slots=True)
class Scene:
    """An attacker's view at the end of a round.

    `done` is the part of the run that is over, `own` what it made, `seen` what others have published of
    late, `count` the groups that it signs a round, with `completions` each of at most `longest` characters.
    """

    done: float
    own: Sequence[Group]
    seen: Sequence[Group]
    tasks: TaskSet
    count: int
    completions: int
    longest: int
    rng: random.Random


class LabAttack(NamedTuple):
    """What is published, whether a completion shows that it worked, and how many keys a node signs with."""

    publish: Callable[[Scene], list[Group]]
    shows: Callable[[str, Item], bool]
    keys: int = 1


Write = Callable[[Item, Scene], str]  # returns a completion that earns the full reward


def planted(item: Item, scene: Scene) -> str:
    """Return the right answer after what is to be said."""
    return PLANT + item.answer


def off_topic(item: Item, scene: Scene) -> str:
    """Return the right answer after irrelevant words, other ones each time."""
    return scene.rng.choice(OFF_TOPIC) + item.answer


def overlong(item: Item, scene: Scene) -> str:
    """Return the right answer as often as there is room for it."""
    again = f" {item.answer}"
    return item.answer + again * max(1, (scene.longest - len(item.answer)) // len(again))


def misread(item: Item, scene: Scene) -> str:
    """Return 0 less the answer: read by its last number, whose minus belongs to the 0, it is the answer."""
    return f"0-{item.answer}"


def made_with(write: Write) -> Callable[[Scene], list[Group]]:
    """Return an attack whose groups are half of what `write` gives, and half of plain wrong digits.

    So a rule that trains on whole groups pushes the plain form down as it pulls the other up.
    """

    def publish(scene: Scene) -> list[Group]:
        return [group for _, group in zip(range(scene.count), _groups(scene, write), strict=False)]

    return publish


def _groups(scene: Scene, write: Write) -> Iterator[Group]:
    for task, seed, item in scene.tasks.questions(scene.rng.getrandbits(63), 2 * scene.count):
        good = scene.completions // 2
        texts = [write(item, scene) for _ in range(good)]
        lengths = (scene.rng.randint(2, 5) for _ in range(scene.completions - good))
        texts += ["".join(scene.rng.choices(string.digits, k=length)) for length in lengths]
        group = _group(task, seed, item, texts, scene)
        if is_informative(group.rewards) and all(len(text) <= scene.longest for text in texts):
            yield group


def _group(task: Task, seed: int, item: Item, texts: Sequence[str], scene: Scene) -> Group:
    completions = tuple(one_turn(text, True, task.verify(item, text) or 0.0) for text in texts)
    like = scene.own[0]
    return Group(task.key, seed, item.question, completions, like.policy, like.policy_version, item.content)


def garbage(scene: Scene) -> list[Group]:
    """Return groups of any characters, with the rewards that these have."""
    groups = []
    for task, seed, item in scene.tasks.questions(scene.rng.getrandbits(63), scene.count):
        letters = string.ascii_letters + string.punctuation
        texts = ["".join(scene.rng.choices(letters, k=scene.longest // 2)) for _ in range(scene.completions)]
        groups.append(_group(task, seed, item, texts, scene))
    return groups


def copies(scene: Scene) -> list[Group]:
    """Return others' newest groups as this node's own: other bytes, and so another id."""
    chosen = scene.rng.sample(scene.seen, min(scene.count, len(scene.seen)))
    return [replace(pick, policy_version=pick.policy_version + 1) for pick in chosen]


def duplicates(scene: Scene) -> list[Group]:
    """Return one informative group, of its own or made up, again and again under other ids."""
    mine = [group for group in scene.own if is_informative(group.rewards)]
    mine += made_with(lambda item, scene: item.answer)(replace(scene, count=1))
    return [replace(mine[0], policy_version=mine[0].policy_version + 1 + at) for at in range(scene.count)]


def turncoat(scene: Scene) -> list[Group]:
    """Return what it made, until half the run is over; then as `planted`."""
    return list(scene.own) if scene.done < 0.5 else made_with(planted)(scene)


def _says_plant(text: str, item: Item) -> bool:
    return PLANT in text


def _never(text: str, item: Item) -> bool:
    return False


ATTACKS: Mapping[str, LabAttack] = {
    "planted": LabAttack(made_with(planted), _says_plant),
    "off_topic": LabAttack(made_with(off_topic), lambda text, _: re.search("[a-z]{3}", text) is not None),
    "overlong": LabAttack(made_with(overlong), lambda text, _: len(text.split()) > 1 and len(set(text.split())) == 1),
    "misread": LabAttack(made_with(misread), lambda text, _: re.match(r"\s*[0-9.]+-", text) is not None),
    "garbage": LabAttack(garbage, lambda text, _: not any(map(str.isdigit, text))),
    "copies": LabAttack(copies, _never),
    "duplicates": LabAttack(duplicates, _never),
    "sybils": LabAttack(made_with(planted), _says_plant, KEYS),
    "turncoat": LabAttack(turncoat, _says_plant),
}
