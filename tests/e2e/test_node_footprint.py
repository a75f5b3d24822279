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
# Texts that fill the bounds of their lengths, as the estimate supposes. Each completion earns something else: no update
# is made where all earn the same.
TASK = """
import random
import zlib

from node.tasks import Item

def make(seed):
    listed = ", ".join(str(random.Random(seed + at).randrange(100, 1000)) for at in range(19))
    return Item(f"Write a hundred more numbers: {listed}, ", "0")

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
    tasks = f'tasks=[{{name="file",answer="whole",options={{path="{task}"}}}}]'
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
    config, size = load_config(None, settings), measure_model(str(MODEL))
    estimated = memory_held(size, config, Machine(0, bf16=computes_in_bf16("cpu"))).peak()
    print(f"taken {taken / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB")
    assert 0.9 < estimated / taken < 1.35  # seen: 1.20 with adapters, 1.26 in float32
