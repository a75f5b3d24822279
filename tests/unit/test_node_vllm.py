"""The vLLM engine against a stand-in for vLLM (tests/fakes/vllm) in a real worker process."""

import dataclasses
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from structlog.testing import capture_logs

from node.config import EngineConfig, PolicyConfig, parse_config
from node.engines import EngineError, SamplingParams, vllm_worker
from node.engines.hand_over import AdapterFolder, SharedWeights, WeightMismatchError, digest, policy_logprobs
from node.engines.vllm import VllmEngine, _environment
from node.engines.vllm import make as make_vllm
from node.engines.vllm_worker import checksum
from node.errors import NonFiniteError, UserError
from node.operations.presets import sleeps_in_update
from node.policy.detection import NODES_ON_GPU
from node.policy.export import export_weights
from node.policy.load import load_policy
from node.processes import worker_process
from node.processes.worker_process import WorkerError, WorkerProcess
from tests.policies import tiny_policy, write_mixture
from tests.processes import alive
from tests.swarms import vllm_workers
from tests.waiting import wait_until

FAKES = Path(__file__).parents[1] / "fakes"
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=12)


@pytest.fixture
def policy(tmp_path):
    """A policy whose next token depends on nothing: the logits are the row sums of the output matrix."""
    policy = tiny_policy(tmp_path / "policy")
    config = policy.model.config
    config.tie_word_embeddings = False
    model = type(policy.model)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(0 if re.search("o_proj|down_proj", name) else 1)
        set_logits(model, seed=0)
    return dataclasses.replace(policy, model=model)


def set_logits(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator) / 2)


@pytest.fixture
def engine_of(policy, tmp_path, monkeypatch):
    """Make an engine over the stand-in; `fault` is what its vLLM does wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setattr("node.engines.vllm.DTYPE", "float32")
    engines = []

    def make(fault="", timeout=60, placement="same", sleeps=False, **settings):
        monkeypatch.setenv("VLLM_FAKE", fault)
        config = EngineConfig(
            kind="vllm",
            placement=placement,
            timeout=timeout,
            max_prompt_length=64,
            max_completion_length=12,
            vllm=settings,
        )
        engines.append(VllmEngine(policy, config, tmp_path, sleeps=sleeps))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def worker_pids():
    """Other tests' children, some of them dead, are children of this process too."""
    return [child.pid for child in vllm_workers(psutil.Process().children())]


def worker_pid():
    [pid] = worker_pids()
    return pid


def kill_worker():
    """Kill the worker and its guard; return once what they had started has ended, too, so that nothing can answer."""
    guard = psutil.Process(worker_pid())
    below = guard.children(recursive=True)
    guard.kill()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive


@pytest.mark.slow
def test_completions_are_grouped_by_prompt_distinct_and_a_function_of_the_seed(engine_of, policy):
    engine = engine_of()
    engine.load(0)
    prompts = [[1, 5, 6], [1, 7], [1, 7]]
    groups = engine.generate(prompts, 4, SAMPLING, seed=3)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert len({completion.token_ids for group in groups for completion in group}) > 9, (
        "equal prompts too have streams of their own"
    )
    assert engine.generate(prompts, 4, SAMPLING, seed=3) == groups
    assert engine.generate(prompts, 4, SAMPLING, seed=4) != groups
    for one in groups[0]:
        assert one.finished == (one.token_ids[-1] in policy.eos_token_ids)
        assert one.text == policy.decode(one.token_ids)
        assert list(one.logprobs) == pytest.approx(policy_logprobs(policy, [1, *one.token_ids]), abs=1e-4)


@pytest.mark.slow
def test_log_probabilities_are_left_out_where_top_p_would_change_what_they_mean(engine_of):
    engine = engine_of()
    [[one, _]] = engine.generate([[1, 5]], 2, dataclasses.replace(SAMPLING, top_p=0.9), seed=0)
    assert one.logprobs is None


@pytest.mark.slow
def test_a_completion_that_ends_is_finished(engine_of, policy):
    with torch.no_grad():
        policy.model.lm_head.weight[policy.eos_token_ids[0]] = 100.0
    [[one, _]] = engine_of().generate([[1, 5]], 2, SAMPLING, seed=0)
    assert (one.token_ids, one.text, one.finished) == ((policy.eos_token_ids[0],), "", True)


def told(folder):
    """What the stand-in was told to do."""
    return re.findall(r"told (.*)", (folder / "vllm.log").read_text())


@pytest.mark.slow
def test_load_brings_the_trainers_new_weights_by_way_of_no_disk(engine_of, policy, tmp_path):
    engine = engine_of()
    for version in range(3):
        set_logits(policy.model, seed=version)
        engine.load(version)
        [[one, _]] = engine.generate([[1, 5]], 2, SAMPLING, seed=version)
        assert list(one.logprobs) == pytest.approx(policy_logprobs(policy, [1, *one.token_ids]), abs=1e-4)
    assert [path.name for path in (tmp_path / "vllm-model").iterdir()] == ["config.json"]
    assert engine.restarts == 0
    assert told(tmp_path).count("take_weights") == 3


@pytest.mark.slow
def test_nothing_is_handed_over_when_nothing_changed(engine_of, policy, tmp_path):
    engine = engine_of()
    for version in range(3):
        engine.load(version)
    assert told(tmp_path).count("take_weights") == 1
    with torch.no_grad():
        policy.model.lm_head.weight[3, 4] += 1e-6
    engine.load(3)
    assert told(tmp_path).count("take_weights") == 2


def test_experts_are_handed_over_by_the_names_of_their_files(tmp_path):
    write_mixture(tmp_path / "mixture")
    published = load_file(tmp_path / "mixture" / "model.safetensors")
    policy = load_policy(PolicyConfig(model=str(tmp_path / "mixture"), device="cpu"))
    shared = SharedWeights("float32")
    given = shared.write(policy)
    memory = torch.from_file(given["path"], size=Path(given["path"]).stat().st_size, dtype=torch.uint8)
    for name, shape, start in given["tensors"]:
        found = memory[start : start + 4 * math.prod(shape)].view(torch.float32).view(shape)
        assert torch.equal(found, published[name])
    assert {name for name, _, _ in given["tensors"]} == published.keys()
    shared.close()
    (tmp_path / "out").mkdir()
    export_weights(policy.model, tmp_path / "out", "float32")
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert {name for file in files for name in file} == published.keys()


def test_weights_that_are_tied_are_handed_over_once(tmp_path):
    shared = SharedWeights("bfloat16")
    policy = tiny_policy(tmp_path / "tied")
    given = shared.write(policy)
    shared.close()
    names = [name for name, _, _ in given["tensors"]]
    assert "lm_head.weight" not in names
    assert len(names) == len(list(policy.model.parameters()))


def test_adapters_that_a_killed_node_left_in_memory_go_at_its_next_start_and_no_other_nodes(tmp_path, monkeypatch):
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("node.engines.hand_over.MEMORY_FOLDER", memory)
    policy = tiny_policy(tmp_path / "tied", lora=2)
    other = AdapterFolder(tmp_path / "other", in_memory=True).write(policy)
    for _ in range(2):  # the first one is killed, as far as the second one can tell
        mine = AdapterFolder(tmp_path / "mine", in_memory=True)
        assert list(memory.iterdir()) == [other]
        assert mine.write(policy).parent == memory


def test_the_digest_changes_with_any_trained_weight(tmp_path):
    policy = tiny_policy(tmp_path / "tied", lora=2)
    before = digest(policy)
    assert digest(policy) == before
    for weight in (weight for weight in policy.model.parameters() if weight.requires_grad):
        with torch.no_grad():
            weight.flatten()[0].add_(1e-5)
        assert digest(policy) != before
        before = digest(policy)


@pytest.mark.slow
def test_on_a_gpu_that_is_too_full_vllm_starts_with_less(engine_of):
    with capture_logs() as said:
        engine_of("full").load(0)
    lines = [line["set"] for line in said if line["event"] == "vllm starts again with less memory"]
    assert lines == ["engine.vllm.gpu_memory_utilization=0.32", "engine.vllm.gpu_memory_utilization=0.256"]


@pytest.mark.slow
def test_memory_that_was_short_before_is_no_reason_to_start_with_less(engine_of, tmp_path, monkeypatch):
    engine = engine_of()
    engine.load(0)
    with (tmp_path / "vllm.log").open("a") as log:
        log.write("CUDA out of memory\n")
    monkeypatch.setenv("VLLM_FAKE", "broken-start")
    kill_worker()
    with capture_logs() as said, pytest.raises(EngineError, match="no room for the cache"):
        engine.generate([[1, 5]], 2, SAMPLING, seed=0)
    assert [line["event"] for line in said] == ["vllm restarts"]


def rounds_with(engine, policy):
    """The completions of two rounds and of one more by the last weights, with the weights of an update between."""
    made = []
    for version in (0, 1, 1):
        set_logits(policy.model, seed=version)
        engine.load(version)
        made += engine.generate([[1, 5]], 2, SAMPLING, seed=version)
        assert list(made[-1][0].logprobs) == pytest.approx(
            policy_logprobs(policy, [1, *made[-1][0].token_ids]), abs=1e-4
        )
        engine.rest()
    engine.close()
    return made


@pytest.mark.slow
def test_where_the_update_needs_its_memory_vllm_sleeps_and_wakes_to_its_weights_and_rounds_are_the_same(
    engine_of, policy, tmp_path
):
    turns = rounds_with(engine_of("gpu", sleeps=True), policy)
    asleep = ["sleep 2", "wake_up ['weights']", "take_weights", "wake_up ['kv_cache']"]
    assert told(tmp_path) == ["take_weights", *asleep, *asleep, "sleep 2"]
    assert rounds_with(engine_of("gpu"), policy) == turns
    assert told(tmp_path) == ["take_weights", "take_weights"], "it neither slept nor was given the same weights again"


@pytest.mark.parametrize(("gigabytes", "beside", "sleeps"), [(2**-10, 1, True), (60, 1, False), (60, 30, True)])
def test_whether_vllm_sleeps_is_said_by_the_sum_of_memory_for_the_nodes_part_of_its_card(
    policy, tmp_path, monkeypatch, gigabytes, beside, sleeps
):
    policy.model.save_pretrained(tmp_path / "policy")
    card = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    monkeypatch.setenv(NODES_ON_GPU, str(beside))
    tree = {"policy": {"model": str(tmp_path / "policy")}, "engine": {"kind": "vllm"}}
    assert sleeps_in_update(parse_config(tree)) == sleeps
    for engine in ({"kind": "hf"}, {"placement": [1]}, {"ahead": 1}):
        assert not sleeps_in_update(parse_config(tree | {"engine": tree["engine"] | engine}))


@pytest.mark.slow
def test_the_trainer_gives_back_what_it_keeps_of_the_gpu_before_vllm_starts_or_wakes(engine_of, tmp_path, monkeypatch):
    before = []

    def note():
        log = tmp_path / "vllm.log"
        before.append(log.read_text().count("told wake_up") if log.exists() else "start")

    monkeypatch.setattr("node.engines.vllm.free_memory", note)
    engine = engine_of("gpu", sleeps=True)
    for version in range(3):
        engine.load(version)
        engine.load(version)
        engine.generate([[1, 5]], 2, SAMPLING, seed=version)
        engine.rest()
    assert before == ["start", 0, 2]


PROMPTS = [[1, 5, number] for number in range(8)]


@pytest.fixture
def of_one_engine(engine_of):
    """What one engine gives for PROMPTS."""
    engine = engine_of()
    engine.load(0)
    made = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    engine.close()
    return made


def parts_of(folder, number):
    """How many prompts an engine was asked in each of its parts."""
    log = folder / (f"vllm-{number}.log" if number else "vllm.log")
    return [int(count) for count in re.findall(r"generates (\d+)", log.read_text())]


@pytest.mark.slow
def test_engines_share_a_batch_and_give_what_one_gives(engine_of, of_one_engine, policy, tmp_path):
    engine = engine_of(placement=[0, 1, 2])
    engine.load(0)
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    assert [parts_of(tmp_path, number) for number in range(3)] == [[2], [3], [3]]
    assert engine.generate([], 2, SAMPLING, seed=3) == []
    set_logits(policy.model, seed=1)
    engine.load(1)
    for [completion, _] in engine.generate(PROMPTS, 2, SAMPLING, seed=3):
        assert list(completion.logprobs) == pytest.approx(policy_logprobs(policy, [1, *completion.token_ids]), abs=1e-4)
    logs = [(tmp_path / name).read_text() for name in ("vllm.log", "vllm-1.log", "vllm-2.log")]
    assert [log.count("told take_weights") for log in logs] == [2, 2, 2], "each is given each version"


@pytest.mark.slow
def test_a_slow_engine_takes_fewer_parts(engine_of, of_one_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("node.engines.spread.PART", 4)
    engine = engine_of("slow@1", placement=[1, 2])
    engine.load(0)
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    assert [parts_of(tmp_path, number) for number in range(2)] == [[2], [2, 2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("placement", [[0, 1], [1, 2]])
def test_the_part_of_an_engine_that_dies_is_generated_by_another_and_it_comes_back(
    engine_of, of_one_engine, tmp_path, placement
):
    """Where it shares the trainer's GPU the next round waits for it, and elsewhere it comes when it has started."""
    engine = engine_of(f"dies-once@{placement[1]}", placement=placement)
    engine.load(0)
    with capture_logs() as said:
        assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    assert [(line["event"], line["gpus"]) for line in said] == [("vllm restarts", placement[1:])]
    assert parts_of(tmp_path, 0) == [4, 4]
    engine.load(1)
    wait_until(lambda: not engine._engines[1].starting, timeout=30, what="the engine to start")
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    assert (parts_of(tmp_path, 0), parts_of(tmp_path, 1)) == ([4, 4, 4], [4, 4])
    assert engine.restarts == 1


@pytest.mark.slow
def test_an_engine_that_dies_again_is_left_out_for_good(engine_of, of_one_engine, tmp_path):
    engine = engine_of("dies@1", placement=[0, 1])
    with capture_logs() as said:
        for version in range(4):
            engine.load(version)
            assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    events = [line["event"] for line in said if line["log_level"] == "warning"]
    assert events == ["vllm restarts", "vllm is left out until the node starts again"]
    assert parts_of(tmp_path, 1) == [4, 4]


@pytest.mark.slow
def test_an_engine_that_hangs_holds_up_nobody(engine_of, of_one_engine, monkeypatch):
    """It is not waited for until engine.timeout, which the test would not outlast."""
    monkeypatch.setattr("node.engines.spread.GRACE_S", 0.5)
    engine = engine_of("hangs@2", timeout=3600, placement=[1, 2])
    engine.load(0)
    with capture_logs() as said:
        assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    assert [line["event"] for line in said] == ["an engine is late", "vllm restarts"]


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_left_out(engine_of, of_one_engine):
    engine = engine_of("broken-start@1", placement=[0, 1])
    with capture_logs() as said:
        for version in range(3):
            engine.load(version)
            assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == of_one_engine
    lines = [line for line in said if line["log_level"] == "warning"]
    assert len(lines) == 2 and "left out" in lines[1]["event"] and "no room for the cache" in lines[1]["reason"]


@pytest.mark.slow
def test_without_any_engine_a_round_ends_in_an_error(engine_of):
    engine = engine_of("dies", placement=[1, 2])
    with pytest.raises(EngineError, match="twice in a row: killed by SIGKILL"):
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    with pytest.raises(EngineError, match="no engine of vLLM is left"):
        engine.load(1)


@pytest.mark.slow
def test_a_hand_over_that_one_of_two_engines_lacks_is_refused(engine_of, policy):
    engine = engine_of("lost@2", placement=[1, 2])
    engine.load(0)
    take_a_step(policy.model)
    with pytest.raises(WeightMismatchError, match="version 1"):
        engine.load(1)


@pytest.mark.slow
def test_an_engine_is_closed_while_its_child_starts(engine_of, of_one_engine):
    engine = engine_of("dies-once@2", placement=[1, 2])
    engine.load(0)
    engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    engine.load(1)
    engine.close()  # the thread that starts the child ends it, if there is none yet
    wait_until(lambda: not worker_pids(), 10, "the child to end")


@pytest.mark.parametrize("placement", ["same", [1], [0, 1]])
def test_a_card_without_bfloat16_is_refused_in_a_line(policy, tmp_path, monkeypatch, placement):
    cards = [("Tesla T4", (7, 5)), ("Tesla V100", (7, 0))]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: cards[number][0])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: cards[number][1])
    card = "GPU 1 lacks .Tesla V100, compute capability 7.0" if placement == [1] else "GPU 0 lacks .Tesla T4"
    with pytest.raises(UserError, match=rf"bfloat16 here, which {card}.*: set engine\.kind='hf'"):
        make_vllm(EngineConfig(kind="vllm", placement=placement), policy, tmp_path)
    cards = [("A100", (8, 0)), ("H100", (9, 0))]
    make_vllm(EngineConfig(kind="vllm", placement=placement), policy, tmp_path).close()


def test_each_process_of_a_node_has_an_engine_on_its_gpu():
    config = EngineConfig(kind="vllm")
    assert (config.beside(1), config.beside(3).devices) == (config, [0, 1, 2])
    apart, hf = EngineConfig(kind="vllm", placement=[2]), EngineConfig(kind="hf")
    assert (apart.beside(2), hf.beside(2)) == (apart, hf)


def test_other_gpus_are_named_by_what_this_process_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _environment([2, 3])["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in _environment()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,GPU-a")
    assert _environment([1, 2])["CUDA_VISIBLE_DEVICES"] == "6,GPU-a"


def test_a_policy_whose_logits_are_not_finite_is_an_error_of_its_own(engine_of, policy):
    with torch.no_grad():
        policy.model.lm_head.weight[7] = float("nan")
    with pytest.raises(NonFiniteError):
        engine_of().load(0)


def take_a_step(model):
    """Move all weights by as much as an update does: less than rounding changes probabilities."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost", "stale-head", "lost, packs"])
@pytest.mark.parametrize("step", [take_a_step, lambda model: set_logits(model, seed=1)])
def test_a_hand_over_that_does_not_arrive_whole_is_refused(engine_of, policy, fault, step):
    engine = engine_of(fault)
    engine.load(0)
    step(policy.model)
    with pytest.raises(WeightMismatchError, match="version 1"):
        engine.load(1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "packs"])
def test_a_small_update_arrives_in_a_child_that_was_replaced_too(engine_of, policy, fault):
    engine = engine_of(fault)
    for version in range(3):
        engine.load(version)
        take_a_step(policy.model)
        engine.load(version)
        if version == 1:
            kill_worker()
            engine.generate([[1, 5]], 2, SAMPLING, seed=0)
    assert engine.restarts == 1


def test_a_checksum_is_of_numbers_and_neither_of_their_order_nor_of_zeros_beside_them():
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    whole = torch.cat([second, first, torch.zeros(5, 4)])
    for dtype in ("bfloat16", "float32"):
        assert checksum([first, second], dtype) == checksum([whole.T], dtype)
        swapped = first.clone()
        swapped[0, 0], swapped[0, 1] = first[0, 0] * (1 + 2**-7), first[0, 1] * (1 - 2**-7)
        assert checksum([swapped, second], dtype) != checksum([first, second], dtype)


@pytest.mark.slow
def test_a_killed_child_is_replaced_by_one_with_the_same_weights(engine_of, policy):
    engine = engine_of()
    engine.load(0)
    set_logits(policy.model, seed=1)
    engine.load(1)
    expected = engine.generate([[1, 5]], 2, SAMPLING, seed=0)
    kill_worker()
    assert engine.generate([[1, 5]], 2, SAMPLING, seed=0) == expected
    assert engine.restarts == 1


@pytest.mark.slow
def test_a_child_that_dies_while_generating_is_replaced_and_asked_again(engine_of):
    engine = engine_of("dies-once")
    assert len(engine.generate([[1, 5]], 2, SAMPLING, seed=0)[0]) == 2
    assert engine.restarts == 1


@pytest.mark.slow
def test_a_child_that_dies_again_is_an_error_that_quotes_its_log(engine_of):
    engine = engine_of("dies")
    with pytest.raises(EngineError, match=r"twice in a row: killed by SIGKILL.*memory.*vllm\.log.*out of luck"):
        engine.generate([[1, 5]], 2, SAMPLING, seed=0)
    assert engine.restarts == 1


@pytest.mark.slow
def test_a_child_that_falls_silent_is_killed(engine_of):
    engine = engine_of("hangs", timeout=2)
    with pytest.raises(EngineError, match="no answer to 'generate' in 2 s"):
        engine.generate([[1, 5]], 2, SAMPLING, seed=0)
    assert worker_pids() == []


@pytest.mark.slow
def test_a_start_that_fails_quotes_the_log_and_is_not_tried_again(engine_of):
    engine = engine_of("broken-start")
    with pytest.raises(EngineError, match=r"did not start: exit status 1; .*RuntimeError: no room for the cache"):
        engine.load(0)
    assert engine.restarts == 0


@pytest.mark.slow
def test_an_interpreter_without_vllm_is_a_users_error(engine_of, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    engine = engine_of(python=str(tmp_path / "bare/bin/python"))
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match=r"bare/bin/python -m pip install vllm.*install_vllm_cpu"):
        engine.load(0)


@pytest.mark.slow
def test_an_interpreter_that_is_not_there_is_a_users_error(engine_of):
    with pytest.raises(UserError, match=r"engine\.vllm\.python='/nowhere/python'"):
        engine_of(python="/nowhere/python").load(0)


@pytest.mark.slow
def test_everything_dies_with_a_node_that_is_killed(tmp_path, policy):
    """The child, and what vLLM has started, end by themselves when nobody is left to end them."""
    policy.model.config.save_pretrained(tmp_path / "weights")
    node = f"""
import sys, time
from pathlib import Path
from node.processes.worker_process import WorkerProcess
child = WorkerProcess([sys.executable, "-P", {vllm_worker.__file__!r}], {{}}, Path("log"))
child.call(dict(call="start", model="weights", dtype="float32", max_model_len=64, tensor_parallel_size=1,
                lora_rank=0, sleeps=True, gpu_memory_utilization=0.4, cpu_cache_bytes=1 << 30), 60)
print(child.pid, flush=True)
time.sleep(600)
"""
    paths = os.pathsep.join([str(FAKES), str(FAKES.parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "VLLM_FAKE": "helper"}
    with subprocess.Popen(
        [sys.executable, "-c", node], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        worker = int(process.stdout.readline())
        [helper] = map(int, re.findall(r"helper (\d+)", (tmp_path / "log").read_text()))
        assert alive(worker)
        assert alive(helper)
        process.kill()
    wait_until(lambda: not alive(worker) and not alive(helper), timeout=10, what="both processes to end")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (b"\xff\xff\xff\xff", "malformed"),
        (b"\x00\x00\x00\x02[]", "malformed"),
        (b"\x00\x00\x00\x02{]", "malformed"),
        (b"\x00\x00\x00\x09{}", "exit status 0"),
    ],
    ids=["oversized", "no message", "no JSON", "cut short"],
)
def test_a_child_that_speaks_nonsense_is_dropped(tmp_path, reply, complaint):
    program = f"import os, sys; os.read(int(sys.argv[1]), 4); os.write(int(sys.argv[1]), {reply!r})"
    child = WorkerProcess([sys.executable, "-c", program], {}, tmp_path / "log")
    with pytest.raises(WorkerError, match=complaint):
        child.call({"call": "start"}, timeout=30)
    assert not alive(child.pid)


@given(st.dictionaries(st.text(), st.lists(st.floats(allow_nan=False) | st.integers())))
def test_a_frame_comes_back_as_it_went(message):
    left, right = socket.socketpair()
    with left, right:
        worker_process.send(left, message)
        assert worker_process.receive(right) == message
