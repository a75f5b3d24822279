"""Nothing leaves a node that its owner does not know of: no process of it looks anybody up or sends anything."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.policies import write_tiny_policy
from tests.swarms import ROOT
from tests.waiting import wait_until

TAKEN = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")  # not what quiets a library: DO_NOT_TRACK, CI, proxies
SMALL = ["--set", "sampling.completions=4"]


@dataclass(frozen=True)
class Watched:
    """The command, run where nobody has told any library to be quiet; `contacts` is whom its processes contacted."""

    process: subprocess.Popen[str]
    record: Path

    def contacts(self) -> list[str]:
        seen = self.record.read_text().splitlines() if self.record.exists() else []
        return [line for line in seen if line != "self"]


def start(tmp_path: Path, *arguments: str, **told: str) -> Watched:
    """Start the command under the watch, in an environment that tells no library to be quiet."""
    watch, record = tmp_path / "watch", tmp_path / "record"
    watch.mkdir()
    shutil.copy(ROOT / "tests" / "fakes" / "watch_sockets.py", watch / "sitecustomize.py")
    environment = {name: os.environ[name] for name in TAKEN if name in os.environ}
    environment |= told | {
        "PYTHONPATH": f"{watch}{os.pathsep}{ROOT}",
        "WATCHED_SOCKETS": str(record),
        "HF_ENDPOINT": "http://hub.invalid",  # a test itself tells nobody either
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [Path(sys.executable).with_name("gossamer"), *arguments, *SMALL]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    return Watched(process, record)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["node", "--state", "state", "--model", "builtin"], id="the built-in policy", marks=pytest.mark.slow
        ),
        pytest.param(
            ["node", "--state", "state", "--model", "./policy", "--set", "policy.lora.r=2"],
            id="adapters on a folder",
            marks=pytest.mark.long,
        ),
        pytest.param(["swarm", "-n", "1", "--out", "run", "--model", "./policy"], id="a swarm", marks=pytest.mark.slow),
    ],
)
def test_a_node_contacts_nobody_but_its_peers(arguments: list[str], tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "policy")
    watched = start(tmp_path, *arguments, "--rounds", "2")
    _, errors = watched.process.communicate(timeout=100)
    assert watched.process.returncode == 0, errors
    assert "self" in watched.record.read_text().splitlines()  # the watch saw something
    assert watched.contacts() == []


@pytest.mark.slow
def test_an_owner_may_let_libraries_report_and_the_watch_sees_it(tmp_path: Path) -> None:
    watched = start(tmp_path, "node", "--state", "state", "--model", "builtin", HF_HUB_DISABLE_TELEMETRY="0")
    try:  # it reports from a thread of its own, which the last round of a short run would not wait for
        seen = wait_until(lambda: watched.contacts() or watched.process.poll() is not None, 100, "a report")
    finally:
        watched.process.kill()
        watched.process.communicate()
    assert isinstance(seen, list) and all(line.startswith("hub.invalid socket.getaddrinfo") for line in seen)
