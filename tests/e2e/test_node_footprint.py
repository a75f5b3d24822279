"""What `gossamer doctor --model` says a node takes is what a real node takes: SmolLM2-135M on a processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node.config import parse_config
from node.detection import measure_model
from node.footprint import footprint, peak
from node.policy import computes_in_bf16
from tests.swarms import ROOT, gossamer

MODEL = ROOT / "runs" / "models" / "smollm2-135m-instruct"
SETTINGS = {
    "rounds": "2",
    "tasks": '[{name="builtin/arithmetic",examples=3,answer="first_line"}]',
    "engine.max_prompt_length": "96",
    "engine.max_completion_length": "16",
    "sampling.external": "0",
    "trainer.tokens_per_batch": "1024",
    "network.enabled": "false",
    "threads": "1",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lora", [0, 16], ids=["all weights", "adapters"])
def test_the_estimate_is_near_what_a_node_takes(lora: int, tmp_path: Path) -> None:
    if not MODEL.exists():
        subprocess.run([sys.executable, ROOT / "examples/fetch_smollm2.py", MODEL], check=True)
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    process = gossamer("node", "--state", tmp_path, "--model", MODEL, f"--set=policy.lora.r={lora}", *settings)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (tmp_path / "log.jsonl").read_text()
    taken = usage.ru_maxrss * 1024
    config = parse_config(
        {
            "policy": {"lora": {"r": lora}},
            "engine": {"max_prompt_length": 96, "max_completion_length": 16},
            "sampling": {"external": 0},
            "trainer": {"tokens_per_batch": 1024},
        }
    )
    estimate = peak(footprint(measure_model(str(MODEL)), config, bf16=computes_in_bf16("cpu")))
    print(f"taken {taken / 1e9:.2f} GB, estimated {estimate / 1e9:.2f} GB")
    assert 0.75 < estimate / taken < 1.35
