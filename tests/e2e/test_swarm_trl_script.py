"""A script of TRL's joins a swarm by one changed import and an invite, and learns from what its founder shares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from node.telemetry.metrics_file import read_metrics
from tests.swarms import ROOT
from tests.waiting import wait_until

MAIN = "import sys; from node.cli import main; sys.exit(main())"
REWARDS = "def digits(completions, **kwargs):\n    return [float(len(text.strip()) == 2) for text in completions]\n"
CONFIG = """
[[tasks]]
name = "rewards/rows"
options = { path = "rows.jsonl", functions = ["my_rewards.py:digits"] }

[engine]
max_completion_length = 12

[sampling]
external = 4

[trainer]
learning_rate = 1e-8    # it goes on sharing what teaches

[observe]
enabled = false
"""
SCRIPT = """
import json, sys
from gossamer import GRPOTrainer
from trl import GRPOConfig
from my_rewards import digits

args = GRPOConfig(output_dir="joined", max_steps=10, learning_rate=5e-4, max_completion_length=12, bf16=False)
rows = [json.loads(line) for line in open("rows.jsonl")]
trainer = GRPOTrainer("builtin", digits, args, train_dataset=rows, swarm=sys.argv[1])
trainer.train()
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_script_of_trls_joins_a_swarm_by_its_import_and_an_invite(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"{number}+{number}="}) + "\n" for number in range(20))
    for name, text in {"my_rewards.py": REWARDS, "a.toml": CONFIG, "b.py": SCRIPT, "rows.jsonl": rows}.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "node" / "public", tmp_path)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = ["found", "club", "a.toml", "--state", "a", "--model", "builtin"]
    invite = tmp_path / "invite"
    with invite.open("w") as out, (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", MAIN, *words]
        founder = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=log)
    try:
        wait_until(lambda: "\n" in invite.read_text(), 100, "the invite")
        command = [sys.executable, "b.py", invite.read_text().strip()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        founder.terminate()
        founder.wait(60)
    found = read_metrics(tmp_path / "joined" / "metrics.jsonl")
    assert len(found) == 10
    assert sum(row["groups_external"] for row in found) > 0
    assert found[-1]["swarm/rejected"] == {}
