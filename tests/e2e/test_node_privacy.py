"""Nothing leaves a node that its owner does not know of: no process of it looks anybody up or sends anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policies import write_tiny_policy
from tests.swarms import ROOT

TOLD = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS", "DISABLE_TELEMETRY")
SMALL = ["--rounds", "2", "--set", "sampling.completions=4"]


def contacts(tmp_path: Path, *arguments: str, **told: str) -> list[str]:
    """Run the command where nobody has told any library to be quiet; return whom its processes contacted."""
    watch, record = tmp_path / "watch", tmp_path / "record"
    watch.mkdir()
    shutil.copy(ROOT / "tests" / "fakes" / "watch_sockets.py", watch / "sitecustomize.py")
    environment = {name: value for name, value in os.environ.items() if name not in TOLD} | told
    environment |= {
        "PYTHONPATH": f"{watch}{os.pathsep}{ROOT}",
        "WATCHED_SOCKETS": str(record),
        "HF_ENDPOINT": "http://hub.invalid",  # a test itself tells nobody either
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [Path(sys.executable).with_name("gossamer"), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seen = record.read_text().splitlines()
    assert "self" in seen
    return [line for line in seen if line != "self"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["node", "--state", "state"],
        ["node", "--state", "state", "--model", "./policy", "--set", "policy.lora.r=2"],
        ["swarm", "-n", "1", "--out", "run", "--model", "./policy"],
    ],
    ids=["the built-in policy", "adapters on a folder", "a swarm"],
)
def test_a_node_contacts_nobody_but_its_peers(arguments: list[str], tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "policy")
    assert contacts(tmp_path, *arguments, *SMALL) == []


def test_an_owner_may_let_libraries_report_and_the_watch_sees_it(tmp_path: Path) -> None:
    seen = contacts(tmp_path, "node", "--state", "state", *SMALL, HF_HUB_DISABLE_TELEMETRY="0")
    assert seen and all(line.startswith("hub.invalid socket.getaddrinfo") for line in seen)
