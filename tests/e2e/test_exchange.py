"""Other people's trainers in a swarm with an ordinary node: each draws groups of the other."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from node.swarm.founding import found
from node.swarm.inviting import make_invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from protocol.identity import Identity
from tests.commands import start_node
from tests.swarms import GRADED, ROOT, rows_of, small_config
from tests.waiting import wait_until


@contextmanager
def swarm_of_one(folder: Path) -> Iterator[str]:
    """A swarm whose founder trains in `folder`, and an invite to it."""
    config = small_config(None, tasks=GRADED)
    found(config, folder, "club", JoinPolicy.OPEN, [])
    node = start_node(config, folder)
    try:
        wait_until(lambda: rows_of(folder), 90, "the node's first round")
        yield str(make_invite(folder, [], own=[Address.parse((folder / "address").read_text())]))
    finally:
        node.kill()
        node.join()


def teachers(folder: Path) -> set[str]:
    """The peers whose groups the node in `folder` has trained on."""
    return {peer for row in rows_of(folder) for peer in row["swarm/taught_by"]}


@contextmanager
def example(name: str, invite: str, folder: Path, count: str) -> Iterator[subprocess.Popen[str]]:
    """One of examples/ as a member of the swarm in `folder`, for a number of rounds or steps."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), invite, "--state", str(folder), *count.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_no_peers_text_spells_a_special_token() -> None:
    encode = runpy.run_path(str(ROOT / "examples" / "bare_loop.py"))["encode"]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "node" / "policy" / "builtin")
    end = tokenizer.eos_token_id
    assert end not in encode(tokenizer, f"1{tokenizer.eos_token}") and encode(tokenizer, "1", True)[-1] == end


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_trls_own_trainer_a_bare_loop_and_a_node_draw_each_others_groups(tmp_path: Path) -> None:
    node, bare, trl = (tmp_path / name for name in ("node", "bare", "trl"))
    with (
        swarm_of_one(node) as invite,
        example("bare_loop", invite, bare, "--rounds 40") as first,
        example("trl_exchange", invite, trl, "--steps 40") as second,
    ):
        for process, count in ((first, 40), (second, 1)):
            said, _ = process.communicate(timeout=250)
            assert process.returncode == 0
            drawn = [int(number) for number in re.findall(r"\bdrawn (\d+)", said)]
            assert len(drawn) == count and sum(drawn) > 0
        members = {Identity.load(folder / "identity.key").node_id for folder in (bare, trl)}
        wait_until(lambda: members <= teachers(node), 60, "the node to be taught by both")
        refused = {reason for row in rows_of(node) for reason in row["swarm/rejected"]}
        assert refused.isdisjoint({"false_reward", "false_question", "false_topic", "malformed"})
