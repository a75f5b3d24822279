"""A founder whose manifest names a file of a joiner's machine, by `found` and `join` as people give them."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.identity import Identity
from tests import commands
from tests.waiting import wait_until

SECRETS = [f"secret{first}{second}" for first in "abcdefgh" for second in "klmno"]
NAME = "reasoning-gym/spell_backward"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A file of the joiner's."""
    file = tmp_path / "passwords.txt"
    file.write_text("\n".join(SECRETS))
    return file


@pytest.fixture
def invite(tmp_path: Path, secrets: Path) -> Iterator[str]:
    """An invite for two nodes to a swarm whose founder has named that file; its relay runs."""
    founder, config = tmp_path / "founder", tmp_path / "founder.toml"
    options = f'{{ data_file = "{secrets}", min_word_len = 1, max_word_len = 1000 }}'
    config.write_text(f'[[tasks]]\nname = "{NAME}"\noptions = {options}\n')
    done = commands.run("found", "words", config, "--policy", "allowlist", "--no-start", "--state", founder)
    assert done.returncode == 0, done.stderr
    (tmp_path / "founding.txt").write_text(done.stderr)
    (tmp_path / "printed").mkdir()
    relay = commands.start(
        tmp_path / "printed", "node", "--set", "role=relay", "--listen", "tcp://127.0.0.1:0", "--state", founder
    )
    try:
        wait_until(lambda: (founder / "address").exists() or not relay.is_alive(), 60, "the relay to listen")
        made = commands.run("invite", founder, "--uses", "2")
        assert made.returncode == 0, made.stderr
        yield made.stdout.split()[0]
        os.kill(relay.pid or 0, signal.SIGTERM)
        relay.join(60)
        assert relay.exitcode == 0
    finally:
        relay.kill()
        relay.join()


@pytest.mark.slow
def test_a_founder_reads_no_file_of_a_joiners_unless_the_joiner_says_so(
    tmp_path: Path, secrets: Path, invite: str
) -> None:
    joiner = tmp_path / "joiner"
    join = ["join", invite, "--no-start", "--state", joiner]
    refused = commands.run(*join)
    assert refused.returncode == 2 and not (joiner / "config.json").exists()
    line = refused.stderr.strip().splitlines()[-1]
    assert f"the swarm's task '{NAME}' is of the kind 'reasoning-gym' with its founder's options" in line
    assert json.dumps(str(secrets)) in line and f"join with --allow-task {NAME}" in line
    told = (tmp_path / "founding.txt").read_text()
    assert f"note: who joins is told: the swarm's task '{NAME}'" in told, "the founder knew it at once"
    assert not any(secret in refused.stderr + refused.stdout for secret in SECRETS)

    mistyped = commands.run(*join, "--allow-task", "reasoning-gym/spell")
    assert mistyped.returncode == 2 and f"it has {NAME}" in mistyped.stderr

    key = Identity.load(joiner / "identity.key").node_id  # it has one of the invite's two uses
    allowed = commands.run(*join, "--allow-task", NAME)
    assert allowed.returncode == 0, allowed.stderr
    assert "runs by your word" in allowed.stderr and str(secrets) in allowed.stderr
    remembered = commands.run(*join)
    assert remembered.returncode == 0, remembered.stderr
    assert Identity.load(joiner / "identity.key").node_id == key
    (task,) = json.loads((joiner / "config.json").read_text())["tasks"]
    assert task["options"]["data_file"] == str(secrets)
    other = commands.run("join", invite, "--no-start", "--state", tmp_path / "other", "--allow-task", NAME)
    assert other.returncode == 0, "the other use of the invite is left"
