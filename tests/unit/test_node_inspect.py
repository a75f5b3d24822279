"""`gossamer inspect` on a group buffer as a node leaves it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from node.cli.app import run
from node.config import BufferConfig
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.tasks import TaskKey


def fill(folder: Path) -> None:
    with GroupBuffer(folder / "pool.sqlite", BufferConfig()) as buffer:
        for index, text in enumerate(["7", "8\x1b[2J\nfake line"]):
            group = Group(
                TaskKey("builtin/sums", 1, "c0ffee"), index, "3+4=", (one_turn(text, True, 1.0 - index),), "llama", 5
            )
            buffer.add(
                [ReceivedGroup(bytes([index]) * 32, f"peer{index}", 1000.0 + index, group, encode(group))],
                now=1001.0,
                first_round=1,
            )
        buffer.use([candidate for candidate in buffer.candidates(1001.0, 1) if candidate.id == bytes(32)], 1, 1001.0)


def test_overview_counts_by_task_and_peer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(["inspect", str(tmp_path)], debug=False) == 0
    out = capfd.readouterr().out
    assert out.startswith("2 groups, ") and ", 1 of them used\n" in out
    assert "       2  builtin/sums\n" in out and "       1  peer0\n" in out
    assert out.index("010101010101") < out.index("000000000000")  # the newest first


def test_a_group_is_shown_with_its_text_made_harmless(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(["inspect", str(tmp_path), "--group", "01"], debug=False) == 0
    out = capfd.readouterr().out
    assert r"  reward 0  finished  8\x1b[2J\nfake line" in out.splitlines()


@pytest.mark.parametrize(("start", "says"), [("ff", "0 groups"), ("xyz", "hexadecimal"), ("%", "hexadecimal")])
def test_an_id_that_names_no_group(tmp_path: Path, capfd: pytest.CaptureFixture[str], start: str, says: str) -> None:
    fill(tmp_path)
    assert run(["inspect", str(tmp_path), "--group", start], debug=False) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("asked", [[], ["--group", "01"]])
def test_a_buffer_of_another_version_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    with closing(sqlite3.connect(tmp_path / "pool.sqlite")) as db:
        db.execute("CREATE TABLE groups (id BLOB PRIMARY KEY, peer TEXT, task TEXT, received REAL, body BLOB)")
        db.execute("PRAGMA user_version = 2")
    assert run(["inspect", str(tmp_path), *asked], debug=False) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "is of another version: delete it" in line


def test_a_damaged_buffer_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool.sqlite").write_bytes(b"not a database" * 100)
    assert run(["inspect", str(tmp_path)], debug=False) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
