"""The update at TRL's seam, against a loss written independently of it."""

import dataclasses
import errno
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from threading import Event

import pytest
import torch
from structlog.testing import capture_logs
from transformers import TrainerCallback
from trl import GRPOConfig

from node.config import PASSED, TRL_OPTIONS, parse_config
from node.engines import SamplingParams
from node.engines.hf import HfEngine
from node.errors import DivergedError, UserError
from node.policy.load import Policy
from node.rollouts.rule import Sample
from node.tasks import Item
from node.training.batch import make_batches
from node.training.checkpoint import list_checkpoints
from node.training.trainer import SwarmTrainer
from tests.grpo_oracle import clipped_fraction, completion_logps, drawn, round_loss
from tests.policies import tiny_policy
from tests.training import FULL_WEIGHT, fixed_rounds, mixed_samples, node_config, trainer_of

CLIPPED = [(loss_type, "token") for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo")]
LOSSES = [*CLIPPED, ("sapo", "token"), ("vespo", "token"), ("luspo", "sequence"), ("grpo", "sequence")]
Named = dict[str, torch.Tensor]


@pytest.fixture
def policy(tmp_path) -> Policy:
    return tiny_policy(tmp_path / "policy")


class Watch(TrainerCallback):
    """Keeps the weights before each optimiser step and the gradients that it is taken with."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.weights: list[Named] = []
        self.gradients: list[Named] = []

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.weights.append({name: weight.detach().clone() for name, weight in named})
        self.gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def train(policy, config, folder, *rounds: Sequence[Sample]) -> tuple[Watch, list[dict[str, float]]]:
    logged = []
    trainer = trainer_of(policy, config, folder, fixed_rounds(*rounds), lambda _, logs: logged.append(dict(logs)))
    watch = Watch(policy.model)
    trainer.add_callback(watch)
    trainer.train()
    return watch, logged


def oracle(policy, config, rows, weights: Named, old_weights: Named) -> tuple[float, Named, float]:
    """Loss, gradients and clipped fraction of a round at `weights`, clipped against `old_weights`."""
    model, temperature, options = policy.model, config.engine.temperature, config.trainer.options
    model.load_state_dict(old_weights, strict=False)
    with torch.no_grad():
        old = [completion_logps(model, row, temperature) for row in rows]
    model.load_state_dict(weights, strict=False)
    model.zero_grad()
    new = [completion_logps(model, row, temperature) for row in rows]
    advantages = [row.advantage for row in rows]
    longest, level = config.engine.max_completion_length, options.importance_sampling_level
    cap = options.vllm_importance_sampling_clip_max
    corrections = [
        torch.ones(len(saved))
        if row.logprobs is None
        else (saved - torch.tensor(row.logprobs)[drawn(row)]).exp().clamp(max=cap)
        for row, saved in zip(rows, old, strict=True)
    ]
    low, high = config.trainer.trl.get("epsilon", GRPOConfig.epsilon), options.epsilon_high
    loss = round_loss(new, old, rows, FULL_WEIGHT, options.loss_type, low, high, longest, level, corrections)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.item(), gradients, clipped_fraction(new, old, advantages, low, high)


def assert_same(found: Named, expected: Named) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / scale
        assert error < 2e-5, f"{name}: off by {error:.1e} of the largest gradient"


@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
@pytest.mark.parametrize("budget", [4096, 60, 1])
def test_gradient_and_loss_are_the_oracles_however_the_round_is_split(policy, tmp_path, loss_type, level, budget):
    config = node_config(
        rounds=1, loss_type=loss_type, importance_sampling_level=level, tokens_per_batch=budget, temperature=0.8
    )
    samples = mixed_samples(policy)

    watch, logged = train(policy, config, tmp_path, samples)

    rows = samples
    assert sum(row.advantage == 0 for row in rows) == 3  # the oracle sees the rows that we leave out
    loss, gradients, _ = oracle(policy, config, rows, watch.weights[0], watch.weights[0])
    assert_same(watch.gradients[0], gradients)
    assert logged[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_a_second_iteration_is_clipped_against_the_policy_before_the_first(policy, tmp_path, loss_type, level):
    config = node_config(
        rounds=1,
        loss_type=loss_type,
        importance_sampling_level=level,
        num_iterations=2,
        tokens_per_batch=60,
        learning_rate=0.02 if level == "token" else 0.002,  # a whole sequence is clipped sooner
    )
    samples = mixed_samples(policy)

    watch, _ = train(policy, config, tmp_path, samples)

    _, first, none_clipped = oracle(policy, config, samples, watch.weights[0], watch.weights[0])
    assert none_clipped == 0
    assert_same(watch.gradients[0], first)
    _, second, some_clipped = oracle(policy, config, samples, watch.weights[1], watch.weights[0])
    assert 0.1 < some_clipped < 0.9
    assert_same(watch.gradients[1], second)


def sampled_elsewhere(policy: Policy) -> list[Sample]:
    """Rows whose sampler was off by up to a nat a token, and those of peers, of whom nothing is known."""
    rng = random.Random(1)
    rows = []
    for row in mixed_samples(policy):
        with torch.no_grad():
            exact = iter(completion_logps(policy.model, row, 1.0).tolist())
        known = [next(exact) + rng.uniform(-1.2, 1.2) if is_drawn else math.nan for is_drawn in drawn(row)]
        rows.append(row if row.external else replace(row, logprobs=known))
    return rows


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_tokens_are_weighted_by_the_trainers_probability_over_the_samplers_up_to_a_bound(
    policy, tmp_path, loss_type, iterations
):
    config = node_config(
        rounds=1, loss_type=loss_type, num_iterations=iterations, tokens_per_batch=60, learning_rate=0.02
    )
    rows = sampled_elsewhere(policy)
    assert {row.logprobs is None for row in rows} == {True, False}

    watch, logged = train(policy, config, tmp_path, rows)

    for at in range(iterations):
        _, gradients, _ = oracle(policy, config, rows, watch.weights[at], watch.weights[0])
        assert_same(watch.gradients[at], gradients)
    _, plain, _ = oracle(policy, config, [replace(row, logprobs=None) for row in rows], *[watch.weights[0]] * 2)
    with pytest.raises(AssertionError):
        assert_same(watch.gradients[0], plain)
    assert 0.2 < logged[0]["sampling/sampling_logp_difference/mean"] < 1
    least, mean, most = (logged[0][f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max"))
    assert 0.3 < least < mean < most < 3.4, "each is a mean over micro-batches"


def test_without_the_correction_the_samplers_probabilities_do_not_matter(policy, tmp_path):
    config = node_config(rounds=1, vllm_importance_sampling_correction=False)
    rows = sampled_elsewhere(policy)
    watch, logged = train(policy, config, tmp_path, rows)
    unweighted = [replace(row, logprobs=None) for row in rows]
    _, gradients, _ = oracle(policy, config, unweighted, watch.weights[0], watch.weights[0])
    assert_same(watch.gradients[0], gradients)
    assert not [key for key in logged[0] if key.startswith("sampling/")]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_truncated_completion_is_masked_and_its_row_counts(policy, tmp_path, loss_type):
    config = node_config(rounds=1, loss_type=loss_type, mask_truncated_completions=True, tokens_per_batch=60)
    rows = mixed_samples(policy)
    masked = [row if row.completion[-1] in policy.eos_token_ids else row.without_tokens() for row in rows]
    assert 3 < sum(not row.completion for row in masked) < len(rows) - 3

    watch, _ = train(policy, config, tmp_path, rows)

    _, gradients, _ = oracle(policy, config, masked, watch.weights[0], watch.weights[0])
    assert_same(watch.gradients[0], gradients)


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"trainer": {"entropy_coef": 0.1}}, "entropy_coef of TRL is left out: it pulls at completions"),
        ({"trainer": {"trl": {"entropy_coef": 0.1}}}, "'trainer.trl': entropy_coef of TRL is left out: it pulls at"),
        ({"trainer": {"trl": {"use_adaptive_entropy": True}}}, "a round without signal is no step"),
        ({"trainer": {"trl": {"top_entropy_quantile": 0.2}}}, "must not depend on how a round is split"),
        ({"trainer": {"gradient_accumulation_steps": 2}}, "tokens_per_batch splits a round"),
        ({"trainer": {"trl": {"loss_type": "luspo"}}}, "loss_type='luspo' wants importance_sampling_level='sequence'"),
        ({"trainer": {"trl": {"lose_type": "grpo"}}}, "'lose_type' is no option of it: did you mean 'loss_type'?"),
        ({"trainer": {"trl": {"beta": 0.1}}}, "beta of TRL is left out: no reference model is kept"),
        ({"trainer": {"trl": {"epsilon": 0}}}, "'trainer.trl': epsilon: Input should be greater than 0"),
        ({"trainer": {"trl": {"learning_rate": 1e-5}}}, "a setting of its own: set trainer.learning_rate"),
        ({"trainer": {"lose_type": "grpo"}}, "did you mean 'trainer.trl.loss_type'?"),
        ({"engine": {"kind": "vllm", "top_p": 0.9}}, "top_p=0.9 cuts the distribution"),
    ],
)
def test_what_would_not_do_as_it_says_is_refused_in_a_line(tree, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        parse_config(tree)


UNCORRECTED = {"vllm_importance_sampling_correction": False}


def test_an_option_of_trls_is_one_in_trl_too():
    assert set(TRL_OPTIONS) <= {field.name for field in dataclasses.fields(GRPOConfig)}


def test_an_option_that_the_node_does_not_read_reaches_trl_as_it_is_and_else_has_trls_default(policy, tmp_path):
    given = {"delta": 1.5, "epsilon": 0.1, "adam_beta1": 0.8, "sapo_temperature_pos": 0.9, "weight_decay": 0.01}
    config = parse_config({"rounds": 1, "trainer": {"trl": given}})
    args = trainer_of(policy, config, tmp_path / "node", fixed_rounds()).args
    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert {name: getattr(args, name) for name in PASSED} == {name: getattr(plain, name) for name in PASSED} | given
    for bad, complaint in ({"epsilon": -1}, "epsilon: .* greater than 0"), ({"delta": "x"}, "delta: .* a valid number"):
        with pytest.raises(UserError, match=complaint):
            parse_config({"trainer": {"trl": bad}})


def test_top_p_is_no_trouble_without_the_ratio():
    parse_config({"engine": {"kind": "vllm", "top_p": 0.9}, "trainer": {"trl": UNCORRECTED}})
    parse_config({"engine": {"kind": "hf", "top_p": 0.9}})


def test_one_iteration_logs_no_clipping_and_the_entropy_of_the_policy(policy, tmp_path):
    config = node_config(rounds=1)
    samples = [sample for sample in mixed_samples(policy) if sample.advantage != 0]
    rows = samples
    entropies = []
    with torch.no_grad():
        for row in rows:
            logits = policy.model(input_ids=torch.tensor([[*row.prompt, *row.completion]])).logits
            logps = logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            entropies += (-(logps.exp() * logps).sum(-1))[drawn(row)].tolist()

    _, logged = train(policy, config, tmp_path, samples)

    assert logged[0]["clip_ratio/region_mean"] == 0
    assert logged[0]["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_what_stands_in_masked_places_does_not_matter(policy, tmp_path):
    config = node_config(rounds=1)
    trainer = trainer_of(policy, config, tmp_path, fixed_rounds())
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = make_batches(mixed_samples(policy), FULL_WEIGHT, 4096, "dapo", policy.pad_token_id)
    assert not batch["completion_mask"].all()
    policy.model.train()
    loss = trainer.compute_loss(policy.model, batch)

    scrawled = dict(batch)
    for part in ("prompt", "completion"):
        ids, mask = batch[f"{part}_ids"], batch[f"{part}_mask"]
        scrawled[f"{part}_ids"] = torch.where(mask == 1, ids, torch.full_like(ids, policy.eos_token_ids[0]))

    assert trainer.compute_loss(policy.model, scrawled).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_reencoded_text_has_the_tokens_and_logprobs_of_its_generation(policy, tmp_path, temperature, top_p):
    config = node_config(rounds=1, temperature=temperature)
    questions = ["1+2=", "a longer question", "7"]
    prompts = [policy.encode_prompt(Item(question, "")) for question in questions]
    made = HfEngine(policy).generate(prompts, 16, SamplingParams(temperature, top_p, 8), seed=3)
    special = {*policy.tokenizer.all_special_ids} - {*policy.eos_token_ids}  # a random policy draws them; text has none
    kept = [
        (prompt, completion)
        for prompt, of_prompt in zip(prompts, made, strict=True)
        for completion in of_prompt
        if not special & {*completion.token_ids}
    ]
    assert len(kept) > 20
    assert {completion.finished for _, completion in kept} == {True, False}
    kept.sort(key=lambda pair: -len(pair[0]) - len(pair[1].token_ids))  # as micro-batches have them
    samples = [Sample(prompt, policy.encode_completion(answer.text, answer.finished), 1.0) for prompt, answer in kept]
    trainer = trainer_of(policy, config, tmp_path, fixed_rounds())

    (batch,) = make_batches(samples, FULL_WEIGHT, 4096, "dapo", policy.pad_token_id)
    logps = trainer._with_old_logps(batch)["old_per_token_logps"]

    for row, (prompt, saved) in enumerate(kept):
        length = len(saved.token_ids)
        sampled = completion_logps(policy.model, Sample(prompt, saved.token_ids, 1.0), temperature).tolist()
        assert batch["completion_ids"][row, :length].tolist() == list(saved.token_ids)
        assert int(batch["completion_mask"][row].sum()) == length
        assert logps[row, :length].tolist() == pytest.approx(sampled, abs=1e-4)


def test_the_loop_is_not_resumed_before_the_update_and_its_log(policy, tmp_path):
    config = node_config(rounds=3, num_iterations=2, tokens_per_batch=60, save_steps=1)
    events = []

    def rounds(done):
        for number in range(done, config.rounds):
            events.append(("draw", number + 1, trainer.state.global_step))
            yield mixed_samples(policy, seed=number)

    trainer = trainer_of(policy, config, tmp_path, rounds, lambda number, _: events.append(("updated", number)))
    trainer.train()

    assert events == [
        ("draw", 1, 0),
        ("updated", 1),
        ("draw", 2, 2),
        ("updated", 2),
        ("draw", 3, 4),
        ("updated", 3),
    ]


@pytest.mark.parametrize("lora", [0, 4])
def test_training_goes_on_while_a_checkpoint_is_written_of_the_weights_as_they_were(tmp_path, lora, monkeypatch):
    policy = tiny_policy(tmp_path / "policy", lora=lora)
    config, began, drawn, states = node_config(rounds=3, save_steps=1, learning_rate=0.01), Event(), Event(), []
    write = SwarmTrainer._write_large

    def slow(self, number, state, folder):
        began.set()
        assert drawn.wait(30)
        write(self, number, state, folder)

    def rounds(done):
        yield mixed_samples(policy)
        assert began.wait(30) and list_checkpoints(tmp_path / "checkpoints") == []
        yield mixed_samples(policy)
        drawn.set()  # the second checkpoint waits for the first
        yield mixed_samples(policy)

    def on_update(number, logs):
        states.append(frozen(trainer.optimizer.state_dict()["state"]))
        if number == 2:
            drawn.set()

    monkeypatch.setattr(SwarmTrainer, "_write_large", slow)
    trainer = trainer_of(policy, config, tmp_path, rounds, on_update)
    trainer.train()
    written = list_checkpoints(tmp_path / "checkpoints")
    assert [saved.round for saved in written] == [2, 3]  # all is written when training has ended
    for saved, state in zip(written, states[1:], strict=True):
        assert frozen(torch.load(saved.path / "optimizer.pt", weights_only=True)["state"]) == state


@pytest.mark.parametrize("lora", [0, 4])
def test_a_checkpoint_has_the_files_that_transformers_writes(tmp_path, lora):
    policy = tiny_policy(tmp_path / "policy", lora=lora)
    trainer = trainer_of(policy, node_config(rounds=1, save_steps=1), tmp_path, fixed_rounds(mixed_samples(policy)))
    trainer.train()
    trainer.save_model(str(tmp_path / "theirs"), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(tmp_path / "theirs"))
    ours = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "checkpoint-1").iterdir()}
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert {name for name in theirs if ours.get(name) != theirs[name]} == set()
    assert ours.keys() - theirs.keys() == {"rng_state.pth", "trainer_state.json"}


def test_a_checkpoint_that_cannot_be_written_ends_the_run(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(SwarmTrainer, "_write_large", fails)
    trainer = trainer_of(policy, node_config(rounds=1, save_steps=1), tmp_path, fixed_rounds(mixed_samples(policy)))
    with pytest.raises(UserError, match="full: free some space"):
        trainer.train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def fails(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_memory_is_short_a_checkpoint_is_written_in_place(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("node.training.snapshot.available_memory", lambda: 1000)
    rounds = fixed_rounds(*[mixed_samples(policy)] * 2)
    seen = []

    def on_update(number, logs):
        seen.append([checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")])

    trainer_of(policy, node_config(rounds=2, save_steps=1), tmp_path, rounds, on_update).train()
    assert seen == [[], [1]]


def test_a_stop_between_the_iterations_of_a_round_saves_nothing_of_it(policy, tmp_path):
    config = node_config(rounds=3, num_iterations=2, save_steps=1)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                control.should_training_stop = control.should_save = True
            return control

    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(*[mixed_samples(policy)] * 3))
    trainer.add_callback(Stop())
    trainer.train()

    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]
    state = json.loads((tmp_path / "checkpoints/checkpoint-1/trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_without_a_last_round_it_trains_until_it_is_stopped_and_goes_on_from_there(policy, tmp_path, monkeypatch):
    config = node_config(rounds=None, save_steps=2)
    seen = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = control.should_save = len(seen) % 3 == 2
            return control

    def run(checkpoint=None):
        rounds = fixed_rounds(*[mixed_samples(policy, seed=number) for number in range(9)])
        trainer = trainer_of(policy, config, tmp_path, rounds, lambda number, logs: seen.append((number, logs)))
        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=checkpoint)

    run()
    warned = []
    monkeypatch.setattr("transformers.trainer.logger.warning", warned.append)
    run(str(tmp_path / "checkpoints/checkpoint-3"))
    assert not [line for line in warned if "missing keys" in line]  # the tied weights are in the file once

    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {logs["learning_rate"] for _, logs in seen} == {config.trainer.learning_rate}
    assert (tmp_path / "checkpoints/checkpoint-6").is_dir()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_what_is_set_now_holds_and_not_what_a_checkpoint_was_trained_with(policy, tmp_path, schedule):
    rounds = fixed_rounds(*[mixed_samples(policy, seed=number) for number in range(4)])
    trainer_of(policy, node_config(rounds=2, save_steps=1, learning_rate=1e-3), tmp_path, rounds).train()
    now = {"learning_rate": 1e-5, "weight_decay": 0.5, "adam_beta2": 0.5}
    trainer = trainer_of(policy, node_config(rounds=4, lr_scheduler_type=schedule, **now), tmp_path, rounds)
    steps = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, optimizer, **__):
            steps.append([{**group, "params": None} for group in optimizer.param_groups])
            moments = [state["exp_avg"] for state in optimizer.state.values()]
            assert moments and all(moment.any() for moment in moments)  # as they were

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))
    expected = [1e-5, 1e-5] if schedule == "constant" else [1e-5 * 2 / 4, 1e-5 * 1 / 4]
    for groups, rate in zip(steps, expected, strict=True):
        assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))
        assert {group["betas"] for group in groups} == {(0.9, 0.5)}
        assert {group["weight_decay"] for group in groups} == {0.5, 0.0}  # none of norms and biases


def test_a_node_that_goes_on_saves_as_often_as_is_set_now(policy, tmp_path):
    rounds = fixed_rounds(*[mixed_samples(policy)] * 5)
    trainer_of(policy, node_config(rounds=2, save_steps=2), tmp_path, rounds).train()
    trainer = trainer_of(policy, node_config(rounds=5, save_steps=1, save_total_limit=9), tmp_path, rounds)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"checkpoint-{n}" for n in (2, 3, 4, 5)}


def test_rounds_of_another_number_of_updates_are_not_gone_on_from(policy, tmp_path):
    rounds = fixed_rounds(*[mixed_samples(policy)] * 4)
    trainer_of(policy, node_config(rounds=2, save_steps=1, num_iterations=2), tmp_path, rounds).train()
    trainer = trainer_of(policy, node_config(rounds=4, num_iterations=1), tmp_path, rounds)
    with pytest.raises(UserError, match=r"2 rounds had 2 updates each, and trainer\.num_iterations=1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))


def test_where_several_gpus_are_visible_one_is_used(policy, tmp_path, monkeypatch):
    """Asked for a device, transformers counts the GPUs that torch sees, and TRL takes no more than one."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("node.training.trainer.GRPOConfig", lambda **named: GRPOConfig(**named | {"use_cpu": False}))
    _, logged = train(policy, node_config(rounds=1), tmp_path, mixed_samples(policy))
    assert len(logged) == 1


def frozen(state):
    """Return the same with the bytes of each tensor."""
    if isinstance(state, torch.Tensor):
        return state.detach().numpy().tobytes()
    if isinstance(state, dict):
        return {key: frozen(value) for key, value in state.items()}
    return [frozen(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_round_without_signal_leaves_weights_optimiser_and_schedule_and_counts(policy, tmp_path, iterations):
    """Once it has begun, Adam's momentum would go on moving the weights, and decay and schedule with it."""
    config = node_config(
        rounds=5, weight_decay=0.1, lr_scheduler_type="linear", num_iterations=iterations, save_steps=1
    )
    some = mixed_samples(policy)
    silent = [replace(sample, advantage=0.0) for sample in some]
    without_tokens = [Sample([5], [], 1.0)]
    states, logged = [], []

    def on_update(number, logs):
        logged.append((number, logs["loss"], logs["learning_rate"]))
        weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
        states.append(frozen([weights, trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()]))

    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(some, silent, [], without_tokens, some), on_update)
    trainer.train()

    assert [number for number, _, _ in logged] == [1, 2, 3, 4, 5]
    assert states[0] == states[1] == states[2] == states[3] != states[4]
    assert [loss for _, loss, _ in logged[1:4]] == [0, 0, 0]
    rates = [rate for _, _, rate in logged]
    assert rates[0] > rates[1] == rates[2] == rates[3]
    assert rates[4] == pytest.approx(rates[3] - (0 if iterations == 1 else config.trainer.learning_rate / 10))
    assert (tmp_path / "checkpoints/checkpoint-5").is_dir()


def with_infinite_advantage(rows: Sequence[Sample]) -> list[Sample]:
    return [replace(row, advantage=math.inf) if at == 0 else row for at, row in enumerate(rows)]


@pytest.mark.parametrize(("what", "iterations"), [("loss", 1), ("gradient", 2)])
def test_a_step_that_is_not_finite_is_no_step_and_is_counted(policy, tmp_path, what, iterations):
    """Weights, optimiser and schedule are those before it, and the next rounds are as if it had not been."""
    config = node_config(
        rounds=3, weight_decay=0.1, lr_scheduler_type="linear", num_iterations=iterations, tokens_per_batch=60
    )
    first, second = mixed_samples(policy, groups=2), mixed_samples(policy, seed=1, groups=2)
    states, logged = [], []

    def on_update(number, logs):
        logged.append(dict(logs))
        weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
        states.append(frozen([weights, trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()]))

    def overflow(gradient):
        return gradient * math.inf if what == "gradient" and len(logged) == 1 else gradient

    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(first, first, second), on_update)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **named: (
        compute_loss(*args, **named) + (math.inf if what == "loss" and len(logged) == 1 else 0)
    )
    next(policy.model.parameters()).register_hook(overflow)
    trainer.train()

    assert states[0] == states[1] != states[2]
    assert [logs.get("nonfinite") for logs in logged] == [None, 1.0, None]
    assert [logs["loss"] == 0 for logs in logged] == [False, True, False]

    undisturbed = tiny_policy(tmp_path / "policy")
    _, without = train(undisturbed, config, tmp_path / "without", first, second)
    assert logged[2]["loss"] == without[1]["loss"]
    assert frozen(policy.model.state_dict()) == frozen(undisturbed.model.state_dict())


def test_eight_steps_in_a_row_that_are_not_finite_are_a_line_that_names_the_round_and_the_rate(policy, tmp_path):
    good = mixed_samples(policy, groups=1)
    bad = with_infinite_advantage(good)
    rounds = [*[bad] * 7, good, *[bad] * 8, good]
    with pytest.raises(DivergedError) as caught:
        train(policy, node_config(rounds=30, learning_rate=1e-6), tmp_path, *rounds)
    said = str(caught.value)
    assert said.startswith("training diverged in round 16: loss or gradients were not finite 8 times in a row; ")
    assert "lower trainer.learning_rate (it is 1e-06) and start again" in said and "\n" not in said


def test_weights_that_are_not_finite_are_not_written(policy, tmp_path):
    def spoil(number, logs):
        if number == 2:
            with torch.no_grad():
                next(policy.model.parameters())[0, 0] = math.nan

    rounds = fixed_rounds(*[mixed_samples(policy)] * 3)
    trainer = trainer_of(policy, node_config(rounds=3, save_steps=1), tmp_path, rounds, spoil)
    with pytest.raises(
        DivergedError, match=r"diverged in round 2: a weight is not finite; lower trainer\.learning_rate"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(("lora", "dtype"), [(0, "float32"), (4, "float32"), (4, "bfloat16"), (4, "float16")])
def test_a_small_rate_moves_every_weight_by_what_adam_intends(tmp_path, lora, dtype):
    """Adam's first step is the learning rate in each coordinate that has a gradient."""
    policy = tiny_policy(tmp_path / "policy", lora=lora, dtype=dtype)
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}

    watch, _ = train(policy, node_config(rounds=1, learning_rate=1e-6), tmp_path, mixed_samples(policy))

    moved = torch.cat([(weight.detach() - before[name]).flatten().double() for name, weight in trained.items()])
    intended = torch.cat([1e-6 * gradient.sign().flatten().double() for gradient in watch.gradients[0].values()])
    assert float(moved.norm() / intended.norm()) == pytest.approx(1, abs=0.05)


def test_small_gradients_come_through_a_base_in_float16(tmp_path):
    """Float16's least number is 6e-8, and the gradient of a token's logits is 1 over the tokens of a round."""
    gradients = {}
    for dtype in ("float32", "float16"):
        policy = tiny_policy(tmp_path / "policy", lora=4, dtype=dtype)
        assert {weight.dtype for weight in policy.model.parameters() if weight.requires_grad} == {torch.float32}
        samples = [replace(row, advantage=1e-6 * row.advantage) for row in mixed_samples(policy)]
        watch, _ = train(policy, node_config(rounds=1), tmp_path / dtype, samples)
        gradients[dtype] = torch.cat([gradient.flatten() for gradient in watch.gradients[0].values()])
    off = (gradients["float16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert float(off) < 0.02


def test_weights_that_such_a_step_would_not_reach_are_refused():
    with pytest.raises(UserError, match=r"is for weights beneath adapters: set policy\.lora\.r=16"):
        parse_config({"policy": {"dtype": "nf4"}})
    with pytest.raises(UserError, match=r"set engine\.kind='hf', or policy\.dtype='bfloat16'"):
        parse_config({"policy": {"dtype": "nf4", "lora": {"r": 4}}, "engine": {"kind": "vllm"}})
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(UserError, match=rf"policy\.dtype='{dtype}' rounds away"):
            parse_config({"policy": {"dtype": dtype}})
        parse_config({"policy": {"dtype": dtype, "lora": {"r": 4}}})


def surprise_of(policy, row) -> float:
    with torch.no_grad():
        return -float(completion_logps(policy.model, row, 1.0).mean())


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_surprise_of_peers_tokens_is_their_mean_before_the_round(policy, tmp_path, iterations):
    samples = mixed_samples(policy, groups=5)
    theirs = [row for row in samples if row.external and row.advantage != 0]
    tokens = sum(row.sampled for row in theirs)
    expected = sum(surprise_of(policy, row) * row.sampled for row in theirs) / tokens
    alone = [replace(row, external=False) for row in samples]

    config = node_config(rounds=2, num_iterations=iterations, learning_rate=0.05, tokens_per_batch=60)
    _, logged = train(policy, config, tmp_path, samples, alone)

    assert logged[0]["swarm/surprise"] == pytest.approx(expected, rel=1e-4)
    assert "swarm/surprise" not in logged[1]


def test_dropout_is_off(policy, tmp_path):
    """The tiny policy's attention has dropout: two passes in training mode agree only without it."""
    trainer = trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds())
    policy.model.train()
    (batch,) = make_batches(mixed_samples(policy), FULL_WEIGHT, 4096, "dapo", policy.pad_token_id)
    one, other = (trainer._with_old_logps(batch)["old_per_token_logps"] for _ in range(2))
    assert torch.equal(one, other)


def test_lora_trains_adapters_only_and_agrees_with_the_oracle(tmp_path):
    policy = tiny_policy(tmp_path / "policy", lora=4)
    base = {name: weight.clone() for name, weight in policy.model.state_dict().items() if "lora" not in name}
    config = node_config(rounds=2, learning_rate=0.01)
    samples = mixed_samples(policy)

    watch, _ = train(policy, config, tmp_path, samples, samples)

    trained = policy.model.state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in base.items())
    assert all("lora" in name for name in watch.gradients[0])
    rows = samples
    _, gradients, _ = oracle(policy, config, rows, watch.weights[1], watch.weights[1])
    assert_same(watch.gradients[1], gradients)


def test_a_missing_reporting_package_is_a_clear_error(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("node.policy.detection.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gossamer\[tensorboard\]"):
        trainer_of(policy, node_config(report_to=["tensorboard"]), tmp_path, fixed_rounds())


GPU_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
MACHINE_IS_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


class Room:
    """Memory for passes over so many tokens: a larger one fails, in its "forward" or "backward" pass, or where
    "old log-probabilities" are asked for."""

    def __init__(self, trainer: SwarmTrainer, tokens: int, where: str, error: Exception) -> None:
        self.error, self.failures, self.passes = error, 0, 0
        forward = trainer._forward
        layer = next(weight for weight in trainer.model.parameters() if weight.requires_grad)

        def watched(model: torch.nn.Module, ids: torch.Tensor, *args: object, **named: object) -> object:
            self.full = ids.numel() > tokens
            found = forward(model, ids, *args, **named)
            self.passes += 1
            if self.full and where == ("forward" if torch.is_grad_enabled() else "old log-probabilities"):
                self.fail()
            return found

        trainer._forward = watched
        layer.register_hook(lambda _: self.fail() if self.full and where == "backward" else None)

    def fail(self) -> None:
        self.failures, self.passes = self.failures + 1, 0
        raise self.error


@pytest.mark.parametrize(
    ("where", "error", "loss_type", "iterations"),
    [
        ("forward", GPU_IS_FULL, "grpo", 1),
        ("backward", MACHINE_IS_FULL, "dapo", 1),
        ("backward", GPU_IS_FULL, "bnpo", 2),
        ("old log-probabilities", MACHINE_IS_FULL, "vespo", 2),
    ],
)
def test_without_memory_for_a_micro_batch_a_step_is_done_again_by_smaller_ones(
    policy, tmp_path, where, error, loss_type, iterations
):
    """Weights and logs are those of a run whose memory suffices, to float error."""
    rounds = [sampled_elsewhere(policy), mixed_samples(policy, seed=1)]
    config = node_config(rounds=2, loss_type=loss_type, num_iterations=iterations)
    undisturbed = tiny_policy(tmp_path / "policy")
    _, expected = train(undisturbed, config, tmp_path / "undisturbed", *rounds)

    logged = []
    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(*rounds), lambda _, logs: logged.append(dict(logs)))
    room = Room(trainer, 40, where, error)

    class Counts(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            if trainer.state.global_step == 0 and where != "old log-probabilities":
                assert len(trainer._metrics["train"]["entropy"]) == len(trainer._surprise._nats) == room.passes > 3

    trainer.add_callback(Counts())
    with capture_logs() as lines:
        trainer.train()

    assert room.failures == 2, "halved twice, and the second round is within that"
    (line,) = [line for line in lines if "out of memory" in line["event"]]
    assert line["set"] == f"trainer.tokens_per_batch={trainer._budget}" and 15 < trainer._budget <= 40
    assert_same(dict(policy.model.named_parameters()), dict(undisturbed.model.named_parameters()))
    for row, other in zip(logged, expected, strict=True):
        assert row.keys() == other.keys()
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)
        assert row.get("swarm/surprise") == pytest.approx(other.get("swarm/surprise"), rel=1e-4)


def test_shared_prompts_too_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("node.training.trainer.LARGE", 0)
    one, other = tiny_policy(tmp_path / "one"), tiny_policy(tmp_path / "other")
    rows, config = mixed_samples(one), node_config(rounds=1)
    train(other, config, tmp_path / "b", rows)
    trainer = trainer_of(one, config, tmp_path / "a", fixed_rounds(rows))
    assert trainer._shares_prefixes
    room = Room(trainer, 40, "backward", GPU_IS_FULL)
    trainer.train()
    assert room.failures > 1 and trainer._budget < 40
    assert_same(dict(one.model.named_parameters()), dict(other.model.named_parameters()))


@pytest.mark.parametrize("where", ["backward", "old log-probabilities"])
@pytest.mark.parametrize(("lora", "says"), [(0, r"policy\.lora\.r=16"), (4, r"policy\.dtype=nf4")])
def test_without_memory_for_a_single_row_the_line_says_what_to_set(tmp_path, where, lora, says):
    policy = tiny_policy(tmp_path / "policy", lora=lora)
    rounds = fixed_rounds(mixed_samples(policy))
    trainer = trainer_of(policy, node_config(rounds=1, num_iterations=2), tmp_path, rounds)
    Room(trainer, 1, where, GPU_IS_FULL)
    one_row = rf"with one completion and its prompt at once \(\d+ tokens\): set .*{says}"
    with pytest.raises(UserError, match=one_row) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def test_an_optimiser_without_memory_is_a_line_and_the_last_checkpoint_holds(policy, tmp_path, monkeypatch):
    """Some weights may have moved, so nothing is done again in this process."""
    config = node_config(rounds=3, save_steps=1)
    rounds = [mixed_samples(policy, seed=seed) for seed in range(3)]
    undisturbed = tiny_policy(tmp_path / "policy")
    train(undisturbed, config, tmp_path / "undisturbed", *rounds)
    step = torch.optim.AdamW.step

    def third(optimizer, *args, **named):
        if trainer.rounds_done == 2:
            raise GPU_IS_FULL
        return step(optimizer, *args, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", third)
    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(*rounds))
    with pytest.raises(UserError, match=r"optimiser keeps 8 bytes for each trained weight.* from its last checkpoint"):
        trainer.train()
    monkeypatch.undo()
    again = trainer_of(policy, config, tmp_path, fixed_rounds(*rounds))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))
    assert frozen(policy.model.state_dict()) == frozen(undisturbed.model.state_dict())


def test_another_failure_of_a_pass_is_not_taken_for_one(policy, tmp_path):
    trainer = trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds(mixed_samples(policy)))
    Room(trainer, 60, "backward", RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.train()
