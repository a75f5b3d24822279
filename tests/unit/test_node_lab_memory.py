"""The runner "memory": the tokens of a real node's engine, the numbers of real processes, one thread at a time."""

import copy
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from examples.make_builtin import Recipe, build_model
from node.config import NodeConfig, PolicyConfig, TaskConfig, load_config, parse_config
from node.engines import Generated, SamplingParams
from node.engines.hf import HfEngine
from node.errors import NonFiniteError
from node.fleet.local_swarm import PlanPart, make_plan, node_config, node_folders
from node.lab.__main__ import main as begin_lab
from node.lab.churn import stretches
from node.lab.controls import CONTROLS
from node.lab.ensemble import Request, generate, kind_of
from node.lab.lockstep import Mail, Turns, batched, run_in_memory
from node.lab.plan import ChurnConfig
from node.lab.results import read_run
from node.operations.presets import with_preset
from node.policy.load import Policy, load_policy
from node.policy.memory import Machine, ModelSize
from node.rollouts.group import Group, one_turn
from node.rollouts.rule import Candidate, DrawRequest, Pick
from node.run import run_node
from node.tasks import load_tasks
from node.telemetry.metrics_file import read_metrics
from node.training.budget import spent_in


def policies(count: int) -> list[Policy]:
    """The built-in policy, a little different each time."""
    found = [load_policy(PolicyConfig()) for _ in range(count)]
    for seed, policy in enumerate(found):
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=noise)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_tokens_are_those_of_each_nodes_own_engine(temperature: float) -> None:
    tasks = load_tasks([TaskConfig(name="builtin")])
    sampling = SamplingParams(temperature, 1.0, 12)
    requests = [
        Request(policy, [policy.encode_prompt(question.item) for question in tasks.questions(at, 3)], 4, sampling, at)
        for at, policy in enumerate(policies(3))
    ]
    theirs = [
        HfEngine(request.policy).generate(request.prompts, request.n, request.sampling, request.seed)
        for request in requests
    ]
    assert generate(requests) == theirs
    lengths = {len(made.token_ids) for node in theirs for group in node for made in group}
    assert len(lengths) > 2  # some ended, some did not


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_finite_are_an_error_as_of_a_nodes_own_engine(temperature: float) -> None:
    first, second = policies(2)
    with torch.no_grad():
        second.model.lm_head.weight[7] = float("nan")
    sampling = SamplingParams(temperature, 1.0, 4)
    with pytest.raises(NonFiniteError):
        generate([Request(policy, [[3, 4, 5]], 2, sampling, 0) for policy in (first, second)])


def test_what_cannot_be_stacked_is_answered_by_engines_beside_what_is_stacked() -> None:
    first, second, other, rounded = policies(4)
    other.model.config.model_type = "gpt2"
    rounded = replace(rounded, bf16=True)
    requests = {
        index: Request(policy, [[3, 4, 5], [6, 7]], 3, sampling, index)
        for index, (policy, sampling) in enumerate(
            [
                (first, SamplingParams(1.0, 1.0, 12)),
                (other, SamplingParams(1.0, 1.0, 12)),
                (second, SamplingParams(1.0, 1.0, 12)),
                (first, SamplingParams(1.0, 0.5, 12)),
                (rounded, SamplingParams(1.0, 1.0, 12)),
            ]
        )
    }
    kinds = [kind_of(request) for request in requests.values()]
    assert kinds[0] == kinds[2] is not None
    assert kinds[1] is kinds[3] is kinds[4] is None
    answers = batched(requests)
    assert answers == {
        index: HfEngine(request.policy).generate(request.prompts, request.n, request.sampling, request.seed)
        for index, request in requests.items()
    }
    assert answers[0] != answers[3]  # the cut distribution's


def test_policies_of_two_sizes_are_answered_each_with_its_like() -> None:
    small, large = policies(2)
    config = copy.deepcopy(small.model.config)
    config.intermediate_size *= 2
    large = replace(large, model=LlamaForCausalLM(config).eval())
    requests = {
        index: Request(policy, [[3, 4, 5]], 2, SamplingParams(1.0, 1.0, 6), index)
        for index, policy in enumerate([small, large, small, large])
    }
    assert kind_of(requests[0]) == kind_of(requests[2]) != kind_of(requests[1]) == kind_of(requests[3]) is not None
    assert batched(requests) == {
        index: HfEngine(request.policy).generate(request.prompts, request.n, request.sampling, request.seed)
        for index, request in requests.items()
    }


def asking(policy: Policy, index: int) -> Request:
    return Request(policy, [[index]], 1, SamplingParams(1.0, 1.0, 1), index)


def test_threads_run_in_turn_and_are_answered_together_though_one_ends_before() -> None:
    seen: list[str] = []

    def answer(requests: dict[int, Request]) -> dict[int, list[list[Generated]]]:
        seen.append(f"answer {sorted(requests)}")
        return {index: [[Generated((index,), str(index), True)]] for index in requests}

    turns = Turns(3, answer)

    def work(index: int) -> None:
        for at in range(2 if index == 1 else 3):
            seen.append(f"{index}.{at}")
            assert turns.call(index, asking(None, index))[0][0].text == str(index)

    turns.run([lambda index=index: work(index) for index in range(3)])
    assert seen == [
        *("0.0", "1.0", "2.0", "answer [0, 1, 2]"),
        *("0.1", "1.1", "2.1", "answer [0, 1, 2]"),
        *("0.2", "2.2", "answer [0, 2]"),
    ]


def test_a_thread_that_skips_waits_as_long_as_the_others_and_asks_nothing() -> None:
    seen: list[str] = []

    def answer(requests: dict[int, Request]) -> dict[int, list[list[Generated]]]:
        seen.append(f"answer {sorted(requests)}")
        return {index: [] for index in requests}

    turns = Turns(2, answer)

    def fast() -> None:
        for _ in range(4):
            turns.begin_round(0)
            turns.call(0, asking(None, 0))

    def slow() -> None:
        for at in range(2):
            turns.begin_round(1)
            turns.call(1, asking(None, 1))
            turns.skip(1)
            seen.append(f"slow {at}")

    turns.run([fast, slow])
    assert seen == ["answer [0, 1]", "slow 0", "answer [0]", "answer [0, 1]", "slow 1", "answer [0]"]


def test_a_thread_that_asks_more_often_in_a_round_is_waited_for() -> None:
    seen: list[list[int]] = []

    def answer(requests: dict[int, Request]) -> dict[int, list[list[Generated]]]:
        seen.append(sorted(requests))
        return {index: [] for index in requests}

    turns = Turns(3, answer)

    def work(index: int, turns_of: Sequence[int]) -> None:
        for count in turns_of:
            turns.begin_round(index)
            for _ in range(count):
                turns.call(index, asking(None, index))

    turns.run([partial(work, 0, (1, 1)), partial(work, 1, (3, 1)), partial(work, 2, (2, 2))])
    assert seen == [[0, 1, 2], [1, 2], [1], [0, 1, 2], [2]]


@pytest.mark.parametrize("where", ["thread", "answer"])
def test_the_first_error_ends_all_and_is_raised(where: str) -> None:
    def answer(requests: dict[int, Request]) -> dict[int, list[list[Generated]]]:
        if where == "answer":
            raise ValueError("of no use")
        return {index: [] for index in requests}

    turns = Turns(3, answer)

    def work(index: int) -> None:
        turns.call(index, asking(None, index))
        if where == "thread" and index == 1:
            raise ValueError("of no use")
        turns.call(index, asking(None, index))

    with pytest.raises(ValueError, match="of no use"):
        turns.run([lambda index=index: work(index) for index in range(3)])


def test_a_group_lies_with_all_others_after_its_delay_and_a_lie_with_nobody() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums")])
    (task,) = tasks.tasks
    seeds = [question.seed for question in tasks.questions(0, 10)]

    def group(at: int, reward: float = 1.0) -> Group:
        seed = seeds[at]
        item = task.make(seed)
        made = (one_turn(item.answer, True, reward), one_turn("no", True, 0.0))
        return Group(task.key, seed, item.question, made, "p", 0)

    mail = Mail(tasks, 8, delay=1)
    first, second, third = (mail.exchange(index) for index in range(3))
    known = dict[bytes, bool]().__contains__
    came = []
    for at in range(4):
        first.publish([group(at)])
        assert first.receive(known) == []
        second.publish([group(9, reward=0.5)])
        third.publish([])
        came.append([(candidate.peer, seeds.index(candidate.group.seed)) for candidate in second.receive(known)])
        assert [seeds.index(received.group.seed) for received in third.receive(known)] == [
            request[1] for request in came[-1]
        ]
    assert came == [[], [], [("n0", 0)], [("n0", 1)]]
    assert first.traffic().items_sent == 4 and second.traffic().items_received == 2


def test_a_slow_node_hears_two_rounds_of_the_others_in_each_of_its_own_and_they_hear_it_at_once() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums")])
    (task,) = tasks.tasks
    seeds = [question.seed for question in tasks.questions(0, 20)]

    def group(at: int) -> Group:
        seed = seeds[at]
        item = task.make(seed)
        made = (one_turn(item.answer, True, 1.0), one_turn("no", True, 0.0))
        return Group(task.key, seed, item.question, made, "p", 0)

    mail = Mail(tasks, 8, delay=0)
    fast, slow = (mail.exchange(index) for index in range(2))
    pauses: list[int] = []
    slow.slow_down(2, lambda: pauses.append(1))
    known = dict[bytes, bool]().__contains__
    heard: list[tuple[str, list[int]]] = []
    for at in range(5):
        fast.publish([group(at)])
        heard.append(("fast", [seeds.index(received.group.seed) for received in fast.receive(known)]))
        if at % 2:
            slow.publish([group(10 + at)])
            heard.append(("slow", [seeds.index(received.group.seed) for received in slow.receive(known)]))
    assert heard[2:] == [("slow", [0]), ("fast", [11]), ("fast", []), ("slow", [1, 2]), ("fast", [13])]
    assert len(pauses) == 2


@pytest.mark.slow
def test_a_run_in_memory_is_the_same_whenever_it_is_done_and_is_left_as_a_swarms(tmp_path: Path) -> None:
    config = even_config(tmp_path, eval={"every": "ends", "count": 2, "completions": 4})
    found = []
    for name in ("a", "b"):
        summary = run_in_memory(make_plan(tmp_path / name, 2, config), 0, started=time.time())
        nodes = summary["nodes"].values()
        found.append([(n["reward_cumulative"], n["tokens_trained"], n["groups_external"]) for n in nodes])
        assert read_run(tmp_path / name, "", "", 4).passes.keys() == {"pass@1", "pass@4"}
    assert found[0] == found[1]
    assert all(node["groups_external"] > 0 and node["tokens_trained"] > 0 for node in nodes)


@pytest.mark.slow
def test_marks_on_the_way_are_of_the_first_node_and_change_no_number_of_the_run(tmp_path: Path) -> None:
    numbers, evaluated = [], []
    for every in ("ends", "marks"):
        asked = {"every": every, "count": 2, "completions": 2}
        plan = make_plan(tmp_path / every, 3, even_config(tmp_path, rounds=9, eval=asked))
        run_in_memory(plan, 0, started=time.time())
        rows = [read_metrics(folder / "metrics.jsonl") for folder in node_folders(plan).values()]
        numbers.append([[(row["reward"], row["loss"], row["grad_norm"]) for row in node] for node in rows])
        found = [read_metrics(folder / "evaluations.jsonl") for folder in node_folders(plan).values()]
        evaluated.append([[row["round"] for row in node] for node in found])
    assert numbers[0] == numbers[1]
    assert evaluated == [[[0, 9]] * 3, [[0, 1, 2, 3, 4, 5, 7, 9], [0, 9], [0, 9]]]
    curve = read_run(tmp_path / "marks", "", "", 4).curve
    spent = [spent_in(rows[0][:done]).compute for done in (1, 7)]
    assert (len(curve), curve[1][0], curve[-2][0]) == (8, *spent)


def test_episodes_of_several_turns_are_played_in_memory_as_elsewhere(tmp_path: Path) -> None:
    tree = {
        "rounds": 2,
        "seed": 1,
        "policy": {"model": "builtin", "device": "cpu"},
        "tasks": [{"name": "builtin/guess"}],
        "sampling": {"local": 2, "external": 0, "completions": 4},
        "eval": {"every": "ends", "count": 4, "completions": 0},
        "network": {"enabled": False},
    }
    plan = make_plan(tmp_path / "memory", 2, parse_config(tree))
    run_in_memory(plan, 0, started=time.time())
    for index, folder in enumerate(node_folders(plan).values()):
        rows = read_metrics(folder / "metrics.jsonl")
        assert len(rows) == 2 and all(row["completions/turns"] > 1 for row in rows)
        run_node(node_config(plan, index, cores=1), tmp_path / "alone" / folder.name)
        alone = read_metrics(tmp_path / "alone" / folder.name / "metrics.jsonl")
        for key in ("tokens_generated", "reward", "completions/turns"):
            assert [row[key] for row in rows] == [row[key] for row in alone]


def even_config(folder: Path, **tables: Any) -> NodeConfig:
    """A node on a policy that says anything, and a task that every other completion solves."""
    tree = {
        "rounds": 3,
        "seed": 4,
        "policy": {"model": str(dense_policy(folder / "policy"))},
        "engine": {"max_completion_length": 4},
        "sampling": {"local": 2, "external": 2, "completions": 4},
        "tasks": [{"name": "file/even", "options": {"path": str(even_task(folder / "even.py"))}}],
    }
    return parse_config(tree | tables)


@pytest.mark.slow
def test_adapters_train_in_memory_too(tmp_path: Path) -> None:
    config = even_config(tmp_path, policy={"model": str(dense_policy(tmp_path / "dense")), "lora": {"r": 4}})
    plan = make_plan(tmp_path / "run", 2, config)
    run_in_memory(plan, 0, started=time.time())
    rows = read_metrics(node_folders(plan)["n0"] / "metrics.jsonl")
    assert sum(row["tokens_trained"] for row in rows) > 0
    [weights] = (node_folders(plan)["n0"] / "checkpoints").glob("checkpoint-*/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in load_file(weights).items() if "lora_B" in name)  # zero at first


@pytest.mark.slow
def test_parts_of_a_swarm_have_their_own_models_and_settings_and_learn_from_each_other(tmp_path: Path) -> None:
    small = even_config(tmp_path, rounds=2)
    wide = str(dense_policy(tmp_path / "wide", 64))
    sampling = {"local": 1, "external": 2, "completions": 4}
    large = even_config(tmp_path, rounds=4, sampling=sampling, policy={"model": wide})
    parts = {"small": PlanPart(1, small), "large": PlanPart(2, large)}
    plan = make_plan(tmp_path / "run", 3, small, parts)
    summary = run_in_memory(plan, 0, started=time.time())
    assert [request["rounds"] for request in summary["nodes"].values()] == [2, 4, 4]
    assert [request["groups_local"] / request["rounds"] for request in summary["nodes"].values()] == [2, 1, 1]
    assert all(row["groups_external"] > 0 for row in summary["nodes"].values())
    widths = [
        json.loads(next(folder.glob("checkpoints/*/config.json")).read_text())["hidden_size"]
        for folder in node_folders(plan).values()
    ]
    assert widths == [32, 64, 64]
    assert {name: part["nodes"] for name, part in summary["run"]["parts"].items()} == {"small": 1, "large": 2}
    taught = {name for row in read_metrics(plan.out / "nodes/n1/metrics.jsonl") for name in row["swarm/taught_by"]}
    assert "n0" in taught


@pytest.mark.slow
def test_each_part_asks_the_common_tasks_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = even_config(tmp_path, rounds=2)
    (task,) = bare.tasks
    told = bare.model_copy(update={"tasks": [task.model_copy(update={"instruction": "0123456789"})]})
    longest: dict[int, int] = {}

    def answer(requests: dict[int, Request]) -> dict[int, list[list[Generated]]]:
        longest.update({index: max(map(len, request.prompts)) for index, request in requests.items()})
        return batched(requests)

    monkeypatch.setattr("node.lab.lockstep.batched", answer)
    plan = make_plan(tmp_path / "run", 3, bare, {"bare": PlanPart(1, bare), "told": PlanPart(2, told)})
    summary = run_in_memory(plan, 0, started=time.time())
    assert longest[0] <= 4 and longest[1] > 14 and longest[2] > 14  # a number of three digits, and what is before it
    assert all(row["groups_external"] > 0 for row in summary["nodes"].values())


@pytest.mark.slow
def test_under_churn_a_node_that_is_away_does_no_round_and_comes_back_to_its_end(tmp_path: Path) -> None:
    churn, seed, rounds = ChurnConfig(away=0.5, rounds=3), 8, 8
    absences = [list(itertools.islice(stretches(churn, seed, index), rounds)) for index in range(3)]
    assert [made[0].present == 0 for made in absences] == [False, True, False]  # the seed is chosen so
    config = even_config(tmp_path, rounds=rounds, seed=seed)
    plan = make_plan(tmp_path / "run", 3, config)
    summary = run_in_memory(plan, 0, started=time.time(), churn=churn)
    assert [request["rounds"] for request in summary["nodes"].values()] == [rounds] * 3
    assert summary["run"]["churn"] == {"away": 0.5, "rounds": 3}
    done = []
    for folder, made in zip(node_folders(plan).values(), absences, strict=True):
        for at, row in enumerate(read_metrics(folder / "metrics.jsonl")):
            ends = itertools.accumulate(plan.present for plan in made)
            away = sum(request.away for request, end in zip(made, ends, strict=True) if end <= at)
            done.append((row["time"], at + away))
    assert [tick for _, tick in sorted(done)] == sorted(tick for _, tick in done)
    assert len({tick for _, tick in done}) > rounds  # nobody was there in all of them


@pytest.mark.slow
def test_the_nodes_of_an_arm_with_a_control_draw_by_it_and_the_summary_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def peers(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
        asked.append(len(candidates))
        return wrong.peers(candidates, request)

    wrong = CONTROLS["wrong"](lambda: 0.0)
    monkeypatch.setattr("node.lab.lockstep.CONTROLS", {"wrong": lambda part: replace(wrong, peers=peers)})
    plan = make_plan(tmp_path / "run", 2, even_config(tmp_path, rounds=3))
    summary = run_in_memory(plan, 0, started=time.time(), control="wrong")
    assert sum(asked) > 0
    assert summary["run"]["control"] == "wrong"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_over_a_long_run_with_a_small_buffer_no_group_is_used_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.rollouts.group_buffer.MAX_PEER_SHARE", 1.0)
    settings = {
        "rounds": 150,
        "threads": 1,
        "tasks": [{"name": "builtin", "options": {"partial": True}}],
        "sampling": {"local": 2, "external": 8, "completions": 4},
        "buffer": {"max_groups": 12},
        "trainer": {"save_steps": 1000},
    }
    plan = make_plan(tmp_path / "run", 3, parse_config({**settings, "seed": 5}))
    run_in_memory(plan, 0, started=time.time())
    for folder in node_folders(plan).values():
        rows = read_metrics(folder / "metrics.jsonl")
        trained, received = sum(row["groups_external"] for row in rows), rows[-1]["swarm/items_received"]
        assert rows[-1]["swarm/buffer"] <= 12 < received
        assert 100 < trained <= received


def dense_policy(folder: Path, width: int = 32) -> Path:
    """The built-in policy's shape, or a wider one, with weights that say anything."""
    torch.manual_seed(0)
    policy = load_policy(PolicyConfig())
    if width != policy.model.config.hidden_size:
        policy = replace(policy, model=build_model(Recipe(width=width), policy.tokenizer))
    for weight in policy.model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def even_task(path: Path) -> Path:
    """A task that every other completion solves: an even number of digits and letters."""
    path.write_text(
        "from node.tasks import Item\n\ndef make(seed):\n    return Item(str(seed % 1000), '')\n\n"
        "def verify(item, text):\n    return float(sum(map(str.isalnum, text)) % 2 == 0)\n"
    )
    return path


@pytest.mark.slow
def test_a_run_ends_with_the_laboratory_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    command = [sys.executable, "-m", "node.lab", "memory", str(tmp_path / "settings.json"), "-n", "2", "--seed", "4"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_preset_chooses_no_adapters_in_memory_so_each_machine_has_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2 = ModelSize(135_000_000, 30, 576, 1536, 9, 192, 49152, 8192)
    monkeypatch.setattr("node.operations.presets.detect_machine", lambda *_, **__: Machine(memory=2 << 30))
    monkeypatch.setattr("node.operations.presets.measure_model", lambda _: smollm2)
    settings = tmp_path / "settings.toml"
    settings.write_text('policy.model = "any"')
    assert with_preset(load_config(settings), 4)[0].policy.lora.r > 0

    plans = []
    monkeypatch.setattr("node.lab.lockstep.run_in_memory", lambda plan, *_, **__: plans.append(plan))
    command = ["node.lab", "memory", str(settings), "-n", "4", "--seed", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("node.lab.__main__._end_with_input", lambda: None)
    assert begin_lab() == 0
    assert plans[0].config.policy.lora.r == 0
