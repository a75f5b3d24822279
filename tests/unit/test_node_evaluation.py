"""Evaluation: held-out questions, honest intervals, and the estimate of pass@k."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from transformers.modeling_outputs import BaseModelOutput

from node.cli.evaluate import shown
from node.config import EvalConfig, TaskConfig
from node.engines import Generated, RolloutEngine, SamplingParams
from node.engines.episodes import Played
from node.errors import DivergedError, UserError
from node.policy.load import Policy
from node.run import run_node
from node.tasks import Item, Task, TaskKey, load_tasks
from node.tasks.questions import DEFAULT_SPLIT, Split
from node.tasks.task_set import EVALUATION_SEED, TaskSet
from node.telemetry.evaluations import first_and_last, wilson_interval
from node.telemetry.metrics_file import MetricsLog, Row, read_metrics
from node.telemetry.rollout_log import quoted
from node.training.budget import RunProgress
from node.training.evaluation import (
    ROWS,
    Answers,
    EvalReport,
    Evaluations,
    ScoredQuestion,
    answer,
    doubts,
    evaluation_row,
    held_out,
    is_due,
    mean_entropy,
    pass_at_k,
    right_entropy,
    score,
)
from tests.policies import write_diverged_policy
from tests.swarms import small_config

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=8)
SUMS = [TaskConfig(name="builtin/sums"), TaskConfig(name="builtin/logic", weight=9)]


def evaluate(policy: Policy, engine: RolloutEngine, tasks: TaskSet, *, seed: int, **settings: Any) -> EvalReport:
    return score(seed, answer(policy, engine, tasks, seed=seed, **settings))


class _Layers(torch.nn.Module):
    """Knows which token is next."""

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(torch.nn.functional.one_hot((input_ids + 1) % 4, 4))


class _Model(torch.nn.Module):
    """Says token t + 1 after token t with probability 3/4, and each of three others with 1/12."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=4))

    def __init__(self) -> None:
        super().__init__()
        self.base_model = _Layers()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        said = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=torch.where(said == 1, 9.0, 1.0).log())


def _policy() -> Policy:
    """A policy only as far as evaluation needs one: questions become their code points."""
    return cast(
        Policy,
        SimpleNamespace(
            encode_prompt=lambda item: [ord(character) for character in item.question],
            observations=lambda chats: list,
            model=_Model(),
            pad_token_id=0,
            autocast=nullcontext,
        ),
    )


@dataclass
class _Oracle:
    """An engine that answers the first `solved` of each question's completions right, and only in `known` questions."""

    answers: dict[str, str]
    solved: int
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        self.calls.append((len(prompts), n, seed))
        self.temperatures.append(sampling.temperature)
        texts = [self.answers.get("".join(map(chr, prompt)), "?") for prompt in prompts]
        return [[self._answer(text if i < self.solved else "?", i) for i in range(n)] for text in texts]

    def _answer(self, text: str, index: int) -> Generated:
        return Generated(tuple(range(index + 1)), text, finished=index == 0)

    def load(self, version: int) -> None:
        self.loaded.append(version)

    def close(self) -> None:
        raise AssertionError("the engine is the caller's")


@pytest.fixture
def tasks() -> TaskSet:
    return load_tasks(SUMS)


def _answers(tasks: TaskSet, seed: int, count: int) -> dict[str, str]:
    items: list[Item] = [item for task in tasks.tasks for item in held_out(tasks, task, seed, count)]
    return {item.question: item.answer for item in items}


def test_a_report_counts_what_was_answered(tasks: TaskSet) -> None:
    sums, _ = tasks.tasks
    known = {item.question: item.answer for item in held_out(tasks, sums, 5, 100)}
    engine = _Oracle(known, solved=1)
    report = evaluate(_policy(), engine, tasks, count=100, seed=5, sampling=SAMPLING, completions=4)
    first, second = report.tasks
    assert (first.task, second.task, report.overall.task) == ("builtin/sums", "builtin/logic", "all")
    assert (first.questions, first.completions, report.overall.questions) == (100, 4, 200)
    assert (first.accuracy, second.accuracy, report.overall.accuracy) == (0.25, 0.0, 0.125)
    assert first.pass_at == pytest.approx({1: 0.25, 2: 0.5, 4: 1.0})
    assert (first.finished, first.mean_length, first.reward) == (0.25, 2.5, 0.25)
    assert first.low < 0.25 < first.high and (first.low, first.high) == wilson_interval(25, 100)
    assert json.loads(json.dumps(report.as_dict()))["tasks"][0]["pass_at"]["4"] == 1.0


def _questions(tasks: TaskSet, seed: int, count: int) -> set[str]:
    """The first task's held-out questions."""
    return {item.question for item in held_out(tasks, tasks.tasks[0], seed, count)}


def test_questions_go_to_the_engine_in_batches_and_each_with_its_own_seed(tasks: TaskSet) -> None:
    engine = _Oracle({}, solved=0)
    evaluate(_policy(), engine, tasks, count=ROWS // 2 + 6, seed=0, sampling=SAMPLING, completions=2)
    assert [(prompts, n) for prompts, n, _ in engine.calls] == [(ROWS // 2, 2), (6, 2)] * 2
    assert len({seed for _, _, seed in engine.calls}) == 4


def test_an_evaluation_that_takes_long_says_how_far_it_is(tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.training.evaluation.SAID_EVERY", -1.0)
    with capture_logs() as said:
        evaluate(_policy(), _Oracle({}, solved=0), tasks, count=ROWS + 1, seed=0, sampling=SAMPLING)
    told = [(row["task"], row["asked"], row["questions"]) for row in said if row["event"] == "evaluating"]
    assert told == [(name, at, ROWS + 1) for name in ("builtin/sums", "builtin/logic") for at in (0, ROWS)]


def test_the_same_seed_asks_the_same_and_another_seed_others(tasks: TaskSet) -> None:
    engines = [_Oracle(_answers(tasks, 3, 20), solved=1) for _ in range(3)]
    reports = [
        evaluate(_policy(), engine, tasks, count=20, seed=seed, sampling=SAMPLING)
        for engine, seed in zip(engines, (3, 3, 4), strict=True)
    ]
    assert reports[0] == reports[1] and engines[0].calls == engines[1].calls
    assert reports[0].overall.accuracy == 1.0 and reports[2].overall.accuracy < 1.0


def test_training_never_asks_what_an_evaluation_asks() -> None:
    """The family is so small that a node asks each of its questions many times."""
    tasks = load_tasks([TaskConfig(name="builtin/arithmetic", options={"operations": "+-"})])
    trained = {question.item.question for seed in range(4) for question in tasks.questions(seed, 200)}
    asked = {question for seed in range(4) for question in _questions(tasks, seed, 10)}
    assert len(trained) > 140 and len(asked) > 12 and not trained & asked


def test_no_question_is_asked_twice_and_a_task_with_fewer_is_asked_those() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/arithmetic", options={"operations": "+"}), SUMS[0]])
    engine = _Oracle({}, solved=0)
    report = evaluate(_policy(), engine, tasks, count=40, seed=0, sampling=SAMPLING)
    few = {f"What is {left} + {right}?" for left in range(10) for right in range(10)}
    held = {question for question in few if tasks.is_held_out(tasks.tasks[0], question)}
    assert 2 < len(held) < 25 and _questions(tasks, 0, 40) == held
    assert [task.questions for task in report.tasks] == [len(held), 40] and report.overall.questions == len(held) + 40


@pytest.mark.parametrize(("count", "completions"), [(0, 1), (1, 0), (-1, 1)])
def test_nothing_to_ask_is_refused(tasks: TaskSet, count: int, completions: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(_policy(), _Oracle({}, 0), tasks, count=count, seed=0, sampling=SAMPLING, completions=completions)


def test_questions_that_are_too_long_are_passed_over_and_others_asked_instead(tasks: TaskSet) -> None:
    lengths = sorted(len(question) for question in _questions(tasks, 0, 40))
    longest = lengths[len(lengths) // 2]
    engine = _Oracle(_answers(tasks, 0, 200), solved=1)
    first = TaskSet([(tasks.tasks[0], 1.0)])
    report = evaluate(_policy(), engine, first, count=40, seed=0, sampling=SAMPLING, longest=longest)
    assert (report.overall.questions, report.overall.accuracy) == (40, 1.0)
    with pytest.raises(UserError, match=r"no question of builtin/sums can be asked .* are too long"):
        evaluate(_policy(), engine, first, count=40, seed=0, sampling=SAMPLING, longest=1)


@dataclass(frozen=True)
class _Moody:
    """Sums; an answer in `silent` is unscorable."""

    base: Task
    silent: frozenset[str]

    @property
    def key(self) -> TaskKey:
        return self.base.key

    def make(self, seed: int) -> Item:
        return self.base.make(seed)

    def verify(self, item: Item, text: str) -> float | None:
        return None if text in self.silent else self.base.verify(item, text)


def _moody(*silent: str) -> TaskSet:
    sums, logic = load_tasks(SUMS).tasks
    return TaskSet([(_Moody(sums, frozenset(silent)), 1.0), (logic, 1.0)])


def test_an_answer_that_cannot_be_scored_counts_as_wrong_and_is_counted(tasks: TaskSet) -> None:
    known = _answers(tasks, 5, 30)
    silent = next(answer for question, answer in known.items() if question in _questions(tasks, 5, 30))
    silenced = sum(known[question] == silent for question in list(_questions(tasks, 5, 30)))
    report = evaluate(
        _policy(), _Oracle(known, solved=1), _moody(silent), count=30, seed=5, sampling=SAMPLING, completions=2
    )
    assert [(task.task, task.questions) for task in report.tasks] == [("builtin/sums", 30), ("builtin/logic", 30)]
    assert silenced > 0 and [task.unscorable for task in report.tasks] == [silenced, 0]
    assert report.overall.accuracy == 0.5 - silenced / 120


def test_an_evaluation_none_of_whose_answers_can_be_scored_is_a_line() -> None:
    moody = _moody("?")
    asked = {"count": 10, "seed": 5, "sampling": SAMPLING}
    report = evaluate(_policy(), _Oracle({}, 0), moody, **asked)
    assert [(task.task, task.questions, task.unscorable) for task in report.tasks] == [
        ("builtin/sums", 10, 10),
        ("builtin/logic", 10, 0),
    ]
    with pytest.raises(UserError, match="no answer of the evaluation could be scored: the log says why") as caught:
        evaluate(_policy(), _Oracle({}, 0), TaskSet([(moody.tasks[0], 1.0)]), **asked)
    assert "\n" not in str(caught.value)


def test_a_round_whose_answers_cannot_be_scored_has_no_row_and_the_node_goes_on(tmp_path: Path) -> None:
    moody = TaskSet([(_moody("?").tasks[0], 1.0)])
    evaluations = _evaluations(_Oracle({}, 0), moody, MetricsLog(tmp_path / "rows.jsonl"), every=2, completions=2)
    assert evaluations.after_round(RunProgress(0, 0, 0, 0)) == {}
    assert read_metrics(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(("every", "number"), [("ends", 0), (0, 1)])
def test_logits_that_are_not_finite_end_a_node_with_a_line_of_the_round_and_the_rate(
    tmp_path: Path, every: int | str, number: int
) -> None:
    write_diverged_policy(tmp_path / "policy")
    config = small_config(
        1,
        policy={"model": str(tmp_path / "policy")},
        network={"enabled": False},
        sampling={"external": 0},
        eval={"every": every, "count": 2},
        trainer={"learning_rate": 1e-4},
    )
    line = f"^training diverged in round {number}: the policy's logits are not finite; .* \\(it is 0.0001\\)"
    with pytest.raises(DivergedError, match=line):
        run_node(config, tmp_path / "state")
    assert not (tmp_path / "state" / "evaluations.jsonl").exists()


def test_a_row_says_how_many_answers_could_not_be_scored(tasks: TaskSet) -> None:
    asked = {"count": 10, "seed": 5, "sampling": SAMPLING}
    greedy = evaluate(_policy(), _Oracle({}, 0), _moody("?"), **asked)
    sampled = evaluate(_policy(), _Oracle(_answers(tasks, 5, 10), 2), tasks, **asked, completions=2)
    row = evaluation_row(greedy, sampled)
    assert (row["questions"], row["unscorable"]) == (20, 10)
    assert row["tasks"]["builtin/sums"] == {"questions": 10, "accuracy": 0.0, "pass@1": 1.0, "pass@2": 1.0}
    assert (row["pass@2_low"], row["pass@2_high"]) == wilson_interval(20, 20)


def test_every_answer_is_shown_under_its_own_question(tasks: TaskSet) -> None:
    known = _answers(tasks, 5, 6)
    asked = {"count": 6, "seed": 5, "sampling": SAMPLING}
    greedy = answer(_policy(), _Oracle({}, 0), tasks, **asked)
    sampled = answer(_policy(), _Oracle(known, 1), tasks, **asked, completions=2)
    few = {"builtin/sums": greedy["builtin/sums"], "builtin/logic": greedy["builtin/logic"][:1]}
    for kinds in ({"greedy": greedy, "sampled": sampled}, {"greedy": few, "sampled": {}}):
        lines = list(shown(kinds, 99))
        for task, outcomes in kinds["greedy"].items():
            for outcome in outcomes:
                at = lines.index(f"{quoted(task)}  {quoted(outcome.item.question)}")
                block = list(takewhile(lambda line: line.startswith("  "), lines[at + 1 :]))
                scored = [other for other in kinds["sampled"].get(task, ()) if other.item == outcome.item]
                assert block.count("  sampled") == len(scored) and block.count("  greedy") == 1
                right = [line for line in block if line.startswith("  reward 1")]
                assert len(right) == len(scored) and all(quoted(outcome.item.answer) in line for line in right)
    assert sum(line.startswith("builtin/") for line in shown({"greedy": greedy}, 5)) == 5


def test_that_a_policy_may_have_been_taught_what_is_held_out_is_a_line() -> None:
    other = Split(salt=7)
    assert list(doubts("builtin", DEFAULT_SPLIT)) == list(doubts("owner/model", other)) == []
    (line,) = doubts("builtin", other)
    assert "the built-in policy was taught" in line


def _evaluations(engine: _Oracle, tasks: TaskSet, rows: MetricsLog, **config: Any) -> Evaluations:
    return Evaluations(EvalConfig(count=10, **config), SAMPLING, _policy(), engine, tasks, 1000, rows)


@pytest.mark.parametrize(
    ("config", "rounds"),
    [
        (EvalConfig(), [0, 10]),
        (EvalConfig(every=0), []),
        (EvalConfig(every="ends"), [0, 10]),
        (EvalConfig(every=4), [0, 4, 8, 10]),
        (EvalConfig(every=5), [0, 5, 10]),
    ],
)
def test_it_is_time_at_both_ends_and_every_so_often(config: EvalConfig, rounds: list[int]) -> None:
    assert [
        done for done in range(11) if is_due(config, RunProgress(done, (done - 1) / 10, done / 10, 0), 0, 0)
    ] == rounds


@pytest.mark.parametrize(("since", "took", "due"), [(3599, 1, False), (3600, 1, True), (3800, 201, False)])
def test_an_hour_passes_or_as_long_as_makes_it_a_twentieth(since: float, took: float, due: bool) -> None:
    assert is_due(EvalConfig(), RunProgress(5, 0.4, 0.5, 0), since, took) is due


def test_by_the_hour_greedy_answers_are_asked_and_a_new_start_asks_none_before_its_time(
    tasks: TaskSet, tmp_path: Path
) -> None:
    engine = _Oracle(_answers(tasks, EVALUATION_SEED, 10), solved=1)
    for start in range(2):
        rows = MetricsLog(tmp_path / "rows.jsonl")
        rows.rewind(start)
        evaluations = _evaluations(engine, tasks, rows)
        evaluations.after_round(RunProgress(start, 0.2, 0.3, 0))
    assert [(row["round"], row["completions"]) for row in read_metrics(tmp_path / "rows.jsonl")] == [(0, 0)]


def test_marks_are_at_even_steps_of_the_logarithm_and_a_round_that_passes_several_is_evaluated_once() -> None:
    config = EvalConfig(every="marks")
    due = [done for done in range(65) if is_due(config, RunProgress(done, (done - 1) / 64, done / 64, 0), 0, 0)]
    assert due == [0, 4, 6, 8, 12, 16, 23, 32, 46, 64]
    assert is_due(config, RunProgress(1, 0.0, 0.3, 0), 0, 0)
    assert not is_due(config, RunProgress(2, 0.3, 0.35, 0), 0, 0)


def test_at_a_mark_greedy_answers_alone_are_asked_and_at_the_ends_all(tasks: TaskSet, tmp_path: Path) -> None:
    engine = _Oracle(_answers(tasks, EVALUATION_SEED, 10), solved=1)
    evaluations = _evaluations(engine, tasks, MetricsLog(tmp_path / "rows.jsonl"), every="marks", completions=8)
    evaluations.after_round(RunProgress(0, 0, 0, 0))
    evaluations.after_round(RunProgress(3, 0.2, 0.3, 900))
    evaluations.after_round(RunProgress(9, 0.9, 1.02, 3000))
    rows = read_metrics(tmp_path / "rows.jsonl")
    asked = [(row["round"], row["compute"], row["completions"]) for row in rows]
    assert asked == [(0, 0, 8), (3, 900, 0), (9, 3000, 8)]
    assert rows[1]["accuracy"] == 1.0 and "pass@1" not in rows[1]


def test_questions_that_a_choice_was_made_on_can_be_passed_over(tasks: TaskSet, tmp_path: Path) -> None:
    asked = []
    for skip, count in ((0, 10), (0, 4), (4, 6)):
        found = answer(
            _policy(), _Oracle({}, solved=0), tasks, count=count, skip=skip, seed=1, sampling=SAMPLING, completions=1
        )
        asked.append([[outcome.item.question for outcome in outcomes] for outcomes in found.values()])
    whole, first, rest = asked
    assert whole == [one + other for one, other in zip(first, rest, strict=True)]


def test_a_row_holds_greedy_accuracy_and_sampled_pass_at_k_of_the_weights_of_that_round(
    tasks: TaskSet, tmp_path: Path
) -> None:
    engine = _Oracle(_answers(tasks, EVALUATION_SEED, 10), solved=1)
    evaluations = _evaluations(engine, tasks, MetricsLog(tmp_path / "rows.jsonl"), every=5, completions=8)
    assert evaluations.after_round(RunProgress(4, 0.3, 0.4, 7)) == {} and engine.calls == []
    figures = evaluations.after_round(RunProgress(5, 0.4, 0.5, 9))
    assert (figures["eval/accuracy"], figures["eval/pass@1"], figures["eval/pass@8"]) == (1.0, 0.125, 1.0)
    assert figures["time/eval"] >= 0 and engine.loaded == [5]
    assert [(n, temperature) for (_, n, _), temperature in zip(engine.calls, engine.temperatures, strict=True)] == [
        (1, 0.0),
        (1, 0.0),
        (8, 1.0),
        (8, 1.0),
    ]
    (row,) = read_metrics(tmp_path / "rows.jsonl")
    assert (row["round"], row["questions"], row["completions"]) == (5, 20, 8)
    assert (row["accuracy_low"], row["accuracy_high"]) == wilson_interval(20, 20)
    assert (row["pass@1_low"], row["pass@1_high"]) == wilson_interval(2.5, 20)
    assert row["tasks"]["builtin/sums"] == pytest.approx(
        {"questions": 10, "accuracy": 1.0, "pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5, "pass@8": 1.0}
    )


def test_a_round_that_was_evaluated_is_not_evaluated_again_by_a_node_that_goes_on_from_it(
    tasks: TaskSet, tmp_path: Path
) -> None:
    engine = _Oracle({}, solved=0)
    evaluations = _evaluations(engine, tasks, MetricsLog(tmp_path / "rows.jsonl"), every=2, completions=0)
    for done in (0, 2, 4):
        assert evaluations.after_round(RunProgress(done, 0, 0.5, 0))
    again = MetricsLog(tmp_path / "rows.jsonl")
    again.rewind(2)
    evaluations = _evaluations(engine, tasks, again, every=2, completions=0)
    assert [done for done in (2, 3, 4) if evaluations.after_round(RunProgress(done, 0, 0.5, 0))] == [4]
    rows = read_metrics(tmp_path / "rows.jsonl")
    assert [row["round"] for row in rows] == [0, 2, 4]
    assert not any(key.startswith("pass@") for key in rows[0])


def test_a_swarms_figures_are_means_over_nodes_and_count_a_question_once() -> None:
    def row(accuracy: float, **others: float) -> Row:
        return {"round": 0, "questions": 100, "accuracy": accuracy, **others}

    one, two = [row(0.1), row(0.5, **{"pass@8": 0.7})], [row(0.2), row(0.9, **{"pass@8": 0.8})]
    figures = first_and_last([one, two, [], [row(0.3)]])
    assert figures["accuracy_first"] == pytest.approx(0.2) and figures["accuracy_last"] == pytest.approx(0.7)
    assert figures["accuracy_last_interval"] == pytest.approx(wilson_interval(70, 100))
    assert (figures["pass8_first"], figures["pass8_first_interval"]) == (None, None)
    assert figures["pass8_last"] == pytest.approx(0.75)
    assert first_and_last([[row(0.3)]])["accuracy_last"] is None


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_as_tabulated(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(completions: int, data: st.DataObject) -> None:
    solved, k = data.draw(st.integers(0, completions)), data.draw(st.integers(1, completions))
    outcomes = [True] * solved + [False] * (completions - solved)
    draws = [any(draw) for draw in combinations(outcomes, k)]
    assert pass_at_k(solved, completions, k) == pytest.approx(sum(draws) / len(draws))


def test_entropy_is_the_mean_over_tokens_of_the_distributions_that_they_were_drawn_from(tasks: TaskSet) -> None:
    policy, engine = _policy(), _Oracle({}, 0)
    answers = answer(policy, engine, tasks, count=40, seed=0, sampling=SAMPLING, completions=2)
    by_hand = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 12))
    assert mean_entropy(policy, answers, 1.0) == pytest.approx(by_hand)
    assert mean_entropy(policy, answers, 1e3) == pytest.approx(math.log(4), abs=1e-3)
    assert policy.model.training


def answered(*questions: Mapping[str, float]) -> Answers:
    """Return what was answered: for each question completions with their rewards."""
    item = Item("?", "")
    made = [[Played((Generated((), text, True),)) for text in question] for question in questions]
    return {
        "a task": [
            ScoredQuestion(item, of, list(question.values())) for of, question in zip(made, questions, strict=True)
        ]
    }


def test_right_answers_are_as_unlike_as_the_chance_that_two_of_them_are_the_same_says() -> None:
    two = {"5+7": 1.0, " 5+7": 1.0, "6+6": 1.0, "6+6 ": 1.0, "1+1": 0.0}  # of six pairs of right ones two are alike
    assert right_entropy(answered(two)) == pytest.approx(math.log(3))
    assert right_entropy(answered(two, {"9": 1.0, "9 ": 1.0})) == pytest.approx(-math.log((1 / 3 + 1) / 2))
    assert right_entropy(answered({"9": 1.0, " 9": 1.0, "8": 0.0}, {"1": 1.0})) == 0.0
    assert right_entropy(answered({"1+2": 1.0, "2+1": 1.0, "3+0": 1.0})) == pytest.approx(math.log(3)), (
        "no two the same"
    )
    distinct = {f"{n}+9": 1.0 for n in range(10)}
    one_pair = {**{f"{n}+9": 1.0 for n in range(9)}, "8+9 ": 1.0}
    few = {"1+2": 1.0, "2+1": 1.0}
    assert right_entropy(answered(few, one_pair)) == pytest.approx(math.log(90))
    assert right_entropy(answered(few, distinct)) == pytest.approx(math.log(90)), "and not less"
    assert right_entropy(answered({"1": 1.0, "2": 0.0})) is None
