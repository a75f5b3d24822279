"""The laboratory: what a file means, which runs are done again, and the arithmetic of the results."""

import dataclasses
import json
import math
import re
import statistics
import subprocess
from pathlib import Path

import pytest

from node.cli import lab as lab_command
from node.cli import main
from node.config import NAMED_PRESETS, flatten
from node.errors import UserError
from node.lab import runs
from node.lab.figures import tabulate
from node.lab.plan import (
    ArmConfig,
    AttackConfig,
    BaseConfig,
    ChurnConfig,
    Lab,
    LabConfig,
    PartConfig,
    arm_folder,
    read_lab,
)
from node.lab.plots import plot
from node.lab.results import RunResult, in_order, read_run, read_runs
from node.lab.runs import do_missing, done_runs, is_complete, progress, say_missing, time_table
from node.lab.statistics import Estimate, estimate
from node.lab.tables import compare, to_json, to_markdown
from node.lab.trials import DefenceConfig, TrialConfig, TrialsConfig, read_trials

ROOT = Path(__file__).resolve().parents[2]
FILE = """
seeds = [3, 5]
[settings]
rounds = 2
sampling.completions = 4
[bases.sparse]
[bases.dense.settings]
trainer.learning_rate = 1e-4
[arms.alone]
note = "the control"
settings.sampling = { local = 2, external = 0 }
[arms."1/1 slow"]
nodes = 2
settings = { rounds = 3, sampling = { local = 1, external = 1 } }
"""


def lab_of(tmp_path: Path, text: str = FILE, **named: object) -> Lab:
    (tmp_path / "lab.toml").write_text(text)
    return read_lab(tmp_path / "lab.toml", tmp_path / "out", **named)


def test_a_run_is_an_arm_over_a_base_over_the_file_under_a_seed(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    assert [(run.seed, run.base, run.arm) for run in lab.runs][:5] == [
        (3, "sparse", "alone"),
        (3, "sparse", "1/1 slow"),
        (3, "dense", "alone"),
        (3, "dense", "1/1 slow"),
        (5, "sparse", "alone"),
    ]
    slow = lab.runs[3]
    assert slow.settings["rounds"] == 3 and slow.settings["trainer"]["learning_rate"] == 1e-4
    assert slow.settings["sampling"] == {"completions": 4, "local": 1, "external": 1}
    assert (slow.nodes, lab.runs[2].nodes) == (2, 8)
    assert slow.folder == arm_folder(tmp_path / "out", "dense", "1/1 slow") / "seed3"
    assert lab.baseline == "alone"
    assert len({run.folder for run in lab.runs}) == len(lab.runs)


MIXED = """
runner = "memory"
seeds = 1
[settings]
budget.compute = 50
sampling.completions = 4
[arms.alone]
nodes = 1
[arms.mixed.settings]
sampling.local = 2
[arms.mixed.parts.small]
nodes = 2
note = "the same model"
[arms.mixed.parts.large]
nodes = 9
settings = { sampling.local = 1, budget.compute = 20 }
"""


def test_an_arm_in_parts_has_their_nodes_in_order_with_their_settings_over_its_own(tmp_path: Path) -> None:
    run = lab_of(tmp_path, MIXED).runs[1]
    assert (run.nodes, [(part.name, part.nodes) for part in run.parts]) == (11, [("small", 2), ("large", 9)])
    small, large = run.by_node[0], run.by_node[2]
    assert run.by_node == [small] * 2 + [large] * 9
    assert small["sampling"] == {"completions": 4, "local": 2} and small["budget"] == {"compute": 50}
    assert large["sampling"] == {"completions": 4, "local": 1} and large["budget"] == {"compute": 20}
    assert lab_of(tmp_path, MIXED).runs[0].by_node == [{"budget": {"compute": 50}, "sampling": {"completions": 4}}]


def test_parts_may_ask_the_same_tasks_each_in_its_own_way(tmp_path: Path) -> None:
    text = MIXED.replace("sampling.local = 1", "tasks = [{name='builtin', weight=2, examples=2, instruction='Think.'}]")
    assert lab_of(tmp_path, text).runs[1].by_node[2]["tasks"][0]["examples"] == 2


BUDGETS = """
seeds = 1
[settings]
rounds = 9
budget.compute = 50
[bases.short.settings]
budget.compute = 20
[bases.long]
[arms.swarm]
[arms.central]
nodes = 1
budget = 8
"""


def test_the_budget_of_an_arm_may_be_a_multiple_of_its_bases(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, BUDGETS)
    budgets = {(run.base, run.arm): run.settings["budget"]["compute"] for run in lab.runs}
    assert budgets == {
        ("short", "swarm"): 20,
        ("short", "central"): 160,
        ("long", "swarm"): 50,
        ("long", "central"): 400,
    }
    assert all(run.settings["rounds"] == 9 for run in lab.runs)
    both = lab_of(tmp_path, BUDGETS.replace("budget = 8", "budget = 0.5").replace("compute", "generated_tokens"))
    assert [run.settings["budget"] for run in both.runs[1::2]] == [{"generated_tokens": 10}, {"generated_tokens": 25}]


def test_a_multiple_holds_for_all_parts_of_an_arm(tmp_path: Path) -> None:
    run = lab_of(
        tmp_path,
        MIXED.replace("[arms.mixed.s", "[arms.mixed]\nbudget = 3\n[arms.mixed.s").replace(", budget.compute = 20", ""),
    ).runs[1]
    assert {node["budget"]["compute"] for node in run.by_node} == {150}


def test_a_parts_budget_is_a_multiple_of_its_arms_and_its_nodes_have_a_pace(tmp_path: Path) -> None:
    text = MIXED.replace(", budget.compute = 20", "").replace(
        "nodes = 9", "nodes = 9\nbudget = 0.5\npace = 4\nbegins = 0.3"
    )
    run = lab_of(tmp_path, text.replace("[arms.mixed.s", "[arms.mixed]\nbudget = 3\n[arms.mixed.s")).runs[1]
    assert [node["budget"]["compute"] for node in run.by_node] == [150] * 2 + [75] * 9
    assert run.tempo == {"pace": [1] * 2 + [4] * 9, "begins": [0] * 2 + [0.3] * 9}
    assert lab_of(tmp_path, MIXED).runs[1].tempo == {}


def test_a_setting_on_the_command_line_is_over_a_bases_and_the_later_of_two_holds(tmp_path: Path) -> None:
    def budgets(*settings: str) -> list[int]:
        return [run.settings["budget"]["compute"] for run in lab_of(tmp_path, BUDGETS, overrides=settings).runs]

    of_all, of_one = "settings.budget.compute=7", "bases.short.settings.budget.compute=3"
    assert budgets() == [20, 160, 50, 400]
    assert budgets(of_all) == budgets(of_one, of_all) == [7, 56, 7, 56]
    assert budgets(of_all, of_one) == [3, 24, 7, 56]


@pytest.mark.parametrize(
    ("text", "setting", "said"),
    [
        (FILE, "settings.sampling.local=4", "arms.alone.settings decides it there"),
        (MIXED, "settings.budget.compute=4", "arms.mixed.parts.large.settings decides it"),
        (
            BUDGETS.replace("budget = 8", "preset = 'paper'"),
            "settings.sampling={ max_surprise = 3 }",
            "--set settings.sampling.max_surprise: arms.central.preset decides it",
        ),
    ],
)
def test_a_setting_on_the_command_line_that_an_arm_would_not_notice_is_refused(
    tmp_path: Path, text: str, setting: str, said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        lab_of(tmp_path, text, overrides=[setting])


def test_a_setting_on_the_command_line_is_taken_where_no_arm_that_is_asked_for_decides_it(tmp_path: Path) -> None:
    (run,) = lab_of(tmp_path, MIXED, overrides=["settings.budget.compute=4"], arms=["alone"]).runs
    assert run.settings["budget"] == {"compute": 4}


def test_an_arm_with_a_preset_has_its_settings_over_those_of_file_and_base(tmp_path: Path) -> None:
    text = BUDGETS.replace("budget = 8", "preset = 'paper'").replace("rounds = 9", "rounds = 9\nsampling.local = 7")
    swarm, paper = lab_of(tmp_path, text).runs[:2]
    assert flatten(paper.settings).items() >= NAMED_PRESETS["paper"].items()
    assert swarm.settings["sampling"] == {"local": 7} and paper.settings["budget"] == {"compute": 20}


def test_an_arm_may_have_churn(tmp_path: Path) -> None:
    text = "seeds = 1\n[settings]\nrounds = 2\ntrainer.save_steps = 5\n[arms.a]\nchurn = { away = 0.25, rounds = 20 }\n"
    churn = lab_of(tmp_path, text).runs[0].churn
    assert churn is not None and (churn.away, churn.rounds, churn.present) == (0.25, 20, 60)
    assert lab_of(tmp_path, text.replace(", rounds = 20", "")).runs[0].churn == churn


def test_a_part_of_it_can_be_asked_for_and_any_key_changed(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, overrides=["seeds=1", "settings.rounds=7"], arms=["alone"], bases=["dense"])
    (run,) = lab.runs
    assert (run.seed, run.base, run.arm, run.settings["rounds"]) == (1, "dense", "alone", 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FILE + "sampling = 3", "arms.1/1 slow.sampling"),
        (FILE.replace("external = 0", "externl = 0"), "arm 'alone' on base 'sparse': unknown configuration key"),
        ("baseline = 'x'" + FILE, "no arm 'x'"),
        (FILE.replace("rounds = 2", "threads = 1"), "has no end"),
        (FILE.replace("[3, 5]", "[3, 3]"), "seeds wants"),
        (
            FILE.replace("nodes = 2", "delay = 2"),
            "delay, attack, control, moments, pace and begins are of the runner 'memory'",
        ),
        (
            MIXED.replace('"memory"', '"processes"').replace("nodes = 9", "nodes = 9\npace = 2"),
            "pace and begins are of",
        ),
        (
            FILE.replace("nodes = 2", "moments = 'reset'"),
            "delay, attack, control, moments, pace and begins are of the runner 'memory'",
        ),
        ("runner = 'memory'" + FILE.replace("nodes = 2", "moments = 'reset'"), "weights are not averaged"),
        (MIXED.replace("nodes = 2", "nodes = 2\nbegins = 0.5"), "let the first part be there from the beginning"),
        (
            MIXED.replace("nodes = 2", "nodes = 2\nleaves = true").replace("nodes = 9", "nodes = 9\nbegins = 0.1"),
            "no part is",
        ),
        (MIXED.replace("nodes = 9", "nodes = 9\nbudget = 2"), "part 'large' sets budget.compute beside budget = 2"),
        (
            FILE.replace("nodes = 2", "control = 'wrong'"),
            "delay, attack, control, moments, pace and begins are of the runner 'memory'",
        ),
        (FILE.replace("nodes = 2", "control = 'wrng'"), "there is no control 'wrng': choose one of wrong"),
        (
            "runner = 'memory'"
            + FILE.replace("nodes = 2", "control = 'wrong'").replace("external = 1", "external = 1, rule = 'sapo'"),
            "control = 'wrong' is in place of the default rule: leave sampling.rule out",
        ),
        (FILE.replace("[arms.alone]", "[arms.alone"), "cannot read"),
        (MIXED.replace("nodes = 9", ""), "arms.mixed.parts.large.nodes: Field required"),
        (FILE.replace("nodes = 2", "chrn = 2"), "arms.1/1 slow.chrn: there is no such key here: did you mean 'churn'?"),
        ("rounds = 3", "arms: it has none, so it is no experiment"),
        (MIXED.replace("nodes = 9", "nodes = 0"), "arms.mixed.parts.large.nodes: Input should be greater"),
        (
            MIXED.replace("nodes = 9", "nodes = 9\ndelay = 1"),
            "large.delay: there is no such key here: see docs",
        ),
        (MIXED.replace("local = 1", "locl = 1"), "arm 'mixed', part 'large': unknown configuration key"),
        (MIXED.replace("[arms.mixed.s", "[arms.mixed]\nnodes = 11\n[arms.mixed.s"), "leave nodes out"),
        (
            MIXED.replace("[arms.mixed.s", "[arms.mixed]\nattack = {kind='planted', nodes=1}\n[arms.mixed.s"),
            "of an arm that has no parts",
        ),
        (MIXED.replace("parts.small", 'parts."-n"'), "part '-n' wants a name that begins"),
        (MIXED.replace("parts.small", 'parts.""'), "part '' wants a name that begins"),
        (MIXED.replace("compute = 50", "generated_tokens = -1"), "budget.generated_tokens"),
        (BUDGETS.replace("budget = 8", "budget = 0"), "arms.central.budget: Input should be greater than 0"),
        (BUDGETS.replace("budget.compute", "threads"), "arm 'central': its budget is 8 times that of file or base"),
        (BUDGETS + "settings.budget.compute = 3", "arms.central: it sets budget.compute beside budget = 8"),
        (BUDGETS.replace("budget = 8", "preset = 'papr'"), "arms.central.preset: there is no preset 'papr': choose"),
        (
            BUDGETS.replace("budget = 8", "preset = 'paper'\nsettings.sampling.local = 4"),
            "arms.central: it sets sampling.local, which preset 'paper' decides",
        ),
        (MIXED.replace("[settings]\nbudget.compute = 50", "[settings]"), "arm 'alone' has no end"),
        (
            MIXED.replace("sampling.local = 1", "sampling.completions = 8"),
            "all parts have the same sampling.completions",
        ),
        (MIXED.replace("sampling.local = 1", "tasks = [{name='builtin/sums'}]"), "all parts have the same tasks"),
        (
            MIXED.replace("sampling.local = 1", "tasks = [{name='builtin', answer='whole'}]"),
            "all parts have the same tasks",
        ),
        (FILE.replace("nodes = 2", "churn = { away = 1 }"), "arms.1/1 slow.churn.away: Input should be less than 1"),
        (FILE.replace("nodes = 2", "churn = { away = 0.9, rounds = 5 }"), "less than a round: set rounds to 9"),
        (
            FILE.replace("nodes = 2", "churn = { away = 0.5, rounds = 9 }"),
            "killed after 9 rounds in the mean, and has a",
        ),
    ],
)
def test_a_file_of_no_use_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", "\\(")) as error:
        lab_of(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [path.name for path in (ROOT / "examples").glob("*.toml") if "[arms." in path.read_text()]
)
def test_the_examples_are_experiments(tmp_path: Path, name: str) -> None:
    assert len(read_lab(ROOT / "examples" / name, tmp_path).runs) > 1


def leave(folder: Path, rewards: list[list[float]], trained: int = 0) -> None:
    """Write what a swarm leaves, each node with these rewards; a round generates 10 tokens and trains on `trained`."""
    nodes = {}
    for name, values in enumerate(rewards):
        state = folder / "nodes" / f"n{name}"
        state.mkdir(parents=True)
        rows = [
            {"round": at, "reward": value, "tokens_generated": 10, "tokens_trained": trained, "groups_external": 4}
            for at, value in enumerate(values, 1)
        ]
        (state / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluated = {"round": len(values), "accuracy": 0.5 + name, "pass@1": 0.25, "pass@8": 0.3, "pass@16": 0.5}
        (state / "evaluations.jsonl").write_text(json.dumps({"round": 0, "accuracy": 0.0}) + "\n")
        with (state / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(evaluated | {"entropy": 1.5}) + "\n")
        nodes[f"n{name}"] = {"rounds": len(values), "tokens_generated": 10 * len(values), "tokens_trained": 0}
    run = {"nodes": len(rewards), "seed": 1}
    (folder / "summary.json").write_text(json.dumps({"run": run, "nodes": nodes}))


def test_the_accuracy_of_a_run_is_of_the_nodes_that_stay_and_its_compute_is_of_all(tmp_path: Path) -> None:
    run = lab_of(tmp_path, MIXED.replace("nodes = 2", "nodes = 2\nleaves = true")).runs[1]
    leave(run.folder, [[0.0] * 9] * 2 + [[0.0] * 2] * 9)
    whole, gone, large = read_runs([run])
    assert whole.accuracy == large.accuracy == 0.5 + 6 and gone.accuracy == 1.0
    assert (whole.nodes, whole.compute) == (11, pytest.approx((2 * 90 + 9 * 20) / 11))


def test_a_tasks_file_is_where_the_experiments_file_says_and_is_looked_at_before_the_first_run(tmp_path: Path) -> None:
    told = '[settings]\nrounds = 1\n[[settings.tasks]]\nname = "dataset"\noptions = { path = "rows.jsonl" }\n[arms.a]\n'
    with pytest.raises(UserError, match=r"task 'dataset': cannot read .*rows\.jsonl"):
        lab_of(tmp_path, told)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    run = lab_of(tmp_path, told).runs[0]
    assert run.settings["tasks"][0]["options"]["path"] == str(tmp_path / "rows.jsonl")


def test_a_run_is_complete_when_every_node_is_at_its_end_and_its_settings_are_these(tmp_path: Path) -> None:
    run = lab_of(tmp_path, FILE.replace("nodes = 2", "nodes = 1")).runs[1]
    assert not is_complete(run)
    leave(run.folder, [[0.0, 1.0, 1.0]])
    run.folder.with_suffix(".json").write_text(json.dumps(dict(run.settings)))
    assert is_complete(run)
    longer = run._replace(settings={**run.settings, "rounds": 4})
    with pytest.raises(UserError, match=r"other settings \(rounds\)"):
        is_complete(longer)
    with pytest.raises(UserError, match=r"other settings \(delay\)"):
        is_complete(run._replace(delay=3))
    run.folder.with_suffix(".json").write_text(json.dumps(dict(longer.settings)))
    assert not is_complete(longer)  # it was cut off


def test_a_run_in_parts_is_complete_by_the_ends_of_each_and_goes_by_the_settings_of_each(tmp_path: Path) -> None:
    run = lab_of(tmp_path, MIXED).runs[1]
    leave(run.folder, [[0.0] * 5] * 2 + [[0.0] * 2] * 9)  # 10 tokens a round: 50, and 20
    summary = json.loads((run.folder / "summary.json").read_text())
    summary["run"] |= {"parts": {"small": {"nodes": 2}, "large": {"nodes": 9}}}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    for name, settings in (("", run.settings), (".0", run.by_node[0]), (".1", run.by_node[10])):
        run.folder.with_suffix(f"{name}.json").write_text(json.dumps(settings))
    assert is_complete(run)
    large = {**run.parts[1].settings, "rounds": 7}
    with pytest.raises(UserError, match=r"other settings \(large.rounds\)"):
        is_complete(run._replace(parts=(run.parts[0], run.parts[1]._replace(settings=large))))
    moved = (run.parts[0]._replace(nodes=3), run.parts[1]._replace(nodes=8))
    with pytest.raises(UserError, match=r"other settings \(parts\)"):
        is_complete(run._replace(parts=moved))
    leave_alone = lab_of(tmp_path, MIXED + "[arms.mixed.churn]\naway = 0.5\n").runs[1]
    with pytest.raises(UserError, match=r"other settings \(churn\)"):
        is_complete(leave_alone)
    summary["nodes"]["n10"] |= {"rounds": 1, "tokens_generated": 10}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert not is_complete(run)


def test_parts_have_figures_of_their_own_nodes(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, MIXED)
    leave(lab.runs[0].folder, [[0.25, 0.5]])  # accuracy 0.5 + the number of the node
    leave(lab.runs[1].folder, [[1.0] * 3, [0.5] * 3] + [[0.0] * 2] * 9)
    found = in_order(read_runs(lab.runs), lab)
    assert [(one.name, one.rounds, one.reward, one.accuracy) for one in found] == [
        ("alone", 2, 0.5, 0.5),
        ("mixed", 2, pytest.approx(1.5 / 11), 5.5),
        ("mixed: small", 3, 0.75, 1.0),
        ("mixed: large", 2, 0.0, 6.5),
    ]
    lines = tabulate(found, lab.baseline)
    assert [line.figures["gain"].mean if "gain" in line.figures else None for line in lines] == [None, 5.0, 0.5, 6.0]
    table = to_markdown(lines, lab).splitlines()
    assert "accuracy gained" in table[0]
    assert [row.split(" | ")[1] for row in table[3:]] == ["", "the same model", ""]
    (tmp_path / "a.json").write_text(to_json(found, lines, lab))
    assert [arm.get("part") for arm in json.loads((tmp_path / "a.json").read_text())["arms"]][1:] == [
        None,
        "small",
        "large",
    ]


def test_a_run_folder_is_averaged_over_its_nodes(tmp_path: Path) -> None:
    leave(tmp_path / "run", [[0.0, 1.0], [0.5, 0.5]], trained=5)
    found = read_run(tmp_path / "run", "b", "4/4", 1)
    assert (found.reward, found.external, found.compute) == (0.75, 4.0, 50)
    assert (found.accuracy, found.passes) == (1.0, {"pass@1": 0.25, "pass@16": 0.5})


def result(arm: str, seed: int, rewards: list[float], cost: float = 1.0) -> RunResult:
    return RunResult("", arm, seed, len(rewards), rewards[-1], cost * len(rewards), 1, 2048, None, {})


def test_the_first_line_of_a_base_is_the_policy_that_all_began_with_if_it_is_one(tmp_path: Path) -> None:
    at_first = {"pass@1": 0.1, "pass@8": 0.3}
    runs = [
        dataclasses.replace(
            result(arm, 1, [0.5]), accuracy=last, curve=((0.0, 0.2), (9.0, last)), held_out=(at_first, {})
        )
        for arm, last in (("alone", 0.4), ("1/1 slow", 0.6))
    ]
    lines = tabulate(runs, "alone")
    assert [(line.arm, line.seeds) for line in lines] == [("untrained", 0), ("alone", 1), ("1/1 slow", 1)]
    table = to_markdown(lines, lab_of(tmp_path)).splitlines()
    assert table[0] == "| arm |  | seeds | accuracy | accuracy gained | pass@1 | pass@8 | MiB sent |"
    assert table[2] == "| untrained |  |  | 0.2 |  | 0.1 | 0.3 |  |"
    other = dataclasses.replace(runs[1], curve=((0.0, 0.3), (9.0, 0.6)))  # a mixture of policies
    assert [line.arm for line in tabulate([runs[0], other], "alone")] == ["alone", "1/1 slow"]


def test_students_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(estimate([5.0]).half)


@pytest.mark.parametrize(("values", "quantile"), [(2, 12.706), (10, 2.262), (11, 2.228), (16, 2.131), (61, 2.000)])
def test_an_interval_is_students_for_any_number_of_seeds(values: int, quantile: float) -> None:
    made = [float(number) for number in range(values)]
    assert estimate(made).half == pytest.approx(quantile * statistics.stdev(made) / math.sqrt(values), rel=3e-4)


def test_an_estimate_is_written_to_two_digits_of_its_interval() -> None:
    assert str(Estimate(0.48213, 0.03219)) == "0.482 ± 0.032"
    assert str(Estimate(0.90861, 0.00823)) == "0.909 ± 0.008"
    assert str(Estimate(88213.4, 2134.0)) == "88,200 ± 2,100"
    assert [str(Estimate(mean, math.nan)) for mean in (0.123456, 88213.4)] == ["0.123", "88,213"]
    assert str(Estimate(1.0, 0.0)) == "1 ± 0"


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    runs = [
        dataclasses.replace(result(arm, seed, [reward]), accuracy=accuracy)
        for arm, seed, reward, accuracy in (("a", 1, 10, 0.1), ("a", 2, 20, 0.4), ("b", 1, 20, 0.3), ("b", 3, 60, 0.9))
    ]
    alone, shared = tabulate(runs, "a")
    assert "gain" not in alone.figures and shared.figures["gain"].mean == pytest.approx(0.2)  # of seed 1 alone
    assert shared.seeds == 2
    lab = lab_of(tmp_path, '[settings]\nrounds = 1\n[arms.a]\n[arms.b]\nnote = "best"\n')
    table = to_markdown([alone, shared], lab)
    assert "| b | best | 2 | 0.6 ± " in table and "reward" not in table
    tree = json.loads(to_json(runs, [alone, shared], lab))
    assert tree["arms"][1]["figures"]["reward"]["mean"] == 40 and tree["runs"][3]["reward"] == 60
    untold = tabulate([dataclasses.replace(run, accuracy=None) for run in runs], "a")
    assert "| b | best | 2 | 40 ± " in to_markdown(untold, lab), "of runs that were not evaluated"


def test_an_arm_that_ran_on_all_bases_has_a_line_of_the_means_over_them_seed_by_seed(tmp_path: Path) -> None:
    def run(base: str, arm: str, seed: int, accuracy: float) -> RunResult:
        passes = {"pass@1": accuracy, "pass@8": accuracy + 0.1}
        return dataclasses.replace(result(arm, seed, [0.5]), base=base, accuracy=accuracy, passes=passes)

    runs = [run(base, "a", seed, accuracy) for base, seed, accuracy in (("x", 1, 0.1), ("x", 2, 0.2), ("y", 1, 0.5))]
    runs += [run("x", "b", 1, 0.2), run("y", "b", 1, 0.7), run("x", "c", 1, 0.9)]
    lines = tabulate(runs, "a")
    assert [(line.base, line.arm, line.seeds) for line in lines[-2:]] == [("all", "a", 1), ("all", "b", 1)]
    b = lines[-1].figures
    assert (b["accuracy"].mean, b["gain"].mean, b["pass_gain@8"].mean) == pytest.approx((0.45, 0.15, 0.15))
    assert [line.base for line in tabulate([one for one in runs if one.base == "x"], "a")] == ["x", "x", "x"]
    table = to_markdown(lines, lab_of(tmp_path, "[settings]\nrounds = 1\n[arms.a]\n[arms.b]\n[arms.c]\n"))
    assert "| pass@8 | pass@8 gained |" in table and "| all | b |  | 1 | 0.45 | 0.15 |" in table


def test_two_arms_are_compared_over_their_common_seeds_and_two_runs_as_they_are(tmp_path: Path) -> None:
    for arm, seed, rewards in (("a", 1, [0.25]), ("a", 2, [0.5]), ("b", 2, [1.0]), ("b", 3, [0.0])):
        leave(tmp_path / arm / f"seed{seed}", [rewards])
    lines = compare(tmp_path / "a", tmp_path / "b")
    assert lines[0] == "1 pair of runs"
    (reward,) = (line.split()[1:] for line in lines if line.startswith("reward"))
    assert reward == ["0.5", "1", "0.5"]
    assert lines[1].split() == ["a", "b", "difference"], "a column has as much of a path as tells it apart"
    lines = compare(tmp_path / "a" / "seed1", tmp_path / "b" / "seed3")
    (reward,) = (line.split()[1:] for line in lines if line.startswith("reward"))
    assert reward == ["0.25", "0", "-0.25"]
    (tmp_path / "a" / "seed2" / "summary.json").unlink()  # it is under way
    with pytest.raises(UserError, match="no seed in common"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="no seed in common"):
        compare(tmp_path / "a", leave_arm(tmp_path / "c"))
    with pytest.raises(UserError, match="no run"):
        compare(tmp_path / "a", tmp_path)


def leave_arm(folder: Path) -> Path:
    leave(folder / "seed9", [[0.0]])
    leave(folder / "seed8", [[0.0]])
    return folder


def test_the_plots_are_drawn_and_name_every_arm(tmp_path: Path) -> None:
    runs = [result("8/0", 1, [1, 2]), result("4/4", 1, [1, 3], cost=3.0), result("4/4", 2, [1, 2, 3])]
    assert plot([dataclasses.replace(run, accuracy=0.5) for run in runs], tmp_path, "a") == ["a.svg"]
    drawn = (tmp_path / "a.svg").read_text()
    assert "8/0" in drawn and "4/4" in drawn and "held-out" in drawn
    assert plot(runs, tmp_path, "b") == [], "runs that were not evaluated"


def test_a_page_keeps_what_it_says_around_its_table(tmp_path: Path) -> None:
    lab_command.write_results(tmp_path, "a", "| a |\n", "{}")
    assert (tmp_path / "a.md").read_text() == "| a |\n"
    (tmp_path / "a.md").write_text("# Why?\n\n| a |\n| b |\n\nSo.\n\n| c |\n")
    lab_command.write_results(tmp_path, "a", "| d |\n", "{}")
    assert (tmp_path / "a.md").read_text() == "# Why?\n\n| d |\n\nSo.\n\n| c |\n"


def test_the_pages_experiment_is_one_and_its_words_are_all_that_there_are(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    experiment, attacks = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "a.toml").write_text(experiment)
    lab = read_lab(tmp_path / "a.toml", tmp_path / "out")
    assert {run.arm for run in lab.runs} == set(lab.config.arms) and len(lab.runs) == 5 * len(lab.config.arms)
    (tmp_path / "b.toml").write_text(attacks)
    assert {run.attack.kind for run in read_trials(tmp_path / "b.toml", tmp_path / "out").lab.runs if run.attack}
    words = set(re.findall(r"\w+", experiment + attacks))
    kinds = (LabConfig, BaseConfig, ArmConfig, PartConfig, ChurnConfig, AttackConfig)
    kinds += (TrialsConfig, DefenceConfig, TrialConfig)
    assert {key for kind in kinds for key in kind.model_fields} - words == set()


def test_a_run_that_is_under_way_says_how_far_it_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_of(tmp_path, bases=["sparse"], arms=["alone"], overrides=["seeds=1"])
    (run,) = lab.runs
    assert progress(run) == "round 0 of 2"

    class TakesThreeLooks:
        returncode = 0

        def __init__(self, *_: object, **__: object) -> None:
            self.looks = 0

        def poll(self) -> int | None:
            self.looks += 1
            for node, rounds in (("n0", self.looks), ("n1", self.looks - 1)):
                file = run.folder / "nodes" / node / "metrics.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("{}\n" * rounds)
            return 0 if self.looks == 3 else None

    said: list[str] = []
    monkeypatch.setattr(subprocess, "Popen", TakesThreeLooks)
    monkeypatch.setattr(runs, "POLL", 0.0)
    monkeypatch.setattr(runs, "PROGRESS", 0.0)
    do_missing(lab, 1, said.append)
    assert [line.rpartition(", ")[0] for line in said[1:]] == [
        "sparse, alone, seed 1: round 0 of 2",
        "sparse, alone, seed 1: round 1 of 2",
        "sparse, alone, seed 1: done; 0 to go",
    ]


def test_a_run_that_does_not_end_when_it_is_asked_to_is_killed(tmp_path, monkeypatch):
    done = []

    class Stubborn:
        returncode = None

        def __init__(self, *_, **__):
            self.stdin = None

        def poll(self):
            return None

        def terminate(self):
            done.append("asked")

        def wait(self, seconds):
            if "killed" not in done:
                raise subprocess.TimeoutExpired("run", seconds)

        def kill(self):
            done.append("killed")

    said = []

    def interrupted(line):
        said.append(line)
        if "round 0" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Stubborn)
    monkeypatch.setattr(runs, "POLL", 0.0)
    monkeypatch.setattr(runs, "PROGRESS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        do_missing(lab_of(tmp_path, bases=["sparse"], arms=["alone"], overrides=["seeds=1"]), 1, interrupted)
    assert done == ["asked", "killed"]
    assert said[-1] == "stopped with 0 of 1 runs done: the same command does the others"


def test_what_is_done_can_be_summarised_and_what_is_missing_has_the_time_that_others_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = lab_of(tmp_path, FILE.replace("nodes = 2", "nodes = 1"), bases=["sparse"])
    run = lab.runs[1]
    leave(run.folder, [[0.0, 1.0, 1.0]])
    summary = json.loads((run.folder / "summary.json").read_text())
    (run.folder / "summary.json").write_text(json.dumps(summary | {"run": summary["run"] | {"cpu_seconds": 7200}}))
    run.folder.with_suffix(".json").write_text(json.dumps(dict(run.settings)))
    assert done_runs(lab) == [run]
    asked = [str(tmp_path / "lab.toml"), "--out", str(tmp_path / "out"), "--base", "sparse"]
    with pytest.raises(SystemExit) as left:
        main(["lab", "run", *asked, "--dry-run"])
    *shown, last = capsys.readouterr().out.splitlines()
    assert left.value.code == 0
    assert [line.split() for line in shown[1:]] == [
        ["sparse", "alone", "2", "0", "not", "known"],
        ["sparse", "1/1", "slow", "2", "1", "120.0", "120"],
    ]
    assert last == "3 runs are missing: about 2.0 hours of one processor, without 2 whose time is not known"
    with pytest.raises(SystemExit) as left:
        main(["lab", "run", *asked, "--done"])
    assert left.value.code == 0 and "| sparse | 1/1 slow |  | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["lab", "run", *asked, "--arm", "alone", "--done"])
    assert "no run is done yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "unknown", "hours", "line"),
    [
        (0, 0, 0.0, "no run is missing"),
        (1, 1, 0.0, "1 run is missing: how long that takes is not known"),
        (4, 4, 0.0, "4 runs are missing: how long that takes is not known"),
        (4, 0, 2.04, "4 runs are missing: about 2.0 hours of one processor"),
        (4, 1, 2.04, "4 runs are missing: about 2.0 hours of one processor, without 1 whose time is not known"),
    ],
)
def test_what_is_missing_is_a_plain_line(runs: int, unknown: int, hours: float, line: str) -> None:
    assert say_missing(runs, unknown, hours) == line


def test_an_arm_whose_runs_are_done_misses_nothing_though_they_do_not_say_what_they_took(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, bases=["sparse"], arms=["alone"], overrides=["seeds=1"])
    (run,) = lab.runs
    leave(run.folder, [[0.0, 1.0]] * run.nodes)
    run.folder.with_suffix(".json").write_text(json.dumps(dict(run.settings)))
    assert [line.split() for line in time_table(lab).splitlines()[1:]] == [
        ["sparse", "alone", "1", "1", "0"],
        ["no", "run", "is", "missing"],
    ]
