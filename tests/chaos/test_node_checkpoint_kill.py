"""SIGKILL at chosen moments of training, and the run goes on with the very numbers it would have had."""

import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from node.training.checkpoint import find_damage, has_optimiser, latest_checkpoint, list_checkpoints
from tests.commands import FORK
from tests.policies import tiny_policy
from tests.training import node_config, playing_rounds, trainer_of

ROUNDS = 6


def run(folder: Path, arm: Callable[[], None] = lambda: None, **options: int) -> None:
    """Train to the end from the newest checkpoint; generation depends on the weights, so nothing can hide."""
    torch.set_num_threads(1)
    policy = tiny_policy(folder.parent / "policy")
    config = node_config(ROUNDS, num_iterations=2, tokens_per_batch=60, learning_rate=0.01, save_steps=2, **options)

    def on_update(number: int, logs: dict[str, float]) -> None:
        with (folder / "losses").open("a") as file:
            file.write(json.dumps([number, logs["loss"].hex(), logs["grad_norm"].hex(), weights_hash(policy)]) + "\n")

    trainer = trainer_of(policy, config, folder, playing_rounds(policy, config), on_update)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    arm()
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)


def weights_hash(policy) -> str:
    digest = hashlib.sha256()
    for weight in policy.model.parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def in_child(folder: Path, arm: Callable[[], None] = lambda: None, **options: int) -> int:
    folder.mkdir(exist_ok=True)
    child = FORK.Process(target=run, args=(folder, arm), kwargs=options)
    child.start()
    child.join(timeout=60)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("training did not end")
    return child.exitcode


def die_at(target: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Make the process kill itself at the `call`-th call of `target` ("module.name"), before it or after it."""

    def arm() -> None:
        owner_name, _, name = target.rpartition(".")
        owner = resolve(owner_name)
        original = getattr(owner, name)
        calls = 0

        def counting(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counting)

    return arm


def die_while_writing() -> None:
    """Let the second checkpoint take for ever, and make the process kill itself in the round after it."""
    import node.training.checkpoint

    original, calls = node.training.checkpoint.sync_tree, itertools.count(1)

    def slow(folder: Path) -> None:
        original(folder)
        if next(calls) == 2:
            threading.Event().wait()

    node.training.checkpoint.sync_tree = slow
    die_at("HfEngine.generate", 5)()


def resolve(dotted: str):
    import node.engines.hf
    import node.training.checkpoint
    import node.training.trainer

    return {
        "checkpoint": node.training.checkpoint,
        "shutil": node.training.checkpoint.shutil,
        "Path": node.training.checkpoint.Path,
        "HfEngine": node.engines.hf.HfEngine,
        "SwarmTrainer": node.training.trainer.SwarmTrainer,
        "torch": torch,
        "AdamW": torch.optim.AdamW,
    }[dotted]


def losses(folder: Path) -> dict[int, list[str]]:
    """What each round logged; a round that was done twice must have logged the same twice."""
    seen: dict[int, list[str]] = {}
    for line in (folder / "losses").read_text().splitlines():
        number, *values = json.loads(line)
        assert seen.setdefault(number, values) == values, f"round {number} differs when it is done again"
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "state"
    assert in_child(folder) == 0
    return folder


MOMENTS = {
    "generating round 1": die_at("HfEngine.generate", 1),
    "generating round 4": die_at("HfEngine.generate", 4),
    "between the micro-batches of a step": die_at("SwarmTrainer.compute_loss", 4 * 3 + 2),
    "between the iterations of a round": die_at("AdamW.step", 2 * 4 + 1, after=True),
    "after the update of round 4, before its checkpoint": die_at("AdamW.step", 2 * 4, after=True),
    "when the first checkpoint lacks the model": die_at("SwarmTrainer._write_large", 1),
    "when the first checkpoint lacks the optimiser alone": die_at("torch.save", 4),
    "when the second checkpoint lacks the model": die_at("SwarmTrainer._write_large", 2),
    "when the second checkpoint lacks the optimiser alone": die_at("torch.save", 8),
    "generating round 5, while the second checkpoint is written": die_while_writing,
    "when all is written and nothing is synced": die_at("checkpoint.sync_tree", 2),
    "just before the rename": die_at("Path.rename", 2),
    "just after the rename": die_at("Path.rename", 2, after=True),
    "when an old checkpoint is set aside for deletion": die_at("Path.rename", 4, after=True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path, undisturbed, moment):
    state = tmp_path / "state"
    assert in_child(state, MOMENTS[moment]) == -signal.SIGKILL
    for checkpoint in list_checkpoints(state / "checkpoints"):
        assert find_damage(checkpoint.path) == ""  # what is listed is complete

    assert in_child(state) == 0

    assert losses(state) == losses(undisturbed)
    assert sorted(path.name for path in (state / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert_same_checkpoint(state / "checkpoints/checkpoint-6", undisturbed / "checkpoints/checkpoint-6")


@pytest.mark.slow
def test_killed_again_and_again_it_still_arrives(tmp_path, undisturbed):
    state = tmp_path / "state"
    for moment in (
        "when all is written and nothing is synced",
        "generating round 4",
        "between the iterations of a round",
    ):
        in_child(state, MOMENTS[moment])
    assert in_child(state) == 0
    assert losses(state) == losses(undisturbed)


@pytest.mark.parametrize(
    "arm",
    [
        die_at("checkpoint.write_atomically", 1),
        die_at("checkpoint.write_atomically", 1, after=True),
        die_at("Path.unlink", 1, after=True),
    ],
    ids=["before the mark", "after the mark", "after the file went"],
)
def test_killed_while_an_old_checkpoint_becomes_weights_alone_it_goes_on_with_the_same_numbers(
    tmp_path, undisturbed, arm
):
    state = tmp_path / "state"
    assert in_child(state, arm, save_full=1) == -signal.SIGKILL
    assert all(find_damage(checkpoint.path) == "" for checkpoint in list_checkpoints(state / "checkpoints"))

    assert in_child(state, save_full=1) == 0

    assert losses(state) == losses(undisturbed)
    assert [has_optimiser(checkpoint.path) for checkpoint in list_checkpoints(state / "checkpoints")] == [False, True]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    weights, expected = (load_file(path / "model.safetensors") for path in (one, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    moments, expected = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (one, other))
    for index, state in expected.items():
        assert all(torch.equal(moments[index][key], value) for key, value in state.items())


def test_a_finished_run_that_is_started_again_does_nothing(tmp_path, undisturbed):
    before = (undisturbed / "losses").read_text()
    assert in_child(undisturbed) == 0
    assert (undisturbed / "losses").read_text() == before
