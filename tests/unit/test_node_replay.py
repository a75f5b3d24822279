"""A node's rounds, done again from its record: to the same digests, and not to those of another story."""

import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgpack
import pytest
import zstandard

from node import journal as journals
from node.cli.app import run
from node.config import NodeConfig, PolicyConfig, parse_config
from node.engines.hf import HfEngine
from node.errors import UserError
from node.journal import JOURNAL_FILE, OLDER_FILE, Journal, Round, Start, read_journal
from node.loop import Loop
from node.operations.backup import back_up, restore
from node.policy.load import load_policy
from node.replay import Compared, replay
from node.rollouts.group import Group, content_id, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup, Snapshot
from node.rollouts.screening import GroupBounds
from node.swarm.sharing import NetworkExchange, topic_of
from node.tasks import Task, load_tasks
from node.tasks.questions import DEFAULT_SPLIT, Split
from node.telemetry.metrics_file import MetricsLog
from node.training import likelihood
from node.training.checkpoint import latest_checkpoint
from protocol.host import Received
from protocol.identity import id_of_bytes
from tests.policies import write_tiny_policy
from tests.swarms import UNBOUNDED

APART = Split(1 / 8, 5)  # not what a swarm without a manifest holds out
PEERS = [id_of_bytes(bytes([number]) * 20) for number in range(3)]
TASK = """
from node.tasks import Item

def make(seed):
    return Item(str(seed % 1000), "")

def verify(item, text):
    return float(len(text) % 2 == 0)
"""


class Host:
    """A host to which peers send a few groups each round, one of them a lie."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sent = 0
        self.revoked: Collection[str] = ()

    def is_revoked(self, node: str) -> bool:
        return node in self.revoked

    def subscribe(self, topics: object, demand: object, beside: object) -> None: ...

    def publish(self, body: bytes, topic: bytes, timeout: float) -> None: ...

    def judge(self, *_: object) -> None: ...

    def receive(self, limit: int) -> list[Received]:
        self.sent += 3
        return [self._received(number) for number in range(self.sent - 3, self.sent)]

    def _received(self, number: int) -> Received:
        texts = ("11", "1", "2222")
        verdicts = [self.task.verify(self.task.make(number), text) for text in texts]
        rewards = [
            float(len(text) % 2 == 0) if verdict is None else verdict
            for verdict, text in zip(verdicts, texts, strict=True)
        ]
        claimed = [1 - reward for reward in rewards] if number % 7 == 6 else rewards
        made = tuple(one_turn(text, True, reward) for text, reward in zip(texts, claimed, strict=True))
        body = encode(Group(self.task.key, number, self.task.make(number).question, made, "peer", number))
        return Received(content_id(body), PEERS[number % 3], body, 0.0, topic_of(self.task.key))


def config_of(folder: Path, rule: str = "sapo", task: str = TASK, **bounds: float) -> NodeConfig:
    (folder / "odd.py").write_text(task)
    return parse_config(
        {
            "rounds": 20,
            "policy": {"model": str(folder / "policy"), "device": "cpu"},
            "tasks": [{"name": "file/odd", "options": {"path": str(folder / "odd.py")}}],
            "engine": {"max_completion_length": 4},
            "sampling": {
                "local": 2,
                "external": 2,
                "completions": 3,
                "rule": rule,
                **UNBOUNDED,
                **bounds,
            },
            "buffer": {"max_groups": 8},
        }
    )


def live(
    config: NodeConfig,
    folder: Path,
    done: int,
    last: int,
    max_bytes: int = 1 << 20,
    before: Callable[[Host, int], None] = lambda host, number: None,
) -> list[list[object]]:
    """Run a node's rounds `done` + 1 to `last` with its record; return what they trained on."""
    tasks = load_tasks(config.tasks, APART)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    policy = load_policy(config.policy, checkpoint=checkpoint.path if checkpoint else None)
    journal = Journal(folder, max_bytes)
    host = Host(tasks.tasks[0])
    host.sent = 3 * done
    exchange = NetworkExchange(host, tasks, max_completions=8, external=2, max_bytes=1000, saw=journal.saw)
    with GroupBuffer(folder / "pool.sqlite", config.buffer, config.sampling.max_uses) as buffer:
        buffer.rewind(done)
        settings = config.model_dump(mode="json")
        journal.begin(done, lambda at: Start(at, settings, 7, GroupBounds(8, 1000), APART, buffer.snapshot()))
        metrics = MetricsLog(folder / "metrics.jsonl")
        loop = Loop(config, 7, policy, HfEngine(policy), tasks, buffer, exchange, metrics, journal=journal)
        rounds, samples = loop.rounds(done), []
        for number in range(done, last):
            before(host, number + 1)
            samples.append(list(next(rounds)))
        return samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_policy(tmp_path / "policy")
    return tmp_path


@pytest.fixture(scope="module")
def five_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    write_tiny_policy(folder / "policy")
    live(config_of(folder), folder, 0, 5)
    return folder


@pytest.fixture
def record(five_rounds: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Returns a folder with the record of the first rounds of five, and with nothing else."""

    def of_rounds(count: int) -> Path:
        journal = Journal(tmp_path, 1 << 30)
        for entry in read_journal(five_rounds):
            if not isinstance(entry, Round) or entry.number <= count:
                journal._append(entry)
        return tmp_path

    return of_rounds


@pytest.mark.parametrize("rule", ["sapo", "positive"])
def test_every_round_comes_out_as_recorded_across_a_kill_and_a_step_back(folder: Path, rule: str) -> None:
    config = config_of(folder, rule)
    samples = live(config, folder, 0, 6)
    live(config, folder, 4, 8)  # killed after round 6, it goes on from its checkpoint of round 4
    assert [(compared.number, compared.difference) for compared in replay(folder)] == [
        *((number, "") for number in range(1, 7)),
        *((number, "") for number in range(5, 9)),
    ]
    rounds = [entry for entry in read_journal(folder) if isinstance(entry, Round)]
    assert {refused.reason for entry in rounds for refused in entry.seen} == {"", "held_out"}
    assert (
        "false_reward"
        in {refused.reason for entry in rounds for refused in entry.refused}
        <= {"false_reward", "too_long"}
    )
    assert [len(entry.rows) for entry in rounds[:6]] == [len(sample) for sample in samples]
    assert any(row.external for entry in rounds for row in entry.rows)


def test_what_a_bound_left_out_is_left_out_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "COMMON", 1.0)  # of so few tokens none is rare
    config = config_of(folder, "positive", max_surprise=3.0, max_length_ratio=1.5, max_signer_share=1.0)
    live(config, folder, 0, 6)
    live(config, folder, 4, 8)
    assert {compared.difference for compared in replay(folder)} == {""}
    rounds = [entry for entry in read_journal(folder) if isinstance(entry, Round)]
    assert "too_surprising" in {refused.reason for entry in rounds for refused in entry.refused}
    assert any(row.external for entry in rounds for row in entry.rows)


def test_the_record_alone_is_enough(record: Callable[[int], Path]) -> None:
    assert [compared.difference for compared in replay(record(3))] == ["", "", ""]


@pytest.mark.slow
def test_it_reaches_behind_a_restore(folder: Path) -> None:
    config = config_of(folder)
    live(config, folder, 0, 12, max_bytes=6000)  # two files
    for name in ("config.json", "settings.json"):
        (folder / name).write_text("{}")
    before = [(compared.number, compared.difference) for compared in replay(folder)]
    back_up(folder, folder / "n0.tar")
    restore(folder / "n0.tar", folder / "again")
    assert (folder / "again" / OLDER_FILE).exists()
    live(config, folder / "again", 10, 13)
    assert [(compared.number, compared.difference) for compared in replay(folder / "again")] == [
        *before,
        (11, ""),
        (12, ""),
        (13, ""),
    ]


def rewritten(folder: Path, change: object) -> None:
    """Write the record again with every `Round` as `change` returns it."""
    entries = [change(entry) if isinstance(entry, Round) else entry for entry in read_journal(folder)]
    (folder / JOURNAL_FILE).unlink()
    journal = Journal(folder, 1 << 30)
    for entry in entries:
        journal._append(entry)


def test_another_reward_function_names_the_first_round_and_item_that_differ(
    record: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = record(5)
    first = next(entry.number for entry in read_journal(folder) if isinstance(entry, Round) and entry.refused)

    def other_reason(one: Round) -> Round:
        if one.number != first:
            return one
        return one._replace(refused=[], admitted=journals.digest_of_verdicts(one.seen, []))

    rewritten(folder, other_reason)
    compared = list(replay(folder))
    assert [entry.number for entry in compared if entry.difference] == [first]
    assert re.search("(None|admitted) then, false_reward now", compared[first - 1].difference)
    assert run(["replay", str(folder)], debug=False) == 1
    said = capfd.readouterr().out.splitlines()
    assert (
        said[0].startswith(f"round {first}: item ")
        and said[-1] == "5 rounds done again, 1 of them otherwise than recorded"
    )


def test_a_draw_that_was_not_the_rules_is_found(record: Callable[[int], Path]) -> None:
    folder = record(4)
    rewritten(
        folder, lambda entry: entry._replace(times=[at - 3600 for at in entry.times]) if entry.number == 4 else entry
    )
    assert [
        compared.number for compared in replay(folder) if compared.difference
    ] == []  # what is an hour younger may be drawn, too
    rewritten(
        folder, lambda entry: entry._replace(times=[at + 8000 for at in entry.times]) if entry.number == 4 else entry
    )
    assert [compared.number for compared in replay(folder) if compared.difference] == [4]


def test_tokens_that_were_not_sampled_are_found(record: Callable[[int], Path]) -> None:
    folder = record(2)
    rewritten(folder, lambda entry: entry._replace(played=[entry.played[0]] * 2) if entry.number == 2 else entry)
    assert [compared.number for compared in replay(folder) if compared.difference] == [2]


def test_a_file_that_grows_too_large_makes_way_and_the_new_one_stands_alone(folder: Path) -> None:
    live(config_of(folder), folder, 0, 12, max_bytes=6000)
    assert (folder / OLDER_FILE).exists()
    (folder / OLDER_FILE).unlink()
    compared = list(replay(folder))
    assert 0 < len(compared) < 12 and compared[-1].number == 12
    assert not any(entry.difference for entry in compared)


def test_a_torn_frame_is_passed_over_and_cut_before_the_next(folder: Path) -> None:
    config = config_of(folder)
    live(config, folder, 0, 3)
    path = folder / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-5])
    assert [entry.number for entry in replay(folder)] == [1, 2]
    live(config, folder, 2, 4)
    assert [(compared.number, compared.difference) for compared in replay(folder)] == [
        (1, ""),
        (2, ""),
        (3, ""),
        (4, ""),
    ]


def test_no_record_and_a_damaged_one_are_a_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no round .* recorded in .*: `gossamer node --state .* --journal`"):
        list(replay(folder))
    (folder / JOURNAL_FILE).write_bytes(b"\x00\x00\x00\x04abcd")
    with pytest.raises(UserError, match="damaged"):
        list(replay(folder))


def test_inspect_shows_whose_rows_a_round_trained_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    live(config_of(folder, "positive"), folder, 0, 8)
    rounds = [entry for entry in read_journal(folder) if isinstance(entry, Round)]
    number, refused, rows = next(
        (entry.number, entry.refused, entry.rows)
        for entry in rounds
        if entry.rows and "false_reward" in [refused.reason for refused in entry.refused]
    )
    assert run(["inspect", str(folder), "--round", str(number)], debug=False) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == f"round {number}: 2 own groups, 3 items came, {len(refused)} refused"
    assert said[1 : 1 + len(refused)] == [f"  refused  {group.reason} from {group.sender}" for group in refused]
    assert sum(line.startswith("    weight ") for line in said) == len(rows)
    assert any(line.startswith(f"  {peer}, came ") for peer in PEERS for line in said)
    assert any("weight 0.3333  advantage +1  " in line for line in said)
    assert run(["inspect", str(folder), "--round", "9"], debug=False) == 2


def test_inspect_says_why_a_round_trained_on_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = load_tasks(config_of(folder).tasks).tasks[0]
    flat = encode(Group(task.key, 0, "q", (one_turn("1", True, 0.0), one_turn("3", True, 0.0)), "peer", 0))
    told = encode(Group(task.key, 1, "q", (one_turn("1", True, 0.0), one_turn("3", True, 1.0)), "peer", 0))
    journal = Journal(folder, 1 << 20)
    for number, own in enumerate(([flat], [flat, told], []), 1):
        journal._append(Round(number, [], [], [], [1.0], [], [], [], own, [], b"", b""))
    said = []
    for number in (1, 2, 3):
        assert run(["inspect", str(folder), "--round", str(number)], debug=False) == 0
        said += capfd.readouterr().out.splitlines()
    nothing = "trained on 0 rows, peers' of 0 groups"
    assert said == [
        "round 1: 1 own group, 0 items came, 0 refused",
        f"{nothing}: no own group's rewards differ, and no group of a peer's was of use",
        "round 2: 2 own groups, 0 items came, 0 refused",
        nothing,
        "round 3: 0 own groups, 0 items came, 0 refused",
        nothing,
    ]


def test_replay_says_how_far_it_is_seldom_or_on_one_line_of_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rounds = [Compared(number, "other" if number == 9 else "") for number in range(1, 2502)]
    monkeypatch.setattr("node.replay.replay", lambda folder: iter(rounds))
    last = "2501 rounds done again, 1 of them otherwise than recorded"
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert run(["replay", str(folder)], debug=False) == 1
    assert capfd.readouterr().out.splitlines() == [
        "round 9: other",
        "round 1000: as recorded",
        "round 2000: as recorded",
        last,
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("TERM", "xterm")
    assert run(["replay", str(folder)], debug=False) == 1
    lines = [re.sub(r".*\x1b\[2K|\x1b\[[?0-9;]*[a-zA-Z]", "", line) for line in capfd.readouterr().out.split("\n")]
    assert [line for line in lines if line.startswith(("round", last))] == ["round 9: other", last]
    assert len(lines) < 8 and any("round 2501: as recorded" in line for line in lines)


def test_a_snapshot_restores_a_buffer_with_its_uses(tmp_path: Path) -> None:
    config = parse_config({"rounds": 1})
    task = load_tasks(config.tasks).tasks[0]
    host = Host(task)
    with (
        GroupBuffer(tmp_path / "a.sqlite", config.buffer) as first,
        GroupBuffer(tmp_path / "b", config.buffer) as second,
    ):
        items = list(_shared(host))
        first.add(items, time.time(), 1)
        drawn = first.candidates(time.time(), 1)
        first.use(drawn[:1], 1, time.time())
        first.bury([drawn[1].id], 1)
        second.restore(Snapshot(*msgpack.unpackb(msgpack.packb(first.snapshot()))))
        now = time.time()
        assert second.candidates(now, 1) == first.candidates(now, 1)
        assert len(second.candidates(now, 1)) == len(items) - 2 == len(second) - 1


def _shared(host: Host) -> Iterator[ReceivedGroup]:
    tasks = load_tasks(parse_config({}).tasks, Split(0.0))
    exchange = NetworkExchange(host, tasks, max_completions=8, external=2)
    yield from exchange.receive(lambda _: False)


FAILING = """
from pathlib import Path
from node.tasks import Item

def make(seed):
    return Item(str(seed % 1000), "")

def verify(item, text):
    if len(text) > 2 and Path(FLAG).exists():
        raise ValueError(text)
    return float(len(text) % 2 == 0)
"""


def test_what_could_not_be_scored_and_who_was_put_out_then_is_so_again(folder: Path) -> None:
    flag = folder / "failing"
    config = config_of(folder, "sapo", FAILING.replace("FLAG", repr(str(flag))))
    flag.touch()

    def before(host: Host, number: int) -> None:
        host.revoked = PEERS[:1] if number > 3 else ()
        if number > 2:
            flag.unlink(missing_ok=True)

    live(config, folder, 0, 6, before=before)
    assert [(compared.number, compared.difference) for compared in replay(folder)] == [
        (number, "") for number in range(1, 7)
    ]
    rounds = [entry for entry in read_journal(folder) if isinstance(entry, Round)]
    assert [any(map(len, one.unscorable)) for one in rounds] == [True, True, False, False, False, False]
    assert "unscorable" in {refused.reason for entry in rounds[:2] for refused in entry.refused}
    assert [set().union(*one.barred) for one in rounds] == [set()] * 3 + [{PEERS[0]}] * 3
    rewritten(
        folder, lambda entry: entry._replace(unscorable=[[] for _ in entry.unscorable]) if entry.number == 1 else entry
    )
    assert [compared.number for compared in replay(folder) if compared.difference][:1] == [1]


def test_a_built_in_policy_of_an_earlier_release_is_that_of_the_nodes_checkpoint(folder: Path) -> None:
    config = config_of(folder).model_copy(update={"policy": PolicyConfig(device="cpu")})
    shutil.copytree(folder / "policy", folder / "checkpoints" / "checkpoint-0")
    live(config, folder, 0, 2)
    assert [(compared.number, compared.difference) for compared in replay(folder)] == [(1, ""), (2, "")]


def start_of(buffer_bytes: int) -> Callable[[int], Start]:
    """What makes a `Start` with so many bytes in the group buffer, and more after each round."""

    def start(done: int) -> Start:
        rows = [(bytes(32), "peer", 0.0, 1, random.Random(7).randbytes(buffer_bytes + 500 * done))]
        return Start(done, {}, 7, GroupBounds(8, 1000), DEFAULT_SPLIT, Snapshot(rows, [], []))

    return start


def starts_and_rounds(folder: Path) -> list[str]:
    return [f"after {entry.done}" if isinstance(entry, Start) else str(entry.number) for entry in read_journal(folder)]


def rounds_of(journal: Journal, first: int, last: int) -> None:
    """End these rounds, each of some 300 bytes."""
    rng = random.Random(first)
    for number in range(first, last + 1):
        journal.measured(30, lambda: [rng.random() for _ in range(30)])
        journal.end_round(number, [], [], [])


def test_a_buffer_larger_than_a_file_may_be_does_not_begin_one_in_every_round(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2000)
    journal.begin(0, start_of(10_000))
    rounds_of(journal, 1, 4)
    assert not (tmp_path / OLDER_FILE).exists()
    rounds_of(journal, 5, 9)
    assert (tmp_path / OLDER_FILE).exists()
    said = starts_and_rounds(tmp_path)
    (at,) = [place for place, entry in enumerate(said) if entry.startswith("after ") and place]
    assert said[0] == "after 0" and said[at] == f"after {at - 1}" and 4 < at - 1 < 9
    assert [entry for entry in said if not entry.startswith("after")] == [str(number) for number in range(1, 10)]


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_a_node_that_is_started_again_and_again_does_not_fill_the_disk_with_its_record(
    rounds: int, tmp_path: Path
) -> None:
    for number in range(0, 20 * rounds, rounds) if rounds else [0] * 20:
        journal = Journal(tmp_path, 2000)
        journal.begin(number, start_of(10_000 - 500 * number))
        rounds_of(journal, number + 1, number + rounds)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 2 * (10_500 + 2000)
    assert starts_and_rounds(tmp_path)[-1] == (str(20 * rounds) if rounds else "after 0")


def test_frames_of_another_version_are_passed_over(folder: Path) -> None:
    frames = [["Start", 0, {}, 7, [8, 1000], [[], [], []]], ["Round", 1, "whatever"], ["Round 99"], ["Pause 2", 1]]
    with (folder / JOURNAL_FILE).open("wb") as file:
        for frame in frames:
            body = zstandard.compress(msgpack.packb(frame))
            file.write(len(body).to_bytes(4, "big") + body)
    assert list(read_journal(folder)) == []
    with pytest.raises(UserError, match=r"no round .* recorded in .*: `gossamer node --state .* --journal`"):
        list(replay(folder))
    live(config_of(folder), folder, 0, 2)
    assert starts_and_rounds(folder) == ["after 0", "1", "2"]
