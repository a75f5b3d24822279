"""An experiment on a Ray cluster of two machines, of which one dies meanwhile. Ray lives in .venv-ray (285 MB)."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.swarms import ROOT
from tests.waiting import wait_until

PACKAGES = ROOT / ".venv-ray"
SEEDS = 3
LAB = f"""
nodes = 2
seeds = {SEEDS}
runner = "memory"

[settings]
rounds = 60
eval = {{ every = "ends", count = 2, completions = 0 }}

[arms."alone"]
settings.sampling = {{ local = 4, external = 0 }}

[arms."2/16"]
"""


def environment(home: Path) -> dict[str, str]:
    assert (PACKAGES / "ray").is_dir(), "tests/install_ray.sh puts Ray there"
    paths = f"{ROOT}{os.pathsep}{PACKAGES}"
    return os.environ | {
        "PYTHONPATH": paths,
        "HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
    }


def ray(home: Path, *words: str) -> None:
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
    subprocess.run(command, env=environment(home), check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    """Two raylets with a processor each: the address, and the process id of the second."""
    home = tmp_path_factory.mktemp("r")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    before = {one.pid for one in psutil.process_iter()}
    address = f"127.0.0.1:{port}"
    ray(home, "start", "--head", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false")
    first = {one.pid for one in psutil.process_iter() if one.name() == "raylet"}
    ray(home, "start", "--address", address, "--num-cpus", "1")
    (second,) = {one.pid for one in psutil.process_iter() if one.name() == "raylet"} - first - before
    try:
        yield address, second, home
    finally:
        ours = [one for one in psutil.process_iter() if one.pid not in before and str(home) in " ".join(_words(one))]
        for one in ours:
            one.kill()
        psutil.wait_procs(ours, 10)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def lab(file: Path, out: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from node.cli import main; main()",
        "lab",
        "run",
        str(file),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, text=True)


def rewards(out: Path) -> dict[str, list[float]]:
    """The rewards of each node of each run, round by round."""
    return {
        str(path.relative_to(out)): [json.loads(row)["reward"] for row in path.read_text().splitlines()]
        for path in sorted(out.rglob("metrics.jsonl"))
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_survives_the_death_of_a_machine_and_has_the_numbers_of_one_without_a_cluster(
    cluster: tuple[str, int, Path], tmp_path: Path
) -> None:
    address, second, home = cluster
    file = tmp_path / "lab.toml"
    file.write_text(LAB)
    there = lab(file, tmp_path / "there", home, "--on", f"ray={address}")
    assert there.stdout is not None
    said = []
    wait_until(lambda: said.append(there.stdout.readline()) or "done;" in said[-1], 300)
    os.kill(second, signal.SIGKILL)
    rest, _ = there.communicate(timeout=600)
    print(*said, rest)
    assert there.returncode == 0
    here = lab(file, tmp_path / "here", home)
    here.communicate(timeout=600)
    assert here.returncode == 0
    assert len(rewards(tmp_path / "here")) == 4 * SEEDS
    assert rewards(tmp_path / "there") == rewards(tmp_path / "here")
    again = lab(file, tmp_path / "there", home, "--on", f"ray={address}")
    assert f"{2 * SEEDS} runs, {2 * SEEDS} of them done" in again.communicate(timeout=300)[0]
