"""Real nodes that share rollouts and weights: their groups for weights find each other through the swarm's records."""

import signal
from pathlib import Path

import pytest

from tests.swarms import gossamer, rows_of
from tests.waiting import wait_until


@pytest.mark.timeout(300)  # 15 to 40 s, each with a core of two
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["average", "async-diloco"])
def test_nodes_of_one_swarm_find_each_other_and_average_weights(tmp_path: Path, mode: str) -> None:
    settings = [f"weights.mode={mode}", "weights.every=5", "sampling.questions=2", "sampling.completions=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = gossamer("swarm", "examples/demo.toml", "-n", "3", "--rounds", "100000", "--out", tmp_path / "run", *words)
    folders = [tmp_path / "run" / "nodes" / f"n{number}" for number in range(3)]

    def together() -> bool:
        """Whether each has taken up what all three made, and has had rollouts of others."""
        rows = [rows_of(folder) for folder in folders]
        whole = all(sum(row.get("weights/members") == 3 for row in one) >= 2 for one in rows)
        assert run.poll() is None, run.communicate()
        return whole and all(any(row["groups_external"] for row in one) for one in rows)

    try:
        wait_until(together, 180, "all three in one group for weights")
        run.send_signal(signal.SIGINT)
        run.wait(60)
    finally:
        run.kill()
        run.communicate()
