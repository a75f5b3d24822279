"""The files for clusters: each passes its own tool, and starts what there is, with options that there are."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from node.cli.app import app
from node.config import is_key

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "examples").glob("slurm*.sh"))
FLAGS = {  # of sbatch(1)
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal",
    "requeue", "open-mode",
}  # fmt: skip


def check_command(words: list[str]) -> None:
    """Fail unless `gossamer` has this verb with these options, and each setting is one."""
    verb, *rest = words
    known = {option for param in typer.main.get_command(app).commands[verb].params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known
    settings = [rest[at + 1].partition("=")[0] for at, word in enumerate(rest) if word == "--set"]
    assert all(map(is_key, settings)), settings


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text()))


def test_the_manifest_is_what_kubernetes_takes() -> None:
    tool = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run(
        [tool, "--strict", ROOT / "examples" / "kubernetes.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_pod_of_the_manifest_starts_what_there_is_keeps_its_folder_and_has_time_to_stop() -> None:
    relay, board, node = (one["spec"] for one in objects() if one["kind"] == "StatefulSet")
    (container,) = node["template"]["spec"]["containers"]
    for spec in (board, node):
        (one,) = spec["template"]["spec"]["containers"]
        check_command(one["args"])
    assert node["template"]["spec"]["terminationGracePeriodSeconds"] > 60
    for spec in (relay, board, node):
        security = spec["template"]["spec"]["securityContext"]  # else each start makes the key its group's, too
        assert security["fsGroup"] and security["fsGroupChangePolicy"] == "OnRootMismatch"
        (one,) = spec["template"]["spec"]["containers"]
        assert {"name": "state", "mountPath": "/state"} in one["volumeMounts"]
        assert spec["volumeClaimTemplates"][0]["metadata"]["name"] == "state"
        assert spec["serviceName"] in {service["metadata"]["name"] for service in objects()}
    (shown,) = (
        one["spec"] for one in objects() if one["metadata"]["name"] == "gossamer-board" and one["kind"] == "Service"
    )
    (one,) = board["template"]["spec"]["containers"]
    assert shown["selector"] == board["template"]["metadata"]["labels"]
    assert str(one["ports"][1]["containerPort"]) == one["args"][one["args"].index("--port") + 1]
    for line in re.findall(r"gossamer (.+)", relay["template"]["spec"]["containers"][0]["args"][0]):
        check_command(shlex.split(line))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_job_passes_shellcheck_and_asks_slurm_for_what_there_is(job: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([tool, job], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    asked = re.findall(r"^#SBATCH --([a-z-]+)", job.read_text(), re.MULTILINE)
    assert set(asked) <= FLAGS and "time" in asked


@pytest.mark.parametrize("fresh", [True, False])
def test_a_job_starts_a_node_and_goes_on_with_the_one_that_is_there(fresh: bool, tmp_path: Path) -> None:
    said = run_job(tmp_path, "slurm.sh", fresh=fresh)
    assert said[:2] == ["srun", "--kill-on-bad-exit=1"] and said[2] == "gossamer"
    check_command(said[3:])
    joined = tmp_path / "joined"
    assert joined.exists() == fresh
    if fresh:
        words, invite = joined.read_text().splitlines()
        check_command(shlex.split(words))
        assert invite == "gossamer://a" and invite not in words
    assert said[said.index("--processes") + 1] == "4"


def test_a_job_on_ray_runs_a_command_when_all_machines_are_there_and_passes_the_end_of_its_time_on(
    tmp_path: Path,
) -> None:
    stand_ins = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "scontrol": "echo first; echo second",
        "hostname": "echo 10.0.0.1 10.0.0.2",
        "ray": f'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>{tmp_path}/tokens; echo "$@" >>{tmp_path}/ray\n'
        '[ "$1" = status ] && printf " 1 node_a\\n 1 node_b\\n" || true',
        "gossamer": f'trap "echo asked to stop; exit 143" TERM\necho "$@" >{tmp_path}/said\n'
        f'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>{tmp_path}/tokens\n'
        f"kill -TERM $PPID\nread -r _ <{tmp_path}/ever",
    }
    os.mkfifo(tmp_path / "ever")
    for name, text in stand_ins.items():
        place(tmp_path / "bin" / name, text)
    words = ["swarm", "examples/demo.toml", "-n", "8", "--out", "runs/a"]
    given = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm-ray.sh", *words],
        env=os.environ | given | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (143, "asked to stop\n"), done.stderr
    said = (tmp_path / "said").read_text().split()
    assert said == [*words, "--on", "ray=10.0.0.1:6379"]
    check_command(said)
    started = (tmp_path / "ray").read_text()
    assert any(line.startswith("start --address=10.0.0.1:6379") for line in started.splitlines())
    (token,) = set((tmp_path / "tokens").read_text().splitlines())  # of the head, of the others and of the command
    assert re.fullmatch("token [0-9a-f]{64}", token) and token.split()[1] not in started + done.stdout + done.stderr


def place(program: Path, text: str) -> None:
    """Put a stand-in for a program there."""
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)


def run_job(tmp_path: Path, name: str, *, fresh: bool) -> list[str]:
    """Return the words of the last command of a job, with a stand-in for Slurm's."""
    place(tmp_path / "bin" / "srun", 'printf "%s\\n" srun "$@"')
    place(tmp_path / "bin" / "gossamer", f'echo "$@" >{tmp_path}/joined; cat >>{tmp_path}/joined')
    state = tmp_path / "state"
    if not fresh:
        state.mkdir()
        (state / "settings.json").touch()
    given = {"STATE": str(state), "INVITE": "gossamer://a", "SLURM_GPUS_ON_NODE": "4"}
    environment = os.environ | given | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "examples" / name], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()
