"""Back-fill: archived groups fill what peers leave, each once, and a round that is done again draws the same."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from node.archive import backfill as module
from node.archive.backfill import STATE_FILE, Backfill, NoBackfill
from node.archive.store import Archive, open_group, open_writer
from node.cli.app import run
from node.config import NodeConfig, TaskConfig, parse_config
from node.engines.hf import HfEngine
from node.errors import UserError
from node.loop import Loop
from node.policy.load import Policy, load_policy
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.rule import Candidate
from node.rollouts.screening import RefusedGroup
from node.run import run_node
from node.swarm.agreed_tasks import describe_tasks
from node.swarm.sharing import NoExchange, topic_of_group
from node.tasks import load_tasks
from node.tasks.questions import DEFAULT_SPLIT
from node.telemetry.metrics_file import MetricsLog
from protocol.credentials.manifest import JoinPolicy, make_manifest
from protocol.identity import Identity
from protocol.wire.compression import pack_content
from protocol.wire.envelope import Kind, seal
from tests.swarms import UNBOUNDED

pytestmark = pytest.mark.usefixtures("own_log_setup")
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
SUMS = [TaskConfig(name="builtin/sums")]
TASKS = load_tasks(SUMS)
(TASK,) = TASKS.tasks
CLUB = make_manifest(ALICE, "club", 1, JoinPolicy.OPEN, describe_tasks(SUMS), archive=True)
QUESTIONS = {TASK.make(seed).question: seed for seed in range(200)}
ASKED = [seed for text, seed in QUESTIONS.items() if not DEFAULT_SPLIT.holds_out(TASK.key.name, text)]
HELD = [seed for text, seed in QUESTIONS.items() if DEFAULT_SPLIT.holds_out(TASK.key.name, text)]


def never(_: bytes) -> bool:
    return False


def group_on(seed: int, right: float = 1.0, text: str = "no") -> Group:
    item = TASK.make(seed)
    made = (one_turn(item.answer, True, right), one_turn(text, True, 1.0 - right))
    return Group(TASK.key, seed, item.question, made, "old base", 3, item.content)


def add(folder: Path, *groups: Group, signer: Identity = ALICE) -> Path:
    with open_writer(folder, CLUB, 10**9) as writer:
        for group in groups:
            content = pack_content(encode(group), topic_of_group(group))
            writer.keep(open_group(seal(signer, CLUB.swarm, Kind.ITEM, 1, 1, content), CLUB))
    return folder


def opened(folder: Path, checkpoint: Path | None = None) -> Backfill:
    made = Backfill(Archive(folder), TASKS)
    made.resume(checkpoint)
    return made


def seeds(source: Backfill, found: list[Candidate]) -> list[int]:
    return [group.seed for group in source.read([item.id for item in found]).values()]


def drain(source: Backfill, slots: int = 1) -> list[int]:
    """Use one group a round until none is left."""
    used = []
    while found := source.candidates(slots, never):
        used += seeds(source, found[:1])
        source.settle(found[:1], [])
        source.commit()
    return used


def test_each_group_is_drawn_once_and_never_again_also_under_another_signature_or_after_another_start(
    tmp_path: Path,
) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:9]), group_on(HELD[0]))
    add(folder, group_on(ASKED[0]), group_on(ASKED[1]), signer=BOB)
    source = opened(folder)
    assert sorted(drain(source)) == sorted(ASKED[:9])
    assert source.skipped == {"held_out": 1, "same_texts": 2}
    source.save(tmp_path)
    add(folder, *map(group_on, ASKED[8:12]))  # the archive grew meanwhile
    assert sorted(drain(opened(folder, tmp_path))) == sorted(ASKED[9:12])


def test_what_was_read_and_not_drawn_waits_and_a_start_from_a_checkpoint_draws_the_same(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:20]))
    source = opened(folder)
    first = source.candidates(2, never)
    assert len(first) == 8
    source.settle(first[:1], [RefusedGroup(first[1].id, "", "too_long")])
    source.commit()
    source.save(tmp_path)
    drawn = source.candidates(2, never)
    assert drawn[:6] == first[2:] and len(drawn) == 14
    source.settle(drawn[:2], [])
    source.save(tmp_path)  # of a round that is not whole: what it drew is not in it
    again = opened(folder, tmp_path)
    assert again.candidates(2, never) == drawn
    assert again.candidates(2, lambda texts: texts == drawn[0].texts)[0] == drawn[1], "a peer's group had these texts"


def test_groups_that_were_passed_over_come_again_only_once_the_archive_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_PER_SLOT", 2)
    folder = add(tmp_path / "a", *map(group_on, ASKED[:12]))
    source = opened(folder)
    used = drain(source)
    assert 0 < len(used) < 12, "older ones were passed over"
    source.save(tmp_path)
    again = opened(folder, tmp_path)
    assert drain(again) == [], "a node that was not killed draws no more either"
    again.save(tmp_path)
    add(folder, group_on(ASKED[12]))
    assert ASKED[12] in drain(opened(folder, tmp_path), slots=8)


def test_added_files_are_looked_at_while_groups_wait_that_no_rule_draws(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:2]))
    source = opened(folder)
    assert len(source.candidates(4, never)) == 2, "read, and never drawn"
    source.commit()
    source.save(tmp_path)
    add(folder, *map(group_on, ASKED[2:9]))
    again = opened(folder, tmp_path)
    assert sorted(drain(again, slots=4)) == sorted(ASKED[:9])
    assert not again.skipped, "those that wait are not read twice"


def test_files_that_were_added_behind_the_cursor_come_at_the_next_start(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:12]))
    late = [*Archive(folder).files()][:4]
    aside = [path.rename(tmp_path / path.name) for path in late]
    source = opened(folder)
    used = seeds(source, first := source.candidates(1, never))
    source.settle(first, [])
    source.commit()
    source.save(tmp_path)
    for path, kept in zip(late, aside, strict=True):
        kept.rename(path)
    used += drain(opened(folder, tmp_path))
    assert sorted(used) == sorted(ASKED[:12])


def test_back_fill_ends_when_no_more_can_be_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DONE", 3)
    folder = add(tmp_path / "a", *map(group_on, ASKED[:9]))
    source = opened(folder)
    assert len(drain(source)) == 3
    source.save(tmp_path)
    assert opened(folder, tmp_path).candidates(4, never) == []


def test_a_damaged_file_is_passed_over_and_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:3]))
    damaged = next(Archive(folder).files())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    source = opened(folder)
    assert len(drain(source)) == 2 and source.skipped == {"forged": 1}
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(UserError, match=r"backfill.json is damaged: delete it"):
        opened(folder, tmp_path)


def test_a_copy_that_is_astray_hides_no_group(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:3]))
    for path in [*Archive(folder).files()]:
        (folder / "groups" / path.name).write_bytes(path.read_bytes())
    assert len(drain(opened(folder))) == 3


def test_groups_that_wait_are_not_in_memory_and_one_that_was_damaged_meanwhile_is_passed_over(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *(group_on(seed, text="x" * 100_000) for seed in ASKED[:8]))
    source = opened(folder)
    tracemalloc.start()
    found = source.candidates(2, never)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 8 and held < 100_000
    next(Archive(folder).files()).write_bytes(b"?")
    assert len(source.read([item.id for item in found])) == 7 and len(source.candidates(2, never)) == 7


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(parse_config({"threads": 1}).policy)


def config(**sampling: Any) -> NodeConfig:
    sampling = {"local": 1, "external": 3, "completions": 2, "rule": "sapo", **UNBOUNDED, **sampling}
    return parse_config(
        {"threads": 1, "rounds": 6, "engine": {"max_completion_length": 4}, "tasks": SUMS, "sampling": sampling}
    )


class OnePeer(NoExchange):
    """Hands over a group in the first round."""

    def __init__(self, *groups: Group) -> None:
        self.groups = groups

    def receive(self, known: object) -> list[ReceivedGroup]:
        groups, self.groups = self.groups, ()
        return [
            ReceivedGroup(bytes([at]) * 32, "peer", time.time(), group, encode(group))
            for at, group in enumerate(groups)
        ]


class Rounds(AbstractContextManager["Rounds"]):
    """A node's rounds without the update: the prompts of others' groups, and how many groups are archived."""

    def __init__(self, policy: Policy, folder: Path, source: Backfill | None, *groups: Group) -> None:
        folder.mkdir(exist_ok=True)
        self.buffer = GroupBuffer(folder / "pool.sqlite", config().buffer)
        metrics = MetricsLog(folder / "metrics.jsonl")
        self.loop = Loop(
            config(),
            0,
            policy,
            HfEngine(policy),
            TASKS,
            self.buffer,
            OnePeer(*groups),
            metrics,
            backfill=source or NoBackfill(),
        )

    def __exit__(self, *_: object) -> None:
        self.buffer.close()

    def play(self, first: int, count: int) -> Iterator[tuple[list[tuple[int, ...]], int]]:
        rounds = self.loop.rounds(first)
        for number in range(first + 1, first + count + 1):
            samples = [sample for sample in next(rounds) if sample.external]
            yield sorted({tuple(sample.prompt) for sample in samples}), self.loop.row["groups_archived"]
            self.loop.finish(number, {})


def prompt_of(policy: Policy, seed: int) -> tuple[int, ...]:
    return tuple(policy.encode_prompt(TASK.make(seed)))


def test_archived_groups_fill_the_slots_that_peers_leave_and_a_restart_trains_on_the_same(
    policy: Policy, tmp_path: Path
) -> None:
    lie = group_on(ASKED[30], right=0.0)
    folder = add(tmp_path / "a", *map(group_on, ASKED[1:12]), group_on(HELD[0]))
    add(folder, lie, signer=BOB)
    with Rounds(policy, tmp_path / "n", opened(folder), group_on(ASKED[0])) as rounds:
        played = [*rounds.play(0, 2)]
        rounds.loop.save(tmp_path)
        played += rounds.play(2, 2)
    assert [archived for _, archived in played] == [2, 3, 3, 3], "the peer's group came first"
    (peers,) = (prompt for prompt in played[0][0] if prompt == prompt_of(policy, ASKED[0]))
    trained = [prompt for prompts, _ in played for prompt in prompts if prompt != peers]
    assert sorted(trained) == sorted(prompt_of(policy, seed) for seed in ASKED[1:12])
    with Rounds(policy, tmp_path / "n", opened(folder, tmp_path)) as again:
        again.buffer.rewind(2)
        assert [*again.play(2, 2)] == played[2:]


def test_a_question_stands_once_in_a_round_of_peers_groups_and_archived_ones(policy: Policy, tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:2]))
    with Rounds(policy, tmp_path / "n", opened(folder), group_on(ASKED[0], text="another")) as rounds:
        assert [archived for _, archived in rounds.play(0, 2)] == [1, 1]


def test_a_start_without_the_archive_passes_on_what_was_used(policy: Policy, tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:3]))
    source = opened(folder)
    drain(source)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    source.save(tmp_path / "first")
    with Rounds(policy, tmp_path / "n", None) as rounds:
        rounds.loop.resume(tmp_path / "first")
        rounds.loop.save(tmp_path / "second")
    assert drain(opened(folder, tmp_path / "second")) == []
    assert json.loads((tmp_path / "second" / STATE_FILE).read_text())["done"]


def test_each_checkpoint_of_a_node_tells_of_the_rounds_until_it(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:20]))
    tree = config(external=2).model_dump(mode="json", exclude_unset=True)
    saves = {"trainer": {"save_steps": 1, "trl": {"save_total_limit": 9}}, "network": {"enabled": False}, "rounds": 3}
    run_node(parse_config({**tree, **saves}), tmp_path / "n", backfill=folder)
    for done in (1, 2, 3):
        state = json.loads((tmp_path / "n" / "checkpoints" / f"checkpoint-{done}" / STATE_FILE).read_text())
        assert len(state["done"]) == 2 * done


def test_the_waiting_groups_of_a_liar_are_not_drawn(tmp_path: Path) -> None:
    folder = add(tmp_path / "a", *map(group_on, ASKED[:4]))
    add(folder, *map(group_on, ASKED[4:6]), signer=BOB)
    source = opened(folder)
    found = source.candidates(9, never)
    source.settle([], [RefusedGroup(found[0].id, found[0].peer, "false_reward")], {ALICE.node_id})
    assert set(drain(source)) <= set(ASKED[4:6])


def test_what_cannot_be_back_filled_from_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = add(tmp_path / "a", group_on(ASKED[0]))
    alone = {"network": {"enabled": False}}

    def refused(says: str, archive: Path, *, journal: bool = False, **sampling: Any) -> None:
        with pytest.raises(UserError, match=says):
            run_node(parse_config({**alone, "sampling": sampling}), tmp_path / "n", journal=journal, backfill=archive)

    refused("is no archive", tmp_path / "none")
    refused("a journal holds no archived groups", folder, journal=True)
    refused(r"it needs sampling\.external", folder, external=0)
    refused(r"it needs sampling\.external", folder, source="self")
    words = ["node", "--state", str(tmp_path / "n"), "--backfill", str(folder), "--seed-only"]
    assert run(words, debug=False) == 2
    assert "a relay trains nothing" in capfd.readouterr().err.splitlines()[-1]
