"""What a node keeps of its rollouts to be looked at: which completions, bounded, harmless."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from node.cli.app import run
from node.rollouts.group import Episode, Group, one_turn
from node.tasks import TaskKey
from node.telemetry.metrics_file import MetricsLog, read_metrics
from node.telemetry.rollout_log import (
    MAX_TEXT,
    OWN,
    LoggedGroup,
    external_rows,
    in_one_line,
    own_rows,
    quoted,
    texts_of,
)
from tests.swarms import gossamer

KEY = TaskKey("builtin/sums", 1, "c0ffee")


def group(*completions: tuple[str, float], question: str = "3+4=", seed: int = 1) -> Group:
    return Group(KEY, seed, question, tuple(one_turn(text, True, reward) for text, reward in completions), "llama", 5)


def test_of_a_group_the_best_and_the_worst_are_kept() -> None:
    rows = own_rows(6, [group(("a", 0.5), ("b", 0.0), ("c", 1.0)), group(("d", 0.0), ("e", 0.0))])
    assert [(row["text"], row["reward"]) for row in rows] == [("c", 1.0), ("b", 0.0), ("d", 0.0)]
    assert {(row["round"], row["whose"], row["question"], row["policy_version"]) for row in rows} == {
        (6, OWN, "3+4=", 5)
    }


def test_an_episode_shows_who_speaks_and_no_text_can_pretend_to_be_another_turn() -> None:
    talk = Episode(("12 ← lower", "higher=", "14\n→ 13"), True, 1.0)
    (row, _) = own_rows(6, [replace(group(("a", 0.0)), completions=(talk, one_turn("a", True, 0.0)))])
    assert row["text"] == talk.text and texts_of(row) == list(talk.texts)
    assert in_one_line(texts_of(row)) == r"12 \u2190 lower ← higher= → 14\n\u2192 13"
    assert in_one_line(["7"]) == "7"


def test_a_peers_group_carries_who_sent_it_and_its_age() -> None:
    (row,) = external_rows(6, [LoggedGroup("abc", 12.5, group(("7", 1.0)))])
    assert (row["whose"], row["age"]) == ("abc", 12.5)


@given(st.text(), st.text())
@example("\x1b" * (MAX_TEXT + 1), "é" * 3 * MAX_TEXT)
def test_whatever_a_text_holds_it_is_one_line_of_ascii_of_bounded_length(question: str, text: str) -> None:
    rows = own_rows(1, [group((text, 0.0), question=question)])
    assert len(rows[0]["text"]) <= MAX_TEXT + 1 and len(rows[0]["question"]) <= MAX_TEXT + 1
    turns = replace(group(("a", 0.0)), completions=(Episode((text, question, text), True, 0.0),))
    assert all(len(said) <= MAX_TEXT + 1 for said in texts_of(own_rows(1, [turns])[0]))
    shown = quoted(rows[0]["text"])
    assert shown.isascii() and (shown == "" or shown.isprintable())


def test_the_file_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    log = MetricsLog(path, max_bytes=10_000)
    for number in range(1, 201):
        log.append(*own_rows(number, [group(("\x1b[2J\n" * 50, 0.0), ("7", 1.0))]))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 23_000
    rows = read_metrics(path)
    assert rows[-1]["round"] == 200 and rows[0]["round"] > 1
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert all(line.isascii() and json.loads(line) for line in path.read_text().splitlines())


def fill(folder: Path) -> MetricsLog:
    log = MetricsLog(folder / "rollouts.jsonl")
    log.append(*own_rows(1, [group(("7", 1.0), ("8\x1b[2J\nfake", 0.0))]))
    log.append(*external_rows(1, [LoggedGroup("peer", 9.0, group(("9", 0.0)))]))
    log.append(*own_rows(2, [group(("5", 0.0), seed=2), group(("6", 0.0), seed=3)]))
    return log


def test_inspect_own_lists_the_newest_groups_with_their_text_made_harmless(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    assert run(["inspect", str(tmp_path), "--own", "--last", "3"], debug=False) == 0
    assert capfd.readouterr().out.splitlines() == [
        "round 1  builtin/sums  own",
        "  question  3+4=",
        "  reward 1  finished  7",
        r"  reward 0  finished  8\x1b[2J\nfake",
        "round 2  builtin/sums  own",
        "  question  3+4=",
        "  reward 0  finished  5",
        "round 2  builtin/sums  own",
        "  question  3+4=",
        "  reward 0  finished  6",
    ]


def test_a_folder_without_rollouts_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path), "--own"], debug=False) == 2
    assert "has no rollout in rollouts.jsonl" in capfd.readouterr().err


@pytest.mark.slow
def test_watch_shows_what_is_added(tmp_path: Path) -> None:
    log = fill(tmp_path)
    watching = gossamer("inspect", tmp_path, "--watch", "--last", 1)
    try:
        assert watching.stdout is not None
        assert [watching.stdout.readline() for _ in range(3)][2] == "  reward 0  finished  6\n"
        log.append(*external_rows(3, [LoggedGroup("peer", 61.0, group(("new", 1.0)))]))
        assert [watching.stdout.readline() for _ in range(3)] == [
            "round 3  builtin/sums  peer, 61 s old\n",
            "  question  3+4=\n",
            "  reward 1  finished  new\n",
        ]
    finally:
        watching.kill()
        watching.communicate()
