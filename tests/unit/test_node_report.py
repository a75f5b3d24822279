"""The report and the table, for whole, young and damaged runs."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from node.cli.app import run
from node.config import NodeConfig
from node.fleet.child_process import Started
from node.fleet.live_table import clock, line, render, size, trend
from node.fleet.progress import NodeProgress
from node.fleet.report import NodeRecords, pick_samples, read_nodes, render_report, write_report
from node.fleet.supervisor import NodeProcess, NodeState
from node.metrics import Display, shown_in
from node.rollouts.group import Group, one_turn
from node.tasks import TaskKey
from node.telemetry.evaluations import EVALUATIONS_FILE, evaluation_curve
from node.telemetry.metrics_file import MetricsLog
from node.telemetry.plots import GRID, INK, MUTED, PARTS, WARNING, plot_reward, plot_signals
from node.telemetry.rollout_log import ROLLOUTS_FILE, own_rows
from tests.fakes.rows import make_row


def fill(out: Path, nodes: int, rounds: int) -> None:
    for node in range(nodes):
        folder = out / "nodes" / f"n{node}"
        folder.mkdir(parents=True)
        MetricsLog(folder / "metrics.jsonl").append(*(make_row(node, number) for number in range(1, rounds + 1)))


def fill_evaluations(out: Path, accuracy: float) -> None:
    """Both ends of a run's evaluations, at each of its nodes."""
    for folder in (out / "nodes").iterdir():
        rows = [
            {"round": done, "questions": 40, "accuracy": rate, "pass@8": rate}
            for done, rate in ((0, 0.1), (30, accuracy))
        ]
        MetricsLog(folder / EVALUATIONS_FILE).append(*rows)


def fill_rollouts(out: Path, *texts: str) -> None:
    """One own group a round, all of one task, of these completions in turn; only the last one is right."""
    for folder in (out / "nodes").iterdir():
        key = TaskKey("builtin/sums", 1, "c0ffee")
        for number, text in enumerate(texts, 1):
            made = (one_turn(text, True, float(number == len(texts))),)
            MetricsLog(folder / ROLLOUTS_FILE).append(*own_rows(number, [Group(key, 1, "3+4=", made, "llama", 5)]))


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
    assert page.count("<svg") == (5 if nodes > 1 else 4)  # a node alone rejects nothing
    for node in range(nodes):
        assert f"<td>n{node}</td><td>{rounds}</td>" in page
    assert len(page) < 500_000


def test_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    fill(tmp_path, 12, 2)
    page = write_report(tmp_path).read_text()
    assert page.index("<td>n2</td>") < page.index("<td>n10</td>")


def test_a_run_without_rejects_says_so() -> None:
    page = render_report("run", {"n0": NodeRecords([make_row(0, 1), make_row(0, 2)])}, {})
    assert "No node rejected anything" in page
    assert page.count("<svg") == 4


def test_rejects_are_named(tmp_path: Path) -> None:
    page = render_report("run", {"n1": NodeRecords([make_row(1, number) for number in range(1, 61)])}, {})
    assert "unknown_task" in page and "false_reward" in page and f"fill: {WARNING}" in page
    unfit = make_row(1, 60) | {"swarm/rejected": {"too_surprising": 9}}
    page = render_report("run", {"n1": NodeRecords([unfit])}, {})
    assert "too_surprising" in page and f"fill: {WARNING}" not in page  # nobody's fault


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
    settings = {"seed": 1, "swarm": "ab", "config": {"policy": {"model": "<script>alert(1)</script>"}}}
    row = make_row(0, 1) | {"rewards/<b>$x^2$</b>/mean": 0.5}
    page = render_report("<b>run</b>", {"n0": NodeRecords([row])}, settings)
    assert "<script" not in page and "<b>run" not in page and "<b>$x" not in page
    assert "policy.model" in page and "$x^2$" in page


def test_where_nodes_have_settings_of_their_own_those_are_shown_of_each_part() -> None:
    parts = {
        name: {"nodes": 2, "config": {"policy": {"model": model}, "rounds": 7}}
        for name, model in (("small", "builtin"), ("large", "wide"))
    }
    run = {"seed": 1, "swarm": "ab", "config": parts["small"]["config"], "parts": parts}
    page = render_report("run", {"n0": NodeRecords([make_row(0, 1)])}, run)
    found = dict(re.findall(r"<dt>([^<]*)</dt>\s*<dd>([^<]*)</dd>", page))
    assert found == {"rounds": "7", "small: policy.model": "&#34;builtin&#34;", "large: policy.model": "&#34;wide&#34;"}


def test_what_the_model_said_is_shown_early_and_late_marked_and_escaped(tmp_path: Path) -> None:
    fill(tmp_path, 1, 5)
    assert "early and late" not in write_report(tmp_path).read_text()
    fill_rollouts(tmp_path, "<img src=x onerror=alert(1)>", "second", "in between", "fourth", "the last")
    page = write_report(tmp_path).read_text()
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "second" in page and "in between" not in page
    assert page.index("<b>wrong</b> second") < page.index("<b>wrong</b> fourth") < page.index("<b>right</b> the last")


def test_samples_are_the_first_and_the_last_of_each_task(tmp_path: Path) -> None:
    fill(tmp_path, 2, 5)
    fill_rollouts(tmp_path, *"abcdefg")
    ((task, (early, late)),) = pick_samples(read_nodes(tmp_path)).items()
    assert task == "builtin/sums"
    assert [example.completions[0]["texts"] for example in early] == [["a"], ["a"]]
    assert {metric.node for metric in early} == {"n0", "n1"}
    assert [example.completions[0]["texts"] for example in late] == [["g"], ["g"]]
    assert all(example.completions[0]["right"] for example in late) and not any(
        example.completions[0]["right"] for example in early
    )


def test_evaluations_and_a_run_alone_are_drawn_and_compared(tmp_path: Path) -> None:
    fill(tmp_path, 2, 30)
    before = write_report(tmp_path).read_text()
    assert "Held-out questions" not in before and "one node alone" not in before
    fill_evaluations(tmp_path, 0.75)
    fill(tmp_path / "alone", 1, 60)
    fill_evaluations(tmp_path / "alone", 0.5)
    page = write_report(tmp_path).read_text()
    assert all(f">{metric.title}<" in page for metric in shown_in(Display.REPORT) if metric.name.startswith("eval/"))
    assert "0.10 &rarr; 0.75" in page and page.count("<svg") == before.count("<svg") + 2
    assert "0.750 <small>(0.598 to 0.858)</small>" in page and "0.500 <small>(0.352 to 0.648)</small>" in page
    elsewhere = tmp_path.parent / f"{tmp_path.name}-control"
    fill(elsewhere, 1, 60)
    fill_evaluations(elsewhere, 0.625)
    assert run(["report", str(tmp_path), str(elsewhere)], debug=False) == 0
    assert "0.625 <small>(" in (tmp_path / "report.html").read_text()


def test_a_factor_is_shown_where_it_is_no_chance() -> None:
    def page(first: float) -> str:
        rows = [make_row(0, number) | {"reward": first if number < 6 else 0.5} for number in range(1, 11)]
        return render_report("run", {"n0": NodeRecords(rows)}, {})

    assert "<b>5.0&thinsp;&times;</b><span>last over first</span>" in page(0.1)
    assert "last over first" not in page(0.01)


def test_a_curve_counts_all_tokens_generated_until_then() -> None:
    metrics = [{"round": number, "tokens_generated": 100} for number in range(1, 11)]
    evaluated = [{"round": done, "questions": 20, "accuracy": done / 10} for done in (0, 4, 10)]
    ahead, behind = (metrics, evaluated), (metrics[:5], evaluated[:2])
    curve = evaluation_curve([ahead, behind], "accuracy")
    assert [(point.round, point.tokens, point.rate) for point in curve] == [(0, 0, 0.0), (4, 800, 0.4), (10, 1500, 1.0)]
    assert all(point.low <= point.rate <= point.high for point in curve)
    assert [point.round for point in evaluation_curve([ahead, behind, behind], "accuracy")] == [0, 4]


def test_a_signal_that_only_some_rounds_have_is_drawn_and_one_that_none_has_is_not() -> None:
    rows = [make_row(0, number) | {"swarm/age_rounds": number / 10 if number % 3 else None} for number in range(1, 31)]
    page = render_report("run", {"n0": NodeRecords(rows)}, {})
    assert "age of external groups, rounds" in page and "entropy" not in page[: page.index("Own and external")]


def test_a_signal_that_a_node_has_never_measured_leaves_its_line_out() -> None:
    rows = [make_row(0, number) for number in range(1, 11)]
    page = render_report(
        "run", {"n0": NodeRecords([row | {"entropy": 1.0} for row in rows]), "n1": NodeRecords(rows)}, {}
    )
    assert "entropy, nats a token" in page


def test_a_signal_that_few_nodes_have_in_any_one_round_leaves_its_plot_out() -> None:
    rows = [make_row(0, number) for number in range(1, 6)]
    nodes = {
        f"n{at}": NodeRecords([row | {"entropy": 1.0 if row["round"] == at + 1 else None} for row in rows])
        for at in range(4)
    }
    page = render_report("run", nodes, {})  # of a run that was stopped at once
    assert "entropy" not in page[: page.index("Own and external")]
    assert render_report("run", {"n0": NodeRecords([{"round": 1, "reward": 0.0}])}, {})  # none has any


def test_the_report_draws_each_metric_that_is_declared_for_it() -> None:
    declared = shown_in(Display.REPORT)
    drawn = plot_signals({"n0": [{"round": 1, **{metric.name: 0.5 for metric in declared}}]})
    elsewhere = {"reward", "rewards/*/mean", "eval/accuracy", "eval/pass@8"}
    missing = {
        metric.name
        for metric in declared
        if f">{metric.caption}<" not in drawn and metric.name not in PARTS.get(metric.part, ())
    }
    assert missing == elsewhere


def test_colours_of_the_page_are_the_plots_too(tmp_path: Path) -> None:
    fill(tmp_path, 1, 5)
    page = write_report(tmp_path).read_text()
    assert "prefers-color-scheme: dark" in page
    plots = page[page.index("<svg") :]
    for color in (INK, MUTED, GRID):
        assert plots.count(color) == plots.count(f", {color})"), "a colour that does not follow the page"


def child(name: str, rounds: int, state: NodeState = NodeState.RUNNING) -> NodeProcess:
    made = NodeProcess.create(Path("run") / "nodes" / name, NodeConfig(rounds=300))
    made.progress.update(make_row(int(name[1:]), number) for number in range(1, rounds + 1))
    made.state = state
    return made


@pytest.mark.parametrize("width", [80, 140])
def test_table_fits_its_terminal(width: int) -> None:
    children = [child("n0", 250), child("n1", 300, NodeState.DONE), child("n2", 0, NodeState.WAITING)]
    children[0].restarts = 2
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(children, 75.0, console.width))
    text = console.export_text()
    assert max(len(row) for row in text.splitlines()) <= width
    for part in ("250/300", "running ↻2", "waiting", "1000", "3.5 MB"):
        assert part in text
    assert ("█" in text) == (width > 100)


def test_a_narrow_terminal_loses_columns_and_no_name_round_or_reward() -> None:
    children = [child("n0", 250), child("n11", 300, NodeState.DONE), child("n2", 0, NodeState.WAITING)]
    shown = []
    for width in (60, 40, 24, 10):
        console = Console(width=max(width, 23), record=True, file=io.StringIO())
        console.print(render(children, 75.0, width))
        text = console.export_text()
        head, *rows = text[text.index("node ") :].splitlines()
        assert max(map(len, (head, *rows))) <= max(width, 23)
        assert [row.split()[:3] for row in (head, *rows[:2])] == [
            ["node", "round", "reward"],
            ["n0", "250/300", f"{children[0].progress.reward():.3f}"],
            ["n11", "300/300", f"{children[1].progress.reward():.3f}"],
        ]
        shown.append(head.split()[3:])
    assert shown == [["own", "external", "peers", "rejects", "state"], ["rejects", "state"], [], []]


def test_line_tells_the_swarm() -> None:
    children = [child("n0", 10), child("n1", 20)]
    text = line(children, 3725.0)
    assert text.startswith("1:02:05  0 of 2 nodes up, round 10 to 20 of 300, reward ")
    assert "groups 120 own" in text
    assert "reward 0." in text and " (last 20 rounds), " in text
    assert text.endswith(", 6 not fit to teach, 0 rejected")


def test_the_line_says_what_a_node_does_that_has_no_round_yet(tmp_path: Path) -> None:
    one = child("n0", 0)
    one.folder, one.started = tmp_path, Started(None, None)  # type: ignore[arg-type]
    assert " 1 of 1 nodes up, n0: starting, round 0 to 0" in line([one], 1.0)
    (tmp_path / "log.jsonl").write_text('{"event": "listening"}\n{"model": "a-model", "event": "loading"}\n')
    assert ", n0: loading the model, round" in line([one], 1.0)


def test_what_honest_peers_may_send_and_does_not_help_here_is_not_told_as_rejected() -> None:
    one = child("n0", 10)
    one.progress.last["swarm/rejected"] = {"too_surprising": 100, "over_long": 7, "too_long": 2, "forged": 3}
    assert line([one], 1.0).endswith(", 109 not fit to teach, 3 rejected")
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render([one], 1.0, 200))
    assert console.export_text().splitlines()[-1].split()[-2:] == ["3", "running"]


def test_a_swarm_without_a_last_round_is_told_without_one() -> None:
    endless = child("n0", 10)
    endless.progress.rounds = None
    assert "of 1 nodes up, round 10 to 10, reward " in line([endless], 1.0)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render([endless], 1.0, 200))
    assert "10/" not in console.export_text()


def test_progress_follows_a_node_that_goes_back() -> None:
    progress = NodeProgress(300)
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
    assert trend(NodeProgress(3)) == ""
    flat = NodeProgress(3)
    flat.update([{"round": 1, "reward": 0.0}, {"round": 2, "reward": 0.0}])
    assert trend(flat) == "▁▁"
    below = NodeProgress(3)
    below.update([{"round": 1, "reward": -18.0}, {"round": 2, "reward": -9.0}, {"round": 3, "reward": 0.0}])
    assert trend(below) == "▁▅█"
    one = child("n0", 10)
    assert "out of range" not in line([one], 1.0)
    one.progress.update([{"round": 11, "reward": -18.0, "rewards_outside": 3}])
    assert line([one], 1.0).endswith("rejected, 3 rewards out of range")


def test_rewards_below_0_are_within_the_plot() -> None:
    rows = [{"round": number, "reward": number - 18.0} for number in range(1, 6)]
    assert "−16.0" in plot_reward({"n0": rows})
