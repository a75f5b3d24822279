"""A node and one of another protocol version, on real sockets.

With one of version 2 both refuse, and each says in one line why. With one of the next minor version they are one swarm.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import structlog

from protocol.credentials.invite import Invite
from protocol.credentials.records import Address
from protocol.errors import JoinError
from protocol.host import Host
from protocol.identity import Identity
from protocol.joiner import fetch_manifest
from tests.protocol_hosts import SWARM, ask, running, spawn, written
from tests.waiting import wait_until

# Of a commit whose nodes speak version 2: `git archive 19586e0 protocol | xz -9e`.
ARCHIVE = Path(__file__).parents[1] / "protocol_2.tar.xz"
CHILD = """
import sys, time
from pathlib import Path
from protocol.host import Host
from protocol.identity import Identity
from protocol.credentials.records import Address
folder, seeds = Path(sys.argv[1]), [Address.parse(text) for text in sys.argv[2:]]
host = Host(Identity.generate(), bytes.fromhex("%s"), "tcp://127.0.0.1:0", seeds)
(folder / "address.new").write_text(str(host.start()))
(folder / "address.new").rename(folder / "address")
while True:
    counters = host.counters()
    (folder / "seen.new").write_text(f"{host.refusal} {counters.peers} {dict(counters.rejected)}")
    (folder / "seen.new").rename(folder / "seen")
    time.sleep(0.05)
"""
CLEAR = {"event": "refused a peer that speaks another version of the protocol", "log_level": "warning", "ours": "4.0"}


@contextmanager
def old_node(folder: Path, *seeds: Address) -> Iterator[None]:
    """A process of the old commit's own code; what it sees of the swarm is in `folder`/seen."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    command = [sys.executable, "-c", CHILD % SWARM.hex(), str(folder), *map(str, seeds)]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=log)
    try:
        wait_until((folder / "seen").exists, 30, "the old node's start")
        yield
    finally:
        child.kill()
        child.wait()


def clear_lines(logs: list) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "peer"} for line in logs if "theirs" in line]


def old_lines(folder: Path) -> list[str]:
    """Return what the old node logged about versions."""
    lines = re.sub(r"\x1b\[\d*m", "", (folder / "log").read_text()).splitlines()
    return [line for line in lines if "speaks another version" in line]


def test_an_old_node_that_dials_a_new_one_is_told_which_version_it_lacks(tmp_path: Path) -> None:
    with (
        structlog.testing.capture_logs() as logs,
        running(watch=written()) as (host, address),
        old_node(tmp_path, address),
    ):
        seen = tmp_path / "seen"
        wait_until(lambda: seen.read_text().startswith("it speaks protocol 4.0 0"), 20, "the old node's refusal")
        wait_until(lambda: clear_lines(logs) == [CLEAR | {"theirs": "2.0"}], 20, "our line in the log")
        (line,) = old_lines(tmp_path)
        assert "ours=2.0" in line and "theirs=4.0" in line
        assert host.counters().peers == 0


def test_a_new_node_that_dials_an_old_one_is_refused_and_both_say_why(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs, old_node(tmp_path):
        address = Address.parse((tmp_path / "address").read_text())
        with running(address, listen=None, watch=written()) as (host, _):
            wait_until(lambda: clear_lines(logs) == [CLEAR | {"theirs": "1 or 2"}], 20, "our line in the log")
            assert host.refusal == "it speaks protocol 1 or 2"
            assert host.counters().peers == 0
        wait_until(lambda: old_lines(tmp_path), 20, "the old node's line")
        (line,) = old_lines(tmp_path)
        assert "ours=2.0" in line and "theirs=4.0" in line


def test_joining_a_swarm_of_old_nodes_says_which_version_they_speak(tmp_path: Path) -> None:
    with old_node(tmp_path):
        invite = Invite("club", SWARM + bytes(16), (Address.parse((tmp_path / "address").read_text()),))
        with pytest.raises(JoinError, match=r"swarm .club. speaks protocol 1 or 2, and this node 4\.0: install"):
            fetch_manifest(Identity.generate(), invite, b"", timeout=20)


@pytest.mark.parametrize("newer_dials", [True, False])
def test_nodes_of_two_minor_versions_are_one_swarm_and_tell_each_others_records(
    newer_dials: bool, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        logs = stack.enter_context(structlog.testing.capture_logs())
        first, at = stack.enter_context(running())
        child, newer = spawn(tmp_path, *([at] if newer_dials else []), newer=True)
        stack.callback(child.wait)
        stack.callback(child.kill)
        if not newer_dials:
            first.neighbour(newer)
        ask(first, "both ways")
        ask(first, "in chunks " + "x" * 400_000)
        third, _ = stack.enter_context(running(at, listen=None))  # hears of the newer one from the first
        wait_until(lambda: newer_records(third), 20, "the newer node's record")
        assert newer_records(third) == newer_records(first) != []
        assert not [line for line in logs if "theirs" in line]
        assert first.counters().rejected == third.counters().rejected == {}


def newer_records(host: Host) -> list[bytes]:
    """Return the records, as they were signed, that hold what only the next minor version knows."""
    return [
        record.encoded for record in host.records() if record.encoded.endswith(b"only the next minor version knows")
    ]
