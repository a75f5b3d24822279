"""What a peer's group must pass: every lie and every malformed item has its reason, none raises, and a round's slots
are filled with true groups.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import SamplingConfig, TaskConfig
from node.rollouts import draw
from node.rollouts.draw import MAX_DRAWN_PER_SLOT, OWN_PARTS, PEERS_S, Draw, Draws
from node.rollouts.group import MAX_GROUP_BYTES, Group, Tokens, content_id, encode, one_turn
from node.rollouts.own_results import OwnResult
from node.rollouts.rule import Candidate, DrawRequest, Pick, Rule, mean_advantages, picks_of_groups, whole_group
from node.rollouts.rules import RULES
from node.rollouts.screening import BLAMELESS, RefusedGroup, check, compare
from node.tasks import Item, Task, TaskKey, load_tasks
from node.tasks.questions import Split, question_id
from node.tasks.scoring.verdicts import Submission, Verdict
from node.tasks.task_set import TaskSet
from node.tasks.third_party import run_file
from tests.e2e.test_doors import NEWEST
from tests.fakes.offers import Offers
from tests.swarms import UNBOUNDED

TASKS = load_tasks([TaskConfig(name="builtin")])


def honest(seed: int = 7, texts: tuple[str, ...] = ("no", "x")) -> Group:
    task = TASKS.tasks[0]
    item = task.make(seed)
    made = tuple(one_turn(text, True, task.verify(item, text)) for text in (item.answer, *texts))
    return Group(task.key, seed, item.question, made, "p", 3)


@given(st.integers(0, 2**63 - 1), st.lists(st.text(max_size=30), min_size=1, max_size=7).map(tuple))
def test_an_honest_group_passes_unchanged_unless_its_question_is_the_evaluations(
    seed: int, texts: tuple[str, ...]
) -> None:
    group = honest(seed, texts)
    is_held_out = TASKS.is_held_out(TASKS.tasks[0], group.question)
    assert check(encode(group), TASKS, 8) == ((None, "held_out") if is_held_out else (group, ""))


def test_a_held_out_question_is_refused_and_is_nobodys_fault() -> None:
    seeds = {TASKS.is_held_out(TASKS.tasks[0], honest(seed).question): seed for seed in range(40)}
    assert check(encode(honest(seeds[True])), TASKS, 8) == (None, "held_out")
    asked = load_tasks([TaskConfig(name="builtin")], Split(1e-6))
    assert check(encode(honest(seeds[True])), asked, 8) == (honest(seeds[True]), "")  # another swarm holds out others
    assert "held_out" in BLAMELESS


def lie(group: Group, index: int, reward: float) -> Group:
    made = list(group.completions)
    made[index] = made[index]._replace(reward=reward)
    return replace(group, completions=tuple(made))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (encode(lie(honest(), 1, 1.0)), "false_reward"),
        (encode(lie(honest(), 0, 0.0)), "false_reward"),
        (encode(lie(honest(), 1, 1e300)), "malformed"),
        (encode(replace(honest(), question="0+1=")), "false_question"),
        (encode(replace(honest(), seed=8)), "false_question"),
        (encode(replace(honest(), task=TaskKey("builtin/none", 1, "c"))), "unknown_task"),
        (encode(replace(honest(), task=honest().task._replace(version=99))), "unknown_task"),
        (encode(replace(honest(), task=honest().task._replace(config="0" * 16))), "unknown_task"),
        (encode(honest(texts=("a",) * 8)), "group_size"),
        (encode(honest())[:-1], "malformed"),
        (b"", "malformed"),
        (b"\xc1" * 40, "malformed"),
        (b"\x00" * (MAX_GROUP_BYTES + 1), "oversized"),
    ],
)
def test_each_bad_item_has_its_reason(body: bytes, reason: str) -> None:
    assert check(body, TASKS, 8) == (None, reason)


def test_one_answer_is_a_group() -> None:
    """It is what a node sends of a group in which all answers are right, and the same."""
    group = replace(honest(), completions=honest().completions[:1])
    assert check(encode(group), TASKS, 8) == (group, "")


def test_a_group_of_who_asks_otherwise_passes_and_one_of_who_reads_otherwise_is_of_another_task() -> None:
    group = honest()
    name = group.task.name
    otherwise = load_tasks([TaskConfig(name=name, examples=3, instruction="Think.")])
    assert check(encode(group), otherwise, 8) == (group, "")
    assert check(encode(group), load_tasks([TaskConfig(name=name, answer="whole")]), 8) == (None, "unknown_task")


class Raising:
    """A third party's task whose scorer fails."""

    key = TaskKey("raising", 1, "c")

    def make(self, seed: int) -> Item:
        return Item("q", "a")

    def verify(self, item: Item, text: str) -> float:
        raise ZeroDivisionError(text)


def test_a_scorer_that_raises_costs_one_item_and_nobody_else() -> None:
    group = Group(Raising.key, 1, "q", (one_turn("a", True, 0.0), one_turn("b", True, 0.0)), "p", 0)
    assert check(encode(group), TaskSet([(Raising(), 1.0)]), 8) == (None, "unscorable")
    assert "unscorable" in BLAMELESS


def test_what_is_unscorable_is_no_cover_for_a_lie_beside_it() -> None:
    group = Group(Raising.key, 1, "q", tuple(one_turn(text, True, 0.0) for text in "abc"), "p", 0)
    assert compare(group, [(0, 0.0), (2, None)]) == "unscorable"
    assert compare(group, [(0, None), (2, 1.0)]) == compare(group, [(0, 1.0), (1, None)]) == "false_reward"
    assert compare(group, [(0, 0.0), (1, 0.0), (2, 1e-9)]) == compare(group, []) == ""


def test_a_question_that_the_policy_has_no_room_for_is_nobodys_fault_and_no_cover_for_another_question() -> None:
    assert check(encode(honest()), TASKS, 8, encode_prompt=lambda _: None) == (None, "prompt_too_long")
    other = encode(replace(honest(), seed=8))
    assert check(other, TASKS, 8, encode_prompt=lambda _: None) == (None, "false_question")
    assert "prompt_too_long" in BLAMELESS


def test_a_question_that_cannot_be_encoded_costs_one_item() -> None:
    def fails(item: Item) -> list[int]:
        raise ValueError(item.question)

    assert check(encode(honest()), TASKS, 8, encode_prompt=fails) == (None, "unverifiable")


@dataclass
class Even:
    """A task that pays texts of an even length, and counts what it is asked; "?" is unscorable."""

    asked: list[str] = field(default_factory=list)
    key: TaskKey = field(default=TaskKey("even", 1, "c"))  # it is immutable

    def make(self, seed: int) -> Item:
        return Item(f"question {seed}", "")

    def verify(self, item: Item, text: str) -> Verdict:
        self.asked.append(text)
        return None if "?" in text else float(len(text) % 2 == 0)


@dataclass
class Slow(Even):
    """The same, scored in other processes: a text with a dot is never done, one with a comma never begun."""

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        return [self._queued(answer.item, answer.text) for answer in batch]

    def _queued(self, item: Item, text: str) -> "Future[Verdict]":
        future: Future[Verdict] = Future()
        if "," not in text:
            future.set_running_or_notify_cancel()
            if "." not in text:
                future.set_result(self.verify(item, text))
        return future


@dataclass(kw_only=True)
class Round(Offers):
    """A round's draw from these groups."""

    task: Task
    rule: str | Rule = "positive"
    external: int = 2
    completions: int = 4
    bounds: dict[str, Any] = field(default_factory=dict)
    quotes: Callable[[str], bool] = lambda text: False

    def send(self, peer: str, seed: int, *texts: str, lie: bool = False) -> Candidate:
        """Add a group; a lie has the opposite rewards."""
        rewards = [float(len(text) % 2 == 0) for text in texts]
        made = tuple(
            one_turn(text, True, 1 - reward if lie else reward) for text, reward in zip(texts, rewards, strict=True)
        )
        group = Group(self.task.key, seed, self.task.make(seed).question, made, peer, 0)
        key = content_id(encode(group))
        received = float(len(self.offered))
        candidate = Candidate(key, peer, "even", question_id("even", group.question), key, received, 1, group.rewards)
        self.groups[key] = group
        self.offered.append(candidate)
        return candidate

    def begun(self) -> Draw:
        sampling = SamplingConfig(external=self.external, completions=self.completions, **UNBOUNDED | self.bounds)
        draws = Draws(
            3,
            sampling,
            TaskSet([(self.task, 1.0)], Split(1e-6)),
            self,
            self,
            lambda item: (1,),
            lambda prompt, made: Tokens(list(map(ord, made.text))) if len(made.text) <= 9 else None,
            lambda rows: [0.0] * len(rows),
            self.quotes,
        )
        rule = RULES[self.rule] if isinstance(self.rule, str) else self.rule
        return draws.begin(1, self.external, self.completions, mean_advantages, rule)

    def filled(self, seconds: float = 9.0) -> Draw:
        draw = self.begun()
        draw.fill(seconds)
        return draw


def test_a_flood_of_lies_is_looked_at_within_a_bound_and_no_liar_twice() -> None:
    trial = Round(task=Even(), external=3)
    for number in range(60):
        trial.send(f"liar {number}", number, "11", "1", lie=True)
    draw = trial.filled()
    assert len(draw.refused) == MAX_DRAWN_PER_SLOT * 3 and draw.usable == {}
    assert {lie.reason for lie in draw.refused} == {"false_reward"}
    assert draw.liars == {lie.sender for lie in draw.refused} and len(draw.liars) == MAX_DRAWN_PER_SLOT * 3


def test_a_place_that_a_refused_group_leaves_is_filled_by_another() -> None:
    trial = Round(task=Even(), external=2)
    for number in range(40):
        trial.send("liar", number, "11", "1", lie=True)
    true = [trial.send("honest", 100 + number, "11", "1") for number in range(2)]
    draw = trial.filled()
    assert set(draw.usable) == {group.id for group in true}
    assert {pick.id for pick in draw.picks} == set(draw.usable)
    assert sorted(group.id for group in draw.used) == sorted(draw.usable)
    lies = [refused.sender for refused in draw.refused]
    assert lies == ["liar"] * 2  # two were drawn at once; after a lie no other group of its signer is drawn


@pytest.mark.parametrize(("rule", "texts"), [("positive", ["11"]), ("sapo", ["11", "1", "333"])])
def test_only_the_texts_that_a_draw_uses_are_scored(rule: str, texts: list[str]) -> None:
    trial = Round(task=Even(), rule=rule, external=1)
    for number in range(5):
        trial.send("peer", number, "11", "1", "333")
    draw = trial.filled()
    assert len(draw.usable) == 1
    assert trial.task.asked == texts


def test_of_a_large_group_the_paper_needs_every_reward_even_where_it_trains_on_few() -> None:
    for seed in range(8):  # in some of these draws no right answer is among the four that are trained on
        trial = Round(task=Even(), rule="sapo", external=1, completions=4)
        trial.send("peer", seed, "11", *["1"] * 19)
        draw = trial.begun()
        draw.asked.rng.seed(seed)
        draw.fill(9.0)
        assert len(trial.task.asked) == 20 and draw.refused == []
        (group,) = draw.usable.values()
        assert len(group.completions) == len(draw.picks) == 4
        assert {round(pick.advantage, 2) for pick in draw.picks} <= {0.95, -0.05}


def test_of_a_draw_without_a_right_answer_all_that_fits_is_taken_and_nothing_is_refused_unless_nothing_fits() -> None:
    trial = Round(task=Even(), rule="sapo", external=1, completions=2)
    trial.send("peer", 1, "11", *["1" * 11] * 19)
    reasons = Counter[str]()
    for seed in range(20):
        draw = trial.begun()
        draw.asked.rng.seed(seed)
        draw.fill(9.0)
        reasons[draw.refused[0].reason if draw.refused else "usable"] += 1
    assert set(reasons) == {"too_long", "usable"} and reasons["too_long"] > reasons["usable"]


def test_what_cannot_be_scored_is_set_aside_at_no_cost_and_its_place_filled() -> None:
    trial = Round(task=Even(), external=1)
    for number in range(3):
        trial.send("peer", number, "??", "1")
    true = trial.send("peer", 9, "11", "1")
    draw = trial.begun()
    draw.asked.rng.seed(3)  # an unscorable one is drawn first
    draw.fill(9.0)
    assert list(draw.usable) == [true.id]
    assert draw.refused and {refused.reason for refused in draw.refused} == {"unscorable"}
    assert draw.liars == set()


def test_a_late_group_is_left_to_another_round_one_that_took_too_long_is_refused_and_the_others_are_used() -> None:
    trial = Round(task=Slow(), external=4)
    texts = {"a": "11", "b": "1.", "c": "1,", "d": "22"}
    sent = {peer: trial.send(peer, at, text, "1") for at, (peer, text) in enumerate(texts.items())}
    spare = trial.send("e", 9, "33", "1")
    draw, all_of_them = trial.begun(), trial.offered
    trial.offered = list(sent.values())
    draw.prepare()
    trial.offered = all_of_them
    draw.fill(0.0)
    assert {group.peer for group in draw.used} == {"a", "d"}
    assert draw.refused == [RefusedGroup(sent["b"].id, "b", "unscorable")] and draw.liars == set()
    assert draw.left_out == {"late": 1}
    assert spare.id not in trial.was_read, "once a verdict is late nothing more is drawn"


def test_a_draw_waits_for_peers_by_the_shortest_of_the_nodes_own_parts_of_late_but_five_seconds_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = Round(task=Even(), external=1)
    now = 0.0
    monkeypatch.setattr(draw, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    draws, waited = trial.begun().draws, []
    for seconds in (30.0, 7.0, 40.0, 1.0, *[20.0] * OWN_PARTS):
        draws.note_prepared()
        now += seconds
        draws.record_own(1, [])
        waited.append(draws.patience())
    assert waited == [30.0, 7.0, 7.0, *[PEERS_S] * OWN_PARTS, 20.0]


def test_what_is_drawn_before_generation_is_scored_meanwhile_and_not_drawn_again() -> None:
    trial = Round(task=Slow(), external=2)
    early = [trial.send("a", number, "11", "1") for number in range(2)]
    draw = trial.begun()
    draw.prepare()
    for group in early:  # they are evicted meanwhile, and others of their questions stand in their place
        del trial.groups[group.id]
    trial.offered = []
    for number in range(2):
        trial.send("b", number, "11", "3")
    draw.fill(60.0)
    assert set(draw.usable) == {group.id for group in early}
    assert {group.id for group in draw.used} == set(draw.usable)
    trial = Round(task=Slow(), external=2)
    lie = trial.send("a", 1, "11", "1", lie=True)
    draw = trial.begun()
    draw.prepare()
    trial.offered = []
    trial.send("b", 1, "11", "3")
    draw.fill(9.0)
    assert draw.refused == [RefusedGroup(lie.id, "a", "false_reward")] and draw.usable == {}


def test_of_a_signer_that_is_revoked_during_generation_nothing_is_used() -> None:
    trial = Round(task=Slow(), external=2)
    out, other = trial.send("out", 1, "11", "1"), trial.send("in", 2, "11", "1")
    draw = trial.begun()
    draw.prepare()
    trial.out = {"out"}
    draw.fill(9.0)
    assert set(draw.usable) == {other.id} and out.id not in draw.usable
    assert {pick.id for pick in draw.picks} == {other.id}
    assert draw.refused == []


def test_of_a_signer_that_lies_once_no_group_is_used_though_it_was_found_true_in_the_same_draw_or_before() -> None:
    trial = Round(task=Slow(), external=3)
    for number in range(2):
        trial.send("two-faced", number, "11", "1")
    draw = trial.filled()
    assert len(draw.usable) == 2
    trial.send("two-faced", 2, "11", "1", lie=True)
    draw.prepare()
    honest = [trial.send("honest", 10 + number, "11", "1") for number in range(3)]
    draw.fill(9.0)
    assert set(trial.buried) == {group.id for group in trial.offered if group.peer == "two-faced"}
    assert draw.liars == {"two-faced"}
    assert set(draw.usable) == {pick.id for pick in draw.picks} == {group.id for group in honest}


def test_a_false_question_alone_costs_its_signer_the_groups_that_were_found_true_too() -> None:
    trial = Round(task=Even(), external=2)
    trial.send("two-faced", 1, "11", "1")
    draw = trial.filled()
    assert len(draw.usable) == 1
    trial.offered = []
    false = trial.send("two-faced", 2, "11", "1")
    trial.groups[false.id] = replace(trial.groups[false.id], question="another?")
    draw.fill(9.0)  # nothing is left to score
    assert (draw.usable, draw.picks, draw.liars) == ({}, [], {"two-faced"})
    honest = trial.send("honest", 3, "11", "1")
    draw.fill(9.0)
    assert set(draw.usable) == {honest.id}


@pytest.mark.parametrize(
    ("texts", "lie", "reason"),
    [
        (("11", "1,", "3"), True, "false_reward"),
        (("1,", "33", "3"), True, "false_reward"),
        (("1.", "1,", "3"), False, "unscorable"),
        (("1,", "1.", "3"), False, "unscorable"),
        (("11", "1,", "3"), False, None),
    ],
)
def test_a_late_text_hides_neither_a_lie_nor_one_that_took_too_long(
    texts: tuple[str, ...], lie: bool, reason: str | None
) -> None:
    trial = Round(task=Slow(), rule="sapo", external=1)
    group = trial.send("peer", 1, *texts, lie=lie)
    draw = trial.begun()
    draw.prepare()
    draw.fill(0.0)
    assert draw.refused == ([RefusedGroup(group.id, "peer", reason)] if reason else [])
    assert draw.left_out["late"] == (0 if reason else 3) and draw.usable == {}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_signers_share_of_a_round_holds_over_refills_and_its_refused_groups_count(rule: str) -> None:
    trial = Round(task=Even(), rule=rule, external=4, bounds={"max_signer_share": 1.5})
    for number in range(30):
        trial.send("loud", number, "??", "1")  # nobody's fault, again and again
    for peer in range(3):
        trial.send(f"quiet {peer}", 100 + peer, "11", "1")
    draw = trial.filled()
    drawn = Counter(refused.sender for refused in draw.refused)
    drawn.update(group.peer for group in draw.used)
    assert drawn == {"loud": 2, "quiet 0": 1, "quiet 1": 1, "quiet 2": 1}


@pytest.mark.parametrize(("share", "most"), [(2.0, 4), (1.0, 2), (0.1, 1)])
def test_a_rule_that_follows_the_door_gives_no_signer_more_than_its_share(
    share: float, most: int, tmp_path: Path
) -> None:
    (tmp_path / "newest.py").write_text(NEWEST)
    module, _ = run_file("newest", tmp_path / "newest.py")
    trial = Round(task=Even(), rule=module.RULE, external=16, bounds={"max_signer_share": share})
    quiet = [trial.send(f"quiet {number}", number, "11", "1") for number in range(7)]
    loud = [trial.send("loud", 100 + number, "11", "1") for number in range(400)]  # the newest are all its own
    newest_first = [*reversed(loud[-most:]), *reversed(quiet)]
    assert [group.id for group in trial.filled().used] == [group.id for group in newest_first]


def test_a_rule_gets_no_more_than_it_is_asked_for_and_nothing_that_it_was_not_offered() -> None:
    def everything(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
        offered.append([candidate.peer for candidate in candidates])
        return [*picks_of_groups(candidates, request), Pick(b"none", 0, 1.0, 1.0, (0,))]

    offered: list[list[str]] = []
    rule = Rule(whole_group, everything, lambda completions: 1.0)
    trial = Round(task=Even(), rule=rule, external=4, bounds={"max_signer_share": 1})
    for number in range(5):
        trial.send(f"{number % 2}", number, "11", "1")
    draw = trial.filled()
    assert Counter(group.peer for group in draw.used) == {"0": 2, "1": 2}
    assert offered == [["0", "1", "0", "1", "0"]]


def test_a_round_takes_groups_that_are_all_right_once_no_other_is_left() -> None:
    trial = Round(task=Even(), external=4)
    easy = [trial.send("strong", number, "22") for number in range(8)]
    mixed = [trial.send("equal", 100 + number, "22", "1") for number in range(3)]
    usable = set(trial.filled().usable)
    assert len(usable) == 4 and {group.id for group in mixed} < usable < {group.id for group in easy + mixed}
    trial.own_results.put(1, [OwnResult("even", None, 2.0, 0.75)])  # it is right itself more often than not
    assert set(trial.filled().usable) == {group.id for group in mixed}


def test_a_flood_of_easy_groups_takes_no_place_of_others_and_no_more_than_its_signers_share() -> None:
    trial = Round(task=Even(), external=8, bounds={"max_signer_share": 1})
    for number in range(200):
        trial.send("flood", number, "22")
    for peer in range(3):
        trial.send(f"equal {peer}", 1000 + peer, "22", "1")
    drawn = Counter(group.peer for group in trial.filled().used)
    assert drawn == {"flood": 2, "equal 0": 1, "equal 1": 1, "equal 2": 1}


def test_an_answer_that_gives_away_a_held_out_question_is_left_out_at_no_cost_to_its_signer() -> None:
    trial = Round(task=Even(), external=2, quotes=lambda text: "held" in text)
    giving = trial.send("peer", 1, "held 1", "1")
    other = trial.send("peer", 2, "11", "1")
    draw = trial.filled()
    assert set(draw.usable) == {other.id}
    assert draw.refused == [RefusedGroup(giving.id, "peer", "quotes_held_out")] and not draw.liars
    assert draw.left_out == {"quotes_held_out": 1}


def test_an_easy_group_whose_answer_is_wrong_is_a_lie() -> None:
    trial = Round(task=Even(), external=2)
    false = trial.send("liar", 1, "1", lie=True)
    draw = trial.filled()
    assert draw.refused == [RefusedGroup(false.id, "liar", "false_reward")] and not draw.usable


def test_a_signers_share_is_not_spent_on_what_the_rule_would_not_take() -> None:
    trial = Round(task=Even(), external=2, bounds={"max_signer_share": 1})
    for number in range(40):
        trial.send("peer", number, "1", "333")
    true = [trial.send("peer", 100 + number, "11", "1") for number in range(2)]
    assert set(trial.filled().usable) == {group.id for group in true}
