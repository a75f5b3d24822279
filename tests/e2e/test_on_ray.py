"""An experiment and a swarm on a Ray cluster of two machines, of which one dies, and who reaches such a cluster.

Ray lives in .venv-ray (285 MB).
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from tests.swarms import ROOT, events_of, rows_of
from tests.waiting import wait_until

PACKAGES = ROOT / ".venv-ray"
TOKEN = secrets.token_hex(32)  # of the cluster of two machines
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
        "TMPDIR": str(home),  # a machine that died leaves the folders of its nodes
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        "RAY_worker_niceness": "0",  # as everybody else here, where Ray's 15 starves
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }


def of_a_stranger(home: Path) -> dict[str, str]:
    """Return the environment of somebody who was told of no token."""
    given = environment(home)
    del given["RAY_AUTH_MODE"], given["RAY_AUTH_TOKEN"]
    return given


def ray(home: Path, *words: str) -> None:
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
    subprocess.run(command, env=environment(home), check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    """Two raylets with a processor each: the address, and the process id of the second."""
    home = tmp_path_factory.mktemp("r")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    before = {process.pid for process in psutil.process_iter()}
    address = f"127.0.0.1:{port}"
    ray(home, "start", "--head", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false")
    first = {process.pid for process in psutil.process_iter() if process.name() == "raylet"}
    ray(home, "start", "--address", address, "--num-cpus", "1")
    (second,) = {process.pid for process in psutil.process_iter() if process.name() == "raylet"} - first - before
    try:
        yield address, second, home
    finally:
        end_all(home)


def living(home: Path) -> list[psutil.Process]:
    """Return the processes that were started from here, those of the cluster among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                found.append(process)
    return found


def end_all(home: Path) -> None:
    """Kill the processes that were started from here."""
    ours = living(home)
    for process in ours:
        process.kill()
    psutil.wait_procs(ours, 10)


def gossamer(
    home: Path, *words: str | Path, said: Path | None = None, given: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the command line; what it says goes into a file, or into a pipe."""
    command = [sys.executable, "-c", "from node.cli import main; main()", *map(str, words)]
    with said.open("w") if said else nullcontext(subprocess.PIPE) as stdout:
        return subprocess.Popen(command, cwd=ROOT, env=given or environment(home), stdout=stdout, text=True)


def lab(file: Path, out: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    return gossamer(home, "lab", "run", file, "--out", out, *more)


def nodes_left(home: Path) -> list[str]:
    """Processes of nodes that run on the cluster."""
    found = []
    for process in living(home):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "forkserver" in words or "NodeActor" in words:
                found.append(words)
    return found


def learnt(folder: Path, since: int) -> float:
    """How many groups of its peers a node has trained on after a round."""
    return sum(row["groups_external"] for row in rows_of(folder) if row["round"] > since)


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


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_swarm_goes_on_when_a_machine_dies_whose_nodes_come_back_and_ctrl_c_leaves_no_process(
    cluster: tuple[str, int, Path], tmp_path: Path
) -> None:
    address, second, home = cluster
    out, said = tmp_path / "out", tmp_path / "said"
    options = ["-n", "3", "--seed", "1", "--rounds", "100000", "--set", "trainer.save_steps=5", "--no-table"]
    swarm = gossamer(home, "swarm", *options, "--on", f"ray={address}", "--out", out, said=said)
    folders = [out / "nodes" / name for name in ("n0", "n1", "n2")]
    wait_until(lambda: all(len(rows_of(folder)) >= 20 for folder in folders), 500)
    page = re.search(r"dashboard: (\S+)", said.read_text())
    assert page is not None
    with urllib.request.urlopen(f"{page[1]}status", timeout=30) as answer:
        shown = json.load(answer)["nodes"]
    assert [(node["state"], bool(node["status"]["peers"])) for node in shown] == [("running", True)] * 3
    assert all((folder / "rollouts.jsonl").stat().st_size for folder in folders)

    os.kill(second, signal.SIGKILL)
    wait_until(lambda: any(len(events_of(folder, "training")) > 1 for folder in folders), 300)
    back = next(folder for folder in folders if len(events_of(folder, "training")) > 1)
    before, after = (entry["node"] for entry in events_of(back, "listening"))
    went_on_from = events_of(back, "training")[1]["round"]
    assert before != after and went_on_from >= 5 and went_on_from % 5 == 0
    wait_until(lambda: learnt(back, went_on_from), 200)
    assert any(len(events_of(folder, "training")) == 1 for folder in folders), "the others wait for nobody"

    swarm.send_signal(signal.SIGINT)
    assert swarm.wait(timeout=200) == 128 + signal.SIGINT
    wait_until(lambda: not nodes_left(home), 30)
    assert f"report: {out / 'report.html'}" in said.read_text() and (out / "report.html").exists()
    for folder in folders:
        rounds = [row["round"] for row in rows_of(folder)]
        assert rounds == list(range(1, len(rounds) + 1))
    assert (back / "checkpoints" / f"checkpoint-{rows_of(back)[-1]['round']}").exists()


RUNS_CODE = """
import logging, sys
import ray
ray.init(address=sys.argv[1], include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print(ray.get(ray.remote(num_cpus=0)(lambda: "ran").remote(), timeout=60))
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_who_has_no_token_runs_nothing_on_the_machines_of_a_slurm_job(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("r")
    (home / "bin").mkdir()
    (home / "runs_code.py").write_text(RUNS_CODE)
    runs_code = f'{sys.executable} {home}/runs_code.py "${{last#ray=}}"'
    programs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "scontrol": "echo first; echo second",
        "hostname": "echo 127.0.0.1",  # which Ray takes for this machine's own address
        "ray": f'exec {sys.executable} -c "from ray.scripts.scripts import main; main()" "$@"',
        "gossamer": f"last=${{!#}}\n{runs_code} >{home}/friend\n"
        f"env -u RAY_AUTH_MODE -u RAY_AUTH_TOKEN {runs_code} >{home}/stranger 2>{home}/why",
    }
    for name, text in programs.items():
        (home / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (home / "bin" / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    of_slurm = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
    path = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "PORT": str(port)}
    try:
        job = subprocess.run(
            ["bash", ROOT / "examples" / "slurm-ray.sh", "swarm"],
            env=of_a_stranger(home) | of_slurm | path,
            stdout=subprocess.DEVNULL,
            timeout=200,
            check=False,
        )
        assert (home / "friend").read_text() == "ran\n"
        assert (job.returncode, (home / "stranger").read_text()) == (1, "")
        assert "Authentication token is missing or incorrect" in (home / "why").read_text()
        assert not (home / ".ray").exists()
    finally:
        end_all(home)


def listening(home: Path) -> dict[str, set[str]]:
    """Return the addresses that the processes started from here listen on, by the name of the process."""
    found: dict[str, set[str]] = {}
    for process in living(home):
        with suppress(psutil.Error):
            for line in process.net_connections("tcp"):
                if line.status == psutil.CONN_LISTEN:
                    found.setdefault(process.name(), set()).add(line.laddr.ip.removeprefix("::ffff:"))
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_that_a_command_starts_for_itself_listens_on_loopback(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("r")  # Ray's sockets have short names
    out, said = home / "out", home / "said"
    options = ["-n", "2", "--rounds", "100000", "--no-table", "--on", "ray", "--out", out]
    swarm = gossamer(home, "swarm", *options, said=said, given=of_a_stranger(home))
    folders = [out / "nodes" / name for name in ("n0", "n1")]
    try:
        wait_until(lambda: all(map(rows_of, folders)) or swarm.poll() is not None, 300)
        places = listening(home)
        assert {"gcs_server", "raylet"} <= places.keys(), said.read_text()
        assert set.union(*places.values()) <= {"127.0.0.1", "::1"}, places
        assert not (home / ".ray").exists()
        swarm.send_signal(signal.SIGINT)
        assert swarm.wait(timeout=200) == 128 + signal.SIGINT
    finally:
        end_all(home)
