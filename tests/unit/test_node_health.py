"""The container's health check: a node is healthy while it keeps writing to its folder."""

import os
import sys
from pathlib import Path

import pytest

from node.operations import health


def write(path: Path, modified: float) -> None:
    path.write_text("x\n")
    os.utime(path, (modified, modified))


def test_a_folder_without_a_node_is_not_alive(tmp_path: Path) -> None:
    write(tmp_path / "unrelated.txt", 1000.0)
    assert health.idle_seconds(tmp_path, 1000.0) is None


def test_the_newest_sign_counts(tmp_path: Path) -> None:
    write(tmp_path / "address", 100.0)
    write(tmp_path / "metrics.jsonl", 900.0)
    assert health.idle_seconds(tmp_path, 1000.0) == pytest.approx(100.0)


@pytest.mark.parametrize(("age", "status"), [(10.0, 0), (10_000.0, 1)])
def test_silence_beyond_the_limit_is_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, status: int
) -> None:
    write(tmp_path / "metrics.jsonl", 50_000.0)
    monkeypatch.setattr(health.time, "time", lambda: 50_000.0 + age)
    monkeypatch.setattr(sys, "argv", ["health", str(tmp_path), "--limit", "600"])
    assert health.main() == status


def test_a_node_that_never_wrote_is_unhealthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["health", str(tmp_path)])
    assert health.main() == 1
