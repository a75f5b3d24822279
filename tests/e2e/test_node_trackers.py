"""One node with each tracker, offline: its files are read back, and hold each round's reward.

`make long` installs them first (tests/install_trackers.sh); TensorBoard is in tests/unit/test_node_report_to.py.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.swarms import ROOT, rows_of

TRACKERS = ROOT / ".venv-trackers"
RUN = f"import sys; sys.path.append({str(TRACKERS)!r}); from node.cli import main; sys.exit(main())"
HISTORY = f"""
import json, sys
sys.path.append({str(TRACKERS)!r})
from wandb.proto import wandb_internal_pb2 as proto
for line in sys.stdin:
    record = proto.Record.FromString(bytes.fromhex(line))
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        print(json.dumps({{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}}))
"""
BLOCK, HEAD = 32768, 7  # of LevelDB's log, after wandb's own head of as many bytes


@pytest.mark.long
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_is_told_of_each_round(tracker: str, tmp_path: Path) -> None:
    assert (TRACKERS / tracker).is_dir(), "tests/install_trackers.sh has to be run first"
    folder = tmp_path / "n0"
    settings = [f'trainer.trl.report_to=["{tracker}"]', "network.enabled=false", "sampling.external=0"]
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    arguments = ["--rounds", "3", "--seed", "1", *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "node", "--state", str(folder), *arguments],
        env=os.environ | places | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = {"wandb": wandb_rows, "trackio": trackio_rows}[tracker](tmp_path)
    rewards = {row["train/round"]: row["train/reward"] for row in told if "train/reward" in row}
    assert rewards == {row["round"]: row["reward"] for row in rows_of(folder)} and len(rewards) == 3


def trackio_rows(folder: Path) -> Iterator[dict[str, float]]:
    with sqlite3.connect(folder / "trackio" / "gossamer.db") as database:
        yield from (json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics WHERE run_name = 'n0'"))


def wandb_rows(folder: Path) -> Iterator[dict[str, float]]:
    (file,) = (folder / "wandb").rglob("*.wandb")
    records = "".join(f"{record.hex()}\n" for record in log_records(file.read_bytes()))
    done = subprocess.run([sys.executable, "-c", HISTORY], input=records, capture_output=True, text=True, check=True)
    yield from map(json.loads, done.stdout.splitlines())


def log_records(data: bytes) -> Iterator[bytes]:
    """Read LevelDB's log format: blocks of pieces, each a checksum, a length, a kind (1 whole, 2 to 4 a part)."""
    at, parts = HEAD, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEAD : at + HEAD + size]
        parts = piece if kind in (1, 2) else parts + piece
        at += HEAD + size
        if kind in (1, 4):
            yield parts
