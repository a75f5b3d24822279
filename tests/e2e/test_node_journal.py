"""A node's journal is begun by a word, goes on without it, and `replay` says which word."""

import shlex
from pathlib import Path

import pytest

from node.journal import Round, read_journal
from tests.commands import run as run_command

QUIET = ("--model", "builtin", "--set", "observe.enabled=false")


def recorded(folder: Path) -> list[int]:
    return [entry.number for entry in read_journal(folder) if isinstance(entry, Round)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_records_its_rounds_once_it_is_told_to_and_goes_on_to(tmp_path: Path) -> None:
    folder = tmp_path / "n0"
    assert run_command("node", "--state", folder, "--rounds", "1", *QUIET).returncode == 0
    assert not (folder / "rounds.journal").exists()
    refused = run_command("replay", folder)
    assert refused.returncode == 2
    _, command, _ = refused.stderr.split("`")
    assert run_command(*shlex.split(command)[1:], "--rounds", "2", *QUIET).returncode == 0
    assert run_command("node", "--state", folder, "--rounds", "3", *QUIET).returncode == 0
    assert recorded(folder) == [2, 3]
    again = run_command("replay", folder)
    assert (again.returncode, again.stdout) == (0, "2 rounds done again, 0 of them otherwise than recorded\n")
    shown = run_command("inspect", folder, "--round", "1")
    assert shown.returncode == 2 and "`gossamer node --journal` records rounds" in shown.stderr
