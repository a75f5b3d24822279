"""Rollouts by transformers in several processes of a node; those beside number 0 are stand-ins in this one."""

import json
import threading
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from structlog.testing import capture_logs

from node.engines import EngineError, Generated, SamplingParams
from node.engines.ahead import Ahead
from node.engines.hf import HfEngine
from node.engines.processes import ProcessEngine, answer_all
from node.errors import NonFiniteError, UserError
from node.policy.load import Policy
from node.processes.worker_process import Message, WorkerError
from tests.policies import tiny_policy

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=6)
PROMPTS = [[1, *range(5, 6 + number)] for number in range(7)]


@pytest.fixture
def policy(tmp_path) -> Policy:
    return tiny_policy(tmp_path)


class Process:
    """Another process, as far as number 0 sees it: it answers by `answer_all`, and what is said is JSON."""

    def __init__(self, engine: HfEngine, fails: Callable[[Message], None] = lambda request: None) -> None:
        self.engine = engine
        self.asked: list[Message] = []
        self.ended = threading.Event()
        self._fails = fails
        self._waiting: list[Message] = []
        self._answer: Message = {}

    def call(self, request: Message, timeout: float) -> Message:
        self.asked.append(request)
        self._fails(request)
        self._waiting = [json.loads(json.dumps(request))]
        answer_all(self, self.engine, torch.device("cpu"))
        return json.loads(json.dumps(self._answer))

    def receive(self) -> Message:
        if not self._waiting:
            raise EOFError
        return self._waiting.pop()

    def reply(self, message: Message) -> None:
        self._answer = message

    def kill(self) -> None:
        self.ended.set()


def others_of(policy: Policy, count: int, **options) -> list[Process]:
    return [Process(HfEngine(policy, **options)) for _ in range(count)]


def prompts_of(process: Process) -> int:
    return sum(len(request.get("prompts", [])) for request in process.asked)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_each_process_generates_its_part_and_all_give_what_one_gives(policy: Policy, top_p: float) -> None:
    """Number 0 generated alone, while the others waited."""
    sampling = SamplingParams(0.9, top_p, 6)
    alone = HfEngine(policy).generate(PROMPTS, 4, sampling, seed=3)
    others = others_of(policy, 2)
    engine = ProcessEngine(policy, HfEngine(policy), others, 60)
    engine.load(0)
    assert engine.generate(PROMPTS, 4, sampling, seed=3) == alone
    assert engine.generate(PROMPTS, 4, sampling, seed=4) != alone
    assert 4 <= sum(map(prompts_of, others)) <= 10, "of seven prompts, twice"
    assert engine.generate([], 4, sampling, seed=3) == []


def test_ahead_all_processes_generate_by_the_weights_of_the_last_load(policy: Policy) -> None:
    alone = HfEngine(policy, ahead=True).generate(PROMPTS, 2, SAMPLING, seed=3)
    engine = Ahead(ProcessEngine(policy, HfEngine(policy, ahead=True), others_of(policy, 1, ahead=True), 60))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(-1)
    assert_alike(engine.generate(PROMPTS, 2, SAMPLING, seed=3), alone)
    engine.load(1)
    now = HfEngine(policy, ahead=True).generate(PROMPTS, 2, SAMPLING, seed=3)
    assert now != alone
    assert_alike(engine.generate(PROMPTS, 2, SAMPLING, seed=3), now)


def assert_alike(made: list[list[Generated]], expected: list[list[Generated]]) -> None:
    for one, other in zip(chain(*made), chain(*expected), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def dies(request: Message) -> None:
    raise WorkerError("killed by SIGKILL")


@pytest.mark.parametrize("call", ["load", "generate", "rest"])
def test_a_process_that_dies_ends_the_node_in_a_line(policy: Policy, call: str) -> None:
    other = Process(HfEngine(policy), lambda request: dies(request) if request["call"] == call else None)
    engine = ProcessEngine(policy, HfEngine(policy), [other], 60)
    with pytest.raises(EngineError, match=r"process 1 of this node has died .*killed by SIGKILL.*start the node again"):
        engine.load(0)
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)
        engine.rest()


def test_a_process_that_hangs_is_ended_by_the_bound_of_an_engine_of_vllm(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.engines.spread.GRACE_S", 0.2)

    def hangs(request: Message) -> None:
        assert other.ended.wait(60)
        raise WorkerError("it was ended")

    other = Process(HfEngine(policy), hangs)
    with capture_logs() as said, pytest.raises(EngineError, match=r"process 1 of this node has died .*it was ended"):
        ProcessEngine(policy, HfEngine(policy), [other], 3600).generate(PROMPTS, 2, SAMPLING, seed=3)
    assert [(line["event"], line["process"]) for line in said] == [("an engine is late", 1)]


@pytest.mark.parametrize(
    ("error", "raised"), [(NonFiniteError(), NonFiniteError), (UserError("out of memory: set less"), UserError)]
)
def test_what_another_process_finds_wrong_is_raised_as_number_0_would(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    other = Process(HfEngine(policy))
    monkeypatch.setattr(other.engine, "generate_from", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(raised, match=str(error)):
        ProcessEngine(policy, HfEngine(policy), [other], 60).generate(PROMPTS, 2, SAMPLING, seed=3)
