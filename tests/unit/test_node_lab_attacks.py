"""Attacks on learning: each group is true, and shows what it is to teach; who copies or repeats gains nothing."""

import json
import random
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from node.config import NodeConfig, TaskConfig, parse_config
from node.errors import UserError
from node.lab.attacks import ATTACKS, KEYS, PLANT, Scene
from node.lab.damage import Witness, read_seen, tabulate, to_json, to_markdown
from node.lab.lockstep import HostileExchange, Mail
from node.lab.plan import AttackConfig, Run, read_lab
from node.lab.trials import Trials, read_trials
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, as_received
from node.rollouts.rule import is_informative
from node.rollouts.screening import check
from node.tasks import load_tasks
from node.tasks.task_set import TaskSet

NUMERALS = ("sums", "decimals")
LENIENT = [TaskConfig(name=f"builtin/{name}", answer="last_number") for name in NUMERALS]
STRICT = [TaskConfig(name=f"builtin/{name}") for name in NUMERALS]
LONGEST = 15


def honest_group(tasks: TaskSet, seed: int, texts: tuple[str, ...] = ("", "7")) -> Group:
    """A group of the first task, on a question of the training's: its answer before `texts[0]`, and other texts."""
    task = tasks.tasks[0]
    seed = next(group for group in count(100 * seed) if not tasks.is_held_out(task, task.make(group).question))
    item = task.make(seed)
    first, *others = texts
    made = [one_turn(text, True, task.verify(item, text)) for text in (item.answer + first, *others)]
    return Group(task.key, seed, item.question, tuple(made), "p", 3)


def scene_of(tasks: TaskSet, done: float = 1.0, seed: int = 0) -> Scene:
    own = [honest_group(tasks, 1), honest_group(tasks, 2)]
    seen = [honest_group(tasks, at) for at in range(10, 20)]
    return Scene(done, own, seen, tasks, 6, 4, LONGEST, random.Random(seed))


@pytest.mark.parametrize("kind", ATTACKS)
def test_what_an_attack_publishes_is_true_and_no_larger_than_an_honest_group(kind: str) -> None:
    tasks = load_tasks(LENIENT)
    found = ATTACKS[kind].publish(scene_of(tasks))
    assert len(found) == 6
    for group in found:
        assert check(encode(group), tasks, 8) == (group, "")  # no lie, and not on a held-out question
        assert all(len(completion.text) <= LONGEST for completion in group.completions)


@pytest.mark.parametrize("kind", ["planted", "off_topic", "overlong", "misread", "sybils", "turncoat"])
def test_every_right_answer_of_it_shows_what_it_is_to_teach_and_no_honest_one_does(kind: str) -> None:
    tasks = load_tasks(LENIENT)
    attack = ATTACKS[kind]
    for group in attack.publish(scene_of(tasks)):
        item = tasks.get(group.task).make(group.seed)
        assert is_informative(group.rewards)
        for completion in group.completions:
            assert attack.shows(completion.text, item) == (completion.reward == 1.0)
        assert not attack.shows(item.answer, item)


def test_where_the_bare_answer_must_be_right_there_is_room_for_blanks_and_for_nothing_else() -> None:
    tasks = load_tasks(STRICT)
    for kind in ("planted", "off_topic", "overlong", "misread"):
        assert ATTACKS[kind].publish(scene_of(tasks)) == []
    task = tasks.tasks[0]
    item = task.make(1)
    assert task.verify(item, f"   {item.answer}  ") == 1.0


def test_a_misread_answer_is_wrong_where_it_is_read_as_a_whole() -> None:
    lenient, strict = load_tasks(LENIENT), load_tasks(STRICT)
    for group in ATTACKS["misread"].publish(scene_of(lenient)):
        (task,) = [task for task in strict.tasks if task.key.name == group.task.name]
        assert not any(task.verify(task.make(group.seed), completion.text) for completion in group.completions)


def test_a_turncoat_is_honest_until_half_the_run_is_over() -> None:
    tasks = load_tasks(LENIENT)
    scene = scene_of(tasks, done=0.4)
    assert ATTACKS["turncoat"].publish(scene) == scene.own


def test_garbage_has_no_advantage_and_so_is_never_drawn() -> None:
    tasks = load_tasks(LENIENT)
    assert not any(is_informative(group.rewards) for group in ATTACKS["garbage"].publish(scene_of(tasks)))


@pytest.mark.parametrize("kind", ["copies", "duplicates"])
def test_who_copies_or_repeats_groups_has_none_drawn_beside_what_it_repeats(kind: str, tmp_path: Path) -> None:
    tasks = load_tasks(LENIENT)
    scene = scene_of(tasks)
    found = ATTACKS[kind].publish(scene)
    originals = [*scene.seen, *scene.own]
    assert len(set(found)) == len(found) and not set(found) & set(originals)
    with GroupBuffer(tmp_path / "pool.sqlite", NodeConfig().buffer) as buffer:
        buffer.add([as_received(original, 1.0)._replace(peer="honest") for original in originals], 1.0, 1)
        buffer.add([as_received(group, 2.0)._replace(peer="hostile") for group in found], 2.0, 1)
        drawn = Counter(candidate.peer for candidate in buffer.candidates(2.0, 1))
    assert drawn == {"honest": len(originals)}


def node_config() -> NodeConfig:
    return parse_config(
        {
            "seed": 1,
            "rounds": 2,
            "engine": {"max_completion_length": LONGEST + 1},
            "sampling": {"local": 1, "completions": 4},
        }
    )


def test_a_hostile_node_posts_its_attacks_groups_under_its_keys_and_none_of_its_own() -> None:
    tasks = load_tasks(LENIENT)
    mail = Mail(tasks, 8, delay=0)
    attack = AttackConfig(kind="sybils", nodes=1, groups=2 * KEYS)
    hostile, honest = HostileExchange(mail, 1, attack, node_config()), mail.exchange(0)
    for _ in range(2):
        honest.publish([honest_group(tasks, 1)])
        hostile.publish([honest_group(tasks, 2)])
    came = honest.receive(dict[bytes, bool]().__contains__)
    assert Counter(candidate.peer for candidate in came) == {f"n1.{key}" if key else "n1": 2 for key in range(KEYS)}
    assert all(received.group.completions[0].text.startswith(PLANT) for received in came)
    assert len({received.group.seed for received in came}) == len(came)


def test_the_witness_counts_the_completions_that_show_it_by_round(tmp_path: Path) -> None:
    tasks = load_tasks(LENIENT)
    witness = Witness(tasks)
    mail = Mail(tasks, 8, delay=0)
    exchange = mail.exchange(0, witness)
    exchange.publish([honest_group(tasks, 1)])
    exchange.publish([honest_group(tasks, 2, (" and so on", "the end", "3", "4")), honest_group(tasks, 3)])
    witness.write(tmp_path, 5)
    seen = read_seen(tmp_path)
    assert (seen.honest, seen.made) == (5, [2, 6])
    assert seen.shown["off_topic"] == [0, 2] and seen.shown["garbage"] == [0, 1]
    assert (seen.share("off_topic", 1), seen.share("off_topic", 2)) == (2 / 6, 2 / 8)


FILE = """
nodes = 3
runner = "memory"
[settings]
rounds = 1
[arms.control]
[arms.planted]
attack = { kind = "planted", nodes = 1 }
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"planted"', '"charm"', "there is no attack 'charm'"),
        ("nodes = 1 }", "nodes = 3 }", "of 3 nodes 3 are hostile"),
        ('"memory"', '"processes"', "delay, attack, control, moments, pace and begins are of the runner 'memory' only"),
    ],
)
def test_an_attack_of_no_use_is_refused_in_a_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "lab.toml").write_text(FILE)
    assert [run.attack and run.attack.kind for run in read_lab(tmp_path / "lab.toml", tmp_path).runs[:2]] == [
        None,
        "planted",
    ]
    (tmp_path / "lab.toml").write_text(FILE.replace(old, new))
    with pytest.raises(UserError, match=said) as error:
        read_lab(tmp_path / "lab.toml", tmp_path)
    assert "\n" not in str(error.value)


TRIALS = """
nodes = 4
seeds = [3, 5]
last = 2
[settings]
rounds = 3
eval.every = "ends"
[defences.none]
[defences.length]
settings.sampling.max_length_ratio = 2
[[trials]]
attacks = ["planted"]
defences = ["none", "length"]
hostile = [1, 2]
[[trials]]
attacks = ["overlong"]
defences = ["length"]
hostile = [1]
"""


def trials_of(folder: Path, text: str = TRIALS, **named: list[str]) -> Trials:
    (folder / "attacks.toml").write_text(text)
    return read_trials(folder / "attacks.toml", folder / "out", **named)


def test_a_file_of_attacks_has_each_attack_on_each_defence_and_the_honest_nodes_alone(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    runs = trials.lab.runs
    assert len(runs) == len({run.folder for run in runs}) == 2 * (4 + 4 + 1)
    assert {(run.nodes, run.attack and run.attack.nodes) for run in runs} == {(3, None), (2, None), (4, 1), (4, 2)}
    (last,) = [trial for trial in trials.trials if trial.attack == "overlong"]
    assert [run.seed for run in trials.runs_of(last)] == [3, 5]
    assert [run.nodes for run in trials.runs_of(trials.control_of(last))] == [3, 3]
    assert {run.settings["sampling"]["max_length_ratio"] for run in trials.runs_of(last)} == {2}
    assert len(trials_of(tmp_path, overrides=["seeds=1"]).lab.runs) == 9


def test_a_trial_may_be_of_another_number_of_nodes_and_is_held_against_a_control_of_its_own(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, f"{TRIALS}nodes = 6\n")
    (last,) = [trial for trial in trials.trials if trial.attack == "overlong"]
    assert {(run.nodes, run.attack and run.attack.nodes) for run in trials.runs_of(last)} == {(6, 1)}
    assert [run.nodes for run in trials.runs_of(trials.control_of(last))] == [5, 5]
    assert len(trials.lab.runs) == len({run.folder for run in trials.lab.runs}) == 2 * (4 + 4 + 2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"overlong"', '"charm"', "has no attack 'charm'"),
        ('defences = ["length"]', 'defences = ["x"]', "has no defence 'x'"),
        ("hostile = [1]", "hostile = [4]", "hostile wants numbers from 1 to 3"),
        ("last = 2", "lest = 2", "lest"),
        ('eval.every = "ends"', "eval.every = 0", "are not evaluated at the end"),
        ("max_length_ratio = 2", "max_lenght_ratio = 2", "unknown configuration key"),
    ],
)
def test_a_file_of_attacks_of_no_use_is_refused_in_a_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        trials_of(tmp_path, TRIALS.replace(old, new))
    assert "\n" not in str(error.value)


def leave(run: Run, accuracy: float, shown: list[int]) -> None:
    """Write what a run leaves: two rounds of ten honest completions, of which so many show the marks of `planted`."""
    honest = run.nodes - (run.attack.nodes if run.attack else 0)
    for index in range(run.nodes):
        node = run.folder / "nodes" / f"n{index}"
        node.mkdir(parents=True)
        value = accuracy if index < honest else 0.0  # what hostile nodes come to is nobody's loss
        (node / "evaluations.jsonl").write_text(
            "".join(json.dumps({"round": at, "accuracy": at * value}) + "\n" for at in (0, 1))
        )
        (node / "metrics.jsonl").write_text(json.dumps({"round": 1, "tokens_generated": 4, "tokens_trained": 2}) + "\n")
    none = {kind: [0, 0, 0] for kind in ATTACKS}
    tree = {"honest": honest, "made": [10, 10, 10], "shown": none | {"planted": shown}}
    (run.folder / "attack.json").write_text(json.dumps(tree))


def test_an_attack_is_held_against_the_honest_nodes_alone_over_the_last_rounds_of_each_seed(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    for run in trials.lab.runs:
        hit = run.attack is not None and run.attack.nodes == 2
        leave(run, (0.2 if run.seed == 3 else 0.3) if hit else 0.4, [0, 6, 8] if hit else [9, 0, 1])
    lines = tabulate(trials)
    by_name = {line.trial.arm: line for line in lines}
    hit = by_name["none, 2 planted of 4"]
    assert (hit.success.mean, hit.unattacked.mean, hit.accuracy.mean) == (0.7, 0.05, 0.25)
    assert hit.loss.mean == pytest.approx(0.375) and hit.compute.mean == 10
    assert by_name["length, 1 planted of 4"].loss.mean == 0
    assert by_name["none, 4 without 2"].success is None
    table = to_markdown(lines, trials)
    assert "| none | planted | 2 of 4 | 2 | 0.7 ± 0 | 0.05 ± 0 | " in table and "| none | none | 0 of 2 | 2 | " in table
    tree = json.loads(to_json(lines, trials))
    assert [group for group in tree["trials"] if group["attack"] == "planted"][1]["success"] == [0.7, 0.0]
