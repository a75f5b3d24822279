"""Metrics survive kills, rewinds and readers that look at the wrong moment; each is declared."""

import json
import re
import tracemalloc
from pathlib import Path

from node.fleet.progress import NodeProgress
from node.metrics import METRICS, is_declared, recent, total
from node.telemetry.dashboard.feed import Feed
from node.telemetry.metrics_file import MetricsLog, MetricsTail, read_metrics
from node.training.budget import COUNTED, spent_in


def rows(count: int, first: int = 1) -> list[dict[str, object]]:
    return [{"round": number, "reward": number / 10} for number in range(first, first + count)]


def write(path: Path, count: int) -> MetricsLog:
    log = MetricsLog(path)
    for row in rows(count):
        log.append(row)
    return log


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(3)


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert MetricsTail(tmp_path / "metrics.jsonl").poll() == []


def test_every_torn_last_line_is_left_out_and_no_row_after_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    second_line = whole.index(b"\n") + 1
    for cut in range(second_line + 1, len(whole)):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert [row["round"] for row in read_metrics(path)] == list(range(1, kept + 1))
        log = MetricsLog(path)
        log.rewind(kept)
        log.append({"round": kept + 1})
        assert [row["round"] for row in read_metrics(path)] == list(range(1, kept + 2))


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append({"round": 1, "loss": float("nan"), "nested": {"x": float("inf")}})
    assert json.loads(path.read_text()) == {"round": 1, "loss": None, "nested": {"x": None}}


def test_rows_after_the_round_that_a_node_went_back_to_are_left_out_and_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = write(path, 5)
    before = path.read_bytes()
    log.rewind(2)
    assert read_metrics(path) == rows(2)
    log.append({"round": 3, "reward": 0.9})
    assert read_metrics(path, ["round"]) == [{"round": 1}, {"round": 2}, {"round": 3}]
    assert path.read_bytes().startswith(before)
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tail_reads_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = write(path, 2)
    tail = MetricsTail(path)
    assert tail.poll() == rows(2)
    assert tail.poll() == []
    log.append({"round": 3})
    assert tail.poll() == [{"round": 3}]


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round":1}\n{"rou')
    tail = MetricsTail(path)
    assert tail.poll() == [{"round": 1}]
    with path.open("ab") as file:
        file.write(b'nd":2}\n')
    assert tail.poll() == [{"round": 2}]


def test_tail_and_progress_follow_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log, progress = write(path, 4), NodeProgress(4)
    tail = MetricsTail(path)
    progress.update(tail.poll())
    assert [point.round for point in progress.points] == [1, 2, 3, 4]
    log.rewind(2)
    log.append({"round": 3, "reward": 0.9})
    progress.update(tail.poll())
    assert [point.round for point in progress.points] == [1, 2, 3]
    assert progress.last == {"round": 3, "reward": 0.9}


def test_a_file_with_a_bound_begins_anew_once_it_is_above_it(tmp_path: Path) -> None:
    log, tail = MetricsLog(tmp_path / "metrics.jsonl", max_bytes=100), MetricsTail(tmp_path / "metrics.jsonl")
    told = []
    for number in range(1, 60):
        log.append({"round": number})
        told += [row["round"] for row in tail.poll()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.1"]
    assert all(path.stat().st_size < 120 for path in tmp_path.iterdir())
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == log.last == {"round": 59}
    assert told == sorted(set(told)) and len(told) > 50  # the row that was too much is in the other file


def test_to_read_a_long_run_takes_less_memory_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fat = {f"something/that is/measured/{at}": 0.1 * at for at in range(60)}
    MetricsLog(path).append(*({"round": number, "reward": 0.5, **fat} for number in range(1, 500)))
    tracemalloc.start()
    try:
        log = MetricsLog(path)
        tracemalloc.reset_peak()
        log.rewind(499)
        spent_in(read_metrics(path, COUNTED))
        assert Feed({"n0": tmp_path}).poll()
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_newest_rows_are_remembered_over_a_rewind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.last == {}
    for number in range(1, 101):
        log.append({"round": number})
    log.rewind(50)
    for number in range(51, 56):
        log.append({"round": number})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(54)
    assert [row["round"] for row in log.recent] == list(range(35, 55)) and log.last == {"round": 54}
    log.rewind(0)
    assert log.last == {}


def test_each_metric_that_the_code_names_is_declared() -> None:
    prefixes = {name.partition("/")[0] for name in METRICS if "/" in name} - {"rewards", "process"}
    quoted = re.compile(rf'"((?:{"|".join(prefixes)})/[\w@]+)"')
    files = (Path(__file__).parents[2] / "node").rglob("*.py")
    named = {name for path in files for name in quoted.findall(path.read_text())}
    assert {"swarm/age_rounds", "time/eval"} < named
    assert {name for name in named if not is_declared(name)} == set()


def test_rounds_are_combined_as_each_metric_says() -> None:
    rows = [
        {"round": 1, "reward": 0.0, "groups_local": 2, "swarm/bytes_sent": 10, "swarm/taught_by": {"ann": 1}},
        {"round": 2, "reward": None, "groups_local": 4, "swarm/bytes_sent": 30, "swarm/taught_by": {"ann": 2}},
        {"round": 3, "reward": 1.0, "groups_local": 3, "swarm/bytes_sent": 5, "swarm/rejected": {"forged": 2}},
    ]
    names = ("round", "reward", "groups_local", "swarm/bytes_sent", "swarm/taught_by", "swarm/rejected", "entropy")
    assert [recent(METRICS[name], rows) for name in names] == [3, 0.5, 3, 5, {"ann": 3}, {"forged": 2}, None]
    assert [total(METRICS[name], rows) for name in names] == [3, 0.5, 9, 35, {"ann": 3}, {"forged": 2}, 0]
    after = [*rows, {"round": 4, "swarm/rejected": {}, "rewards/sums/mean": 1.0}, {"rewards/sums/mean": 0.5}]
    assert recent(METRICS["swarm/rejected"], after) == {}  # another process
    assert recent(METRICS["rewards/*/mean"], after) == {"sums": 0.75}
