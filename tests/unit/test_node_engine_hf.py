"""Rollouts by transformers: deterministic, with the configured sampling and nothing else."""

import json
import random
import threading
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from node.config import PolicyConfig
from node.engines import EngineError, Generated, SamplingParams
from node.engines.hf import HfEngine
from node.errors import NonFiniteError, UserError
from node.policy.load import Policy, load_policy
from node.tasks import Item
from tests.architectures import OTHERS, SHARING, policy_of
from tests.locks import watched
from tests.policies import tiny_policy, write_tiny_policy

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=6)
QUESTIONS = ["1+1=", "a somewhat longer question", "9"]


@pytest.fixture
def policy(tmp_path) -> Policy:
    return tiny_policy(tmp_path)


def prompts_of(policy: Policy) -> list[list[int]]:
    return [policy.encode_prompt(Item(question, "")) for question in QUESTIONS]


def flat(made: list[list[Generated]]) -> list[Generated]:
    return [completion for of_prompt in made for completion in of_prompt]


def test_completions_end_at_end_of_text_or_at_the_limit(policy):
    made = HfEngine(policy).generate(prompts_of(policy), 16, PARAMS, seed=0)
    assert [len(of_prompt) for of_prompt in made] == [16, 16, 16]
    (eos,) = policy.eos_token_ids
    for completion in flat(made):
        assert completion.finished == (completion.token_ids[-1] == eos)
        assert eos not in completion.token_ids[:-1]
        assert completion.finished or len(completion.token_ids) == 6
        assert completion.text == policy.decode(completion.token_ids)
    assert len({answer.text for answer in flat(made)}) > 30


def test_the_seed_decides_and_no_global_random_state_is_touched(policy):
    engine, prompts = HfEngine(policy), prompts_of(policy)
    torch.manual_seed(11)
    random.seed(11)
    before = torch.random.get_rng_state(), random.getstate()
    first = engine.generate(prompts, 4, PARAMS, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(99)
    assert engine.generate(prompts, 4, PARAMS, seed=5) == first
    assert engine.generate(prompts, 4, PARAMS, seed=6) != first


class Rounded(TorchDispatchMode):
    """Counts the matrices that are rounded to bfloat16."""

    def __init__(self, shapes) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return func(*args, **kwargs)


@pytest.mark.parametrize(("lora", "ahead"), [(0, False), (0, True), (4, False), (4, True)])
def test_float32_weights_are_rounded_once_a_batch_whether_they_train_or_not(tmp_path, lora, ahead):
    """Frozen ones were rounded again for each token, which took five times as long."""
    policy = replace(tiny_policy(tmp_path, width=20, lora=lora), bf16=True)
    frozen = {name for name, weight in policy.model.named_parameters() if not weight.requires_grad}
    engine = HfEngine(policy, ahead=ahead)
    shapes = {weight.shape for weight in policy.model.parameters() if weight.ndim > 1}
    counts = []
    for length in (2, 6):
        with Rounded(shapes) as rounded:
            engine.generate(prompts_of(policy), 2, replace(PARAMS, max_completion_length=length), seed=5)
        counts.append(rounded.count)
    assert counts[0] == counts[1]
    assert frozen == {name for name, weight in policy.model.named_parameters() if not weight.requires_grad}


class Products(TorchDispatchMode):
    """Collects the shapes (B, K, N) of what batches are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.shapes += [args[1].shape]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_no_row_has_a_copy_of_the_head(tmp_path, monkeypatch, n, lora):
    monkeypatch.setattr("node.engines.hf.LARGE", 0)
    write_tiny_policy(tmp_path / "model")
    config = PolicyConfig(model=str(tmp_path / "model"), dtype="bfloat16", lora={"r": lora})
    policy = load_policy(config, bf16=False)
    head = policy.model.get_output_embeddings()
    with Products() as products:
        HfEngine(policy).generate(prompts_of(policy), n, PARAMS, seed=0)
    assert [shape for shape in products.shapes if policy.model.config.vocab_size in shape] == []
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("lora", [0, 4])
def test_a_copy_in_bfloat16_says_what_the_weights_say_that_train(tmp_path, lora):
    policy = replace(tiny_policy(tmp_path, lora=lora), bf16=True)
    engine, ahead = HfEngine(policy), HfEngine(policy, ahead=True)
    prompts = prompts_of(policy)
    for version in range(2):
        ahead.load(version)
        ours = flat(engine.generate(prompts, 4, PARAMS, seed=5))
        assert [completion.token_ids for completion in flat(ahead.generate(prompts, 4, PARAMS, seed=5))] == [
            our.token_ids for our in ours
        ]
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.mul_(1.5 if weight.requires_grad else 1)


def test_temperature_0_takes_the_likeliest_token_each_time(policy):
    greedy = SamplingParams(temperature=0.0, top_p=1.0, max_completion_length=6)
    prompts = prompts_of(policy)
    made = HfEngine(policy).generate(prompts, 2, greedy, seed=1)
    assert made == HfEngine(policy).generate(prompts, 2, greedy, seed=2)
    for prompt, (completion, other) in zip(prompts, made, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.inference_mode():
                assert token == policy.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
        assert completion == other


def test_the_weights_of_the_moment_are_used_without_gradients_and_the_mode_is_put_back(policy):
    engine, prompts = HfEngine(policy), prompts_of(policy)
    policy.model.train()
    before = engine.generate(prompts, 4, PARAMS, seed=5)
    assert policy.model.training
    assert all(weight.grad is None for weight in policy.model.parameters())
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(-1)
    engine.load(1)
    assert engine.generate(prompts, 4, PARAMS, seed=5) != before
    policy.model.eval()
    engine.generate(prompts, 1, PARAMS, seed=5)
    assert not policy.model.training


def test_tokens_follow_the_models_distribution(policy):
    """4,000 first tokens against the exact probabilities: nothing is cut, and padding on the left shifts nothing."""
    short, long = prompts_of(policy)[:2]
    one_token = SamplingParams(1.0, 1.0, 1)
    made = HfEngine(policy).generate([short, long], 4000, one_token, seed=1)
    with torch.no_grad():
        exact = policy.model(input_ids=torch.tensor([short])).logits[0, -1].softmax(-1)
    drawn = (
        torch.bincount(torch.tensor([completion.token_ids[0] for completion in made[0]]), minlength=len(exact)) / 4000
    )
    assert (drawn - exact).abs().sum() / 2 < 0.06  # total variation; a top-k of 50 leaves far more


def test_top_p_cuts_the_tail(policy):
    (prompt,) = prompts_of(policy)[:1]
    with torch.no_grad():
        probabilities = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    nucleus = {*tokens[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist()}
    made = HfEngine(policy).generate([prompt], 500, SamplingParams(1.0, 0.5, 1), seed=1)
    assert {completion.token_ids[0] for completion in made[0]} <= nucleus


def test_what_the_model_ships_for_generation_changes_nothing_but_its_ends(tmp_path):
    write_tiny_policy(tmp_path)
    plain = load_policy(PolicyConfig(model=str(tmp_path), device="cpu"))
    path = tmp_path / "generation_config.json"
    shipped = {"top_k": 3, "temperature": 0.1, "repetition_penalty": 3.0, "min_p": 0.5, "suppress_tokens": [20, 21]}
    path.write_text(json.dumps(json.loads(path.read_text()) | shipped | {"do_sample": True}))
    opinionated = load_policy(PolicyConfig(model=str(tmp_path), device="cpu"))
    prompts = prompts_of(plain)
    expected = HfEngine(plain).generate(prompts, 8, PARAMS, seed=2)
    assert HfEngine(opinionated).generate(prompts, 8, PARAMS, seed=2) == expected

    path.write_text(json.dumps({"eos_token_id": [2, 30]}))
    two_ends = load_policy(PolicyConfig(model=str(tmp_path), device="cpu"))
    assert two_ends.eos_token_ids == (2, 30)
    made = flat(HfEngine(two_ends).generate(prompts, 64, PARAMS, seed=2))
    assert {completion.token_ids[-1] for completion in made if completion.finished} == {2, 30}
    assert all(policy_end not in completion.token_ids[:-1] for completion in made for policy_end in (2, 30))


def test_an_engine_that_is_closed_waits_until_a_batch_in_work_has_ended(policy):
    with watched() as lock:
        engine = HfEngine(policy)
    closing = threading.Thread(target=engine.close)
    seen = []

    def in_work(*_) -> None:
        if not seen:
            closing.start()
            seen.append((lock.awaited.wait(timeout=60), closing.is_alive()))

    policy.model.register_forward_pre_hook(in_work)
    with pytest.raises(EngineError, match="the engine was closed"):
        engine.generate(prompts_of(policy), 2, PARAMS, seed=5)
    closing.join(timeout=60)
    assert (seen, closing.is_alive()) == ([(True, True)], False)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_of_their_own(policy, value, temperature):
    with torch.no_grad():
        policy.model.lm_head.weight[7] = value
    with pytest.raises(NonFiniteError):
        HfEngine(policy).generate(prompts_of(policy), 2, replace(PARAMS, temperature=temperature), seed=5)


def test_another_failure_of_the_model_is_not_dressed_up_as_one(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        HfEngine(policy).generate(prompts_of(policy), 2, PARAMS, seed=5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "mamba"])
def test_a_prompt_that_is_computed_once_is_answered_as_one_that_is_computed_for_each(name, tmp_path, monkeypatch):
    policy = policy_of((SHARING | OTHERS)[name], tmp_path)
    prompts = [*prompts_of(policy), [5]]
    expected = HfEngine(policy).generate(prompts, 8, PARAMS, seed=5)
    monkeypatch.setattr("node.engines.hf.LARGE", 0)
    repeated = []
    repeat = DynamicCache.batch_repeat_interleave
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", lambda *args: (repeated.append(args), repeat(*args)))
    assert HfEngine(policy).generate(prompts, 8, PARAMS, seed=5) == expected
    assert len(repeated) == (name != "mamba")


def test_pages_are_drawn_from_the_same_distribution_and_the_seed_decides(policy):
    """The continuous batching of a GPU, as far as a CPU runs it: each row is drawn apart, with the policy's odds."""
    engine, prompts = HfEngine(policy, paged=True), prompts_of(policy)
    attention, before = policy.model.config._attn_implementation, torch.random.get_rng_state()
    made = engine.generate(prompts, 24, PARAMS, seed=5)
    assert engine.generate(prompts, 24, PARAMS, seed=5) == made != engine.generate(prompts, 24, PARAMS, seed=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert policy.model.config._attn_implementation == attention
    assert engine._paged, "it did not have to fall back"
    for prompt, of_prompt in zip(prompts, made, strict=True):
        firsts = [completion.token_ids[0] for completion in of_prompt]
        with torch.no_grad():
            odds = policy.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        assert len(set(firsts)) > 5, "rows of one prompt do not begin alike"
        assert odds[firsts].mean() > 1.5 / len(odds)
    for one in flat(made):
        assert one.finished == (one.token_ids[-1] in policy.eos_token_ids)
        assert one.finished or len(one.token_ids) == 6
    greedy = replace(PARAMS, temperature=0.0)
    assert engine.generate(prompts, 1, greedy, seed=0) == HfEngine(policy).generate(prompts, 1, greedy, seed=0)


def test_a_model_that_trains_in_float32_and_computes_in_bfloat16_generates_by_a_copy_of_today(policy):
    policy = replace(policy, bf16=True)
    engine, prompts, greedy = HfEngine(policy, paged=True), prompts_of(policy), replace(PARAMS, temperature=0.0)
    first = engine.generate(prompts, 1, greedy, seed=0)
    with torch.no_grad():
        policy.model.lm_head.weight[policy.eos_token_ids[0]] = 100 * policy.model.lm_head.weight[7]
    assert engine.generate(prompts, 1, greedy, seed=0) == first
    engine.load(1)
    assert engine.generate(prompts, 1, greedy, seed=0) != first


def test_where_continuous_batching_fails_the_rows_come_by_the_other_way(policy, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(type(policy.model), "generate_batch", fails, raising=False)
    engine, prompts = HfEngine(policy, paged=True), prompts_of(policy)
    with capture_logs() as said:
        assert engine.generate(prompts, 4, PARAMS, seed=5) == HfEngine(policy).generate(prompts, 4, PARAMS, seed=5)
        engine.generate(prompts, 4, PARAMS, seed=5)
    assert [line["reason"] for line in said] == ["no kernel for this"]


def with_room_for(policy, rows, monkeypatch):
    """Let more rows at once fail; return the list of how many there were each time."""
    generate, seen = policy.model.generate, []

    def watched(**given):
        seen.append(len(given["input_ids"]))
        if seen[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(**given)

    monkeypatch.setattr(policy.model, "generate", watched)
    return seen


@pytest.mark.parametrize(("n", "rows", "expected"), [(4, 5, [12, 4, 4, 4]), (5, 3, [15, 5, *[2, 1, 2] * 3])])
def test_without_memory_for_all_rows_fewer_are_generated_at_once_from_then_on(policy, monkeypatch, n, rows, expected):
    seen = with_room_for(policy, rows, monkeypatch)
    engine, prompts = HfEngine(policy), prompts_of(policy)
    with capture_logs() as logs:
        made = engine.generate(prompts, n, PARAMS, seed=5)
    monkeypatch.undo()
    assert made == HfEngine(policy).generate(prompts, n, PARAMS, seed=5), "what is generated at once decides nothing"
    with_room_for(policy, rows, monkeypatch)
    assert seen == expected
    assert all(line["event"].startswith("out of memory: ") for line in logs) and logs
    told = len(logs)
    engine.generate(prompts, n, PARAMS, seed=5)
    assert max(seen[-3:]) <= rows and len(logs) == told


def test_without_memory_for_one_completion_the_line_says_what_to_set(policy, monkeypatch):
    with_room_for(policy, 0, monkeypatch)
    with pytest.raises(UserError, match=r"out of memory for one completion: bound texts by engine\.max_prompt_length"):
        HfEngine(policy).generate(prompts_of(policy), 1, PARAMS, seed=5)
