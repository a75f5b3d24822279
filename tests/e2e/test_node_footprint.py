"""What `gossamer doctor --model` says a node takes is what a real node takes: SmolLM2-135M on a processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node.config import load_config
from node.policy.detection import computes_in_bf16, measure_model
from node.policy.memory import Machine, memory_held
from tests.swarms import ROOT, rows_of

MODEL = ROOT / "runs" / "models" / "smollm2-135m-instruct"
PEAK_OF = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
)
# Arithmetic whose every completion earns something else: without it, no update is made where all are alike.
TASK = """
import zlib
from node.tasks.builtin.families import load_arithmetic

make = load_arithmetic({}).make

def verify(item, text):
    return 1.0 if text == item.answer else zlib.crc32(text.encode()) / 2**32
"""
SETTINGS = [
    "rounds=2",
    "engine.max_prompt_length=160",
    "engine.max_completion_length=16",
    "sampling.external=0",
    "trainer.tokens_per_batch=1024",
    "network.enabled=false",
    "threads=1",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "rank", [pytest.param(0, id="all weights", marks=pytest.mark.long), pytest.param(16, id="adapters")]
)
def test_the_estimate_is_near_what_a_node_takes(rank: int, tmp_path: Path) -> None:
    if not MODEL.exists():
        subprocess.run([sys.executable, ROOT / "examples/fetch_smollm2.py", MODEL], check=True)
    task = tmp_path / "task.py"
    task.write_text(TASK)
    tasks = f'tasks=[{{name="file",examples=3,answer="whole",options={{path="{task}"}}}}]'
    settings = [*SETTINGS, tasks, f"policy.lora.r={rank}"]
    node = [Path(sys.executable).with_name("gossamer"), "node", "--state", tmp_path / "node", "--model", MODEL]
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF, *node, *(f"--set={setting}" for setting in settings)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [row["grad_norm"] > 0 for row in rows_of(tmp_path / "node")] == [True, True]
    taken = int(done.stdout.splitlines()[-1])
    bf16 = computes_in_bf16("cpu")
    config, size = load_config(None, settings), measure_model(str(MODEL))
    estimated = memory_held(size, config, Machine(0, bf16=bf16)).peak()
    print(f"taken {taken / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB")
    # Where float32 is computed in, less of the peak comes at once than is added up: 1.48 was seen, 1.93 with
    # adapters, on the safe side.
    assert 0.75 < estimated / taken < (1.35 if bf16 else 2.1)
