"""The report and the table, for whole, young and damaged runs."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from node.config import NodeConfig
from node.supervisor import NodeProcess, State
from node.telemetry.live_table import clock, line, render, size, trend
from node.telemetry.metrics import MetricsLog, Progress
from node.telemetry.report import render_report, write_report
from tests.fakes.rows import make_row


def fill(out: Path, nodes: int, rounds: int) -> None:
    for node in range(nodes):
        folder = out / "nodes" / f"n{node}"
        folder.mkdir(parents=True)
        log = MetricsLog(folder / "metrics.jsonl")
        for number in range(1, rounds + 1):
            log.append(make_row(node, number))


class Links(HTMLParser):
    """Collects whatever a page would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.found.append(f"{tag} {name}={value}")


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 1), (4, 30), (12, 60)])
def test_report_stands_alone_and_shows_each_node(tmp_path: Path, nodes: int, rounds: int) -> None:
    fill(tmp_path, nodes, rounds)
    page = write_report(tmp_path).read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == (4 if nodes > 1 else 3)  # a node alone rejects nothing
    for node in range(nodes):
        assert f"<td>n{node}</td><td>{rounds}</td>" in page
    assert len(page) < 500_000


def test_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    fill(tmp_path, 12, 2)
    page = write_report(tmp_path).read_text()
    assert page.index("<td>n2</td>") < page.index("<td>n10</td>")


def test_a_run_without_rejects_says_so() -> None:
    page = render_report("run", {"n0": [make_row(0, 1), make_row(0, 2)]}, {}, {})
    assert "No node rejected anything" in page
    assert page.count("<svg") == 3


def test_rejects_are_named(tmp_path: Path) -> None:
    page = render_report("run", {"n1": [make_row(1, number) for number in range(1, 61)]}, {}, {})
    assert "unknown_task" in page and "false_reward" in page


def test_a_young_or_damaged_run_still_has_a_report(tmp_path: Path) -> None:
    assert "No node has finished a round yet" in write_report(tmp_path).read_text()
    fill(tmp_path, 2, 5)
    (tmp_path / "swarm.json").write_text('{"seed": 1, "conf')
    metrics = tmp_path / "nodes" / "n0" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-100])
    (tmp_path / "nodes" / "n1" / "metrics.jsonl").unlink()
    page = write_report(tmp_path).read_text()
    assert "<td>n0</td><td>4</td>" in page
    assert "<td>n1</td><td>0</td>" in page


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    run = {"seed": 1, "swarm": "ab", "config": {"policy": {"model": "<script>alert(1)</script>"}}}
    page = render_report("<b>run</b>", {"n0": [make_row(0, 1)]}, {}, run)
    assert "<script" not in page and "<b>run" not in page
    assert "policy.model" in page


def child(name: str, rounds: int, state: State = State.RUNNING) -> NodeProcess:
    made = NodeProcess.create(Path("run") / "nodes" / name, NodeConfig(rounds=300))
    made.progress.update(make_row(int(name[1:]), number) for number in range(1, rounds + 1))
    made.state = state
    return made


@pytest.mark.parametrize("width", [80, 140])
def test_table_fits_its_terminal(width: int) -> None:
    children = [child("n0", 250), child("n1", 300, State.DONE), child("n2", 0, State.WAITING)]
    children[0].restarts = 2
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(children, 75.0, console.width))
    text = console.export_text()
    assert max(len(row) for row in text.splitlines()) <= width
    for part in ("250/300", "running ↻2", "waiting", "1000", "3.5 MB"):
        assert part in text
    assert ("█" in text) == (width > 100)


def test_line_tells_the_swarm() -> None:
    children = [child("n0", 10), child("n1", 20)]
    text = line(children, 3725.0)
    assert text.startswith("1:02:05  0 of 2 nodes up, round 10 to 20 of 300, reward ")
    assert "groups 120 own" in text
    assert text.endswith("6 rejected")


def test_a_swarm_without_a_last_round_is_told_without_one() -> None:
    endless = child("n0", 10)
    endless.progress.rounds = None
    assert "of 1 nodes up, round 10 to 10, reward " in line([endless], 1.0)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render([endless], 1.0, 200))
    assert "10/" not in console.export_text()


def test_progress_follows_a_node_that_goes_back() -> None:
    progress = Progress(300)
    progress.update(make_row(0, number) for number in range(1, 11))
    progress.update(make_row(0, number) for number in range(1, 8))
    assert (progress.round, progress.points[-1].local) == (7, 28)


def test_small_displays() -> None:
    assert [clock(0), clock(61), clock(3600)] == ["0:00", "1:01", "1:00:00"]
    assert [size(0), size(999), size(1500), size(123_456), size(2e13)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "123 kB",
        "20.0 TB",
    ]
    assert trend(Progress(3)) == ""
    flat = Progress(3)
    flat.update([{"round": 1, "reward": 0.0}, {"round": 2, "reward": 0.0}])
    assert trend(flat) == "▁▁"
