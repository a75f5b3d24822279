"""Checkpoint folders: whole or absent, newest kept, a full disk named."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from node.errors import UserError
from node.run import run_node
from node.training.checkpoint import (
    A_DAY,
    AT_ONCE,
    Checkpoint,
    Keep,
    Writes,
    begin_checkpoint,
    end_checkpoint,
    find_damage,
    has_optimiser,
    is_better,
    is_finite,
    latest_checkpoint,
    list_checkpoints,
    remove_leftovers,
    whole_checkpoint,
    write_score,
)
from tests.policies import tiny_policy
from tests.swarms import GRADED, small_config
from tests.training import fixed_rounds, mixed_samples, node_config, trainer_of


def writes(text: str):
    def write(folder: Path) -> None:
        (folder / "model").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "state").write_text(text)

    return write


def save_checkpoint(folder: Path, round_number: int, write: Callable[[Path], None], keep: Keep) -> None:
    end_checkpoint(begin_checkpoint(folder, round_number, lambda _: None), write, keep)


def rounds_in(folder: Path) -> list[int]:
    return [checkpoint.round for checkpoint in list_checkpoints(folder)]


def test_the_newest_is_found_by_number_and_the_oldest_go(tmp_path):
    for number in (8, 9, 10, 100):
        save_checkpoint(tmp_path, number, writes(str(number)), keep=Keep(3, 3))
    assert rounds_in(tmp_path) == [9, 10, 100]
    assert latest_checkpoint(tmp_path) == Checkpoint(100, tmp_path / "checkpoint-100")
    assert (tmp_path / "checkpoint-100" / "deeper" / "state").read_text() == "100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-9"]


@pytest.mark.parametrize(
    ("gigabytes", "seconds", "written"),
    [
        (0.001, 60, 1440),  # adapters: all that were asked for
        (7.2, 60, 141),  # 0.6 B weights, all trained: one in ten minutes
        (98, 3600, 8),  # 8 B
    ],
)
def test_checkpoints_write_at_most_a_terabyte_a_day_after_the_first_ones(
    gigabytes: float, seconds: int, written: int
) -> None:
    now, count = 0, 0
    bound = Writes(clock=lambda: now)
    while now < 86400:
        if bound.allow():
            bound.note(int(gigabytes * 10**9))
            count += 1
        now += seconds
    assert count == written
    assert count * gigabytes * 10**9 <= AT_ONCE + A_DAY


def test_checkpoints_that_would_write_too_much_are_left_out_but_for_the_last_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0}}
    config = small_config(11, **alone, tasks=GRADED, trainer={"save_steps": 2})
    monkeypatch.setattr("node.training.checkpoint.AT_ONCE", 0)
    monkeypatch.setattr("node.training.checkpoint.A_DAY", 1)
    with capture_logs() as said:
        run_node(config, tmp_path / "node")
    assert rounds_in(tmp_path / "node" / "checkpoints") == [2, 11]
    assert len([line for line in said if "checkpoints are left out" in line["event"]]) == 1
    monkeypatch.undo()
    run_node(config, tmp_path / "other")
    assert rounds_in(tmp_path / "other" / "checkpoints") == [10, 11]


def test_there_is_none_before_the_first(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_round_that_is_done_again_replaces_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 3, writes("before"), keep=Keep(2, 2))
    save_checkpoint(tmp_path, 3, writes("after"), keep=Keep(2, 2))
    assert (tmp_path / "checkpoint-3" / "model").read_text() == "after"


def test_what_a_crash_left_is_neither_used_nor_kept(tmp_path):
    save_checkpoint(tmp_path, 3, writes("whole"), keep=Keep(2, 2))
    for name in (".writing-4", ".deleting-2", "checkpoint-5.tmp"):
        (tmp_path / name).mkdir()
    assert rounds_in(tmp_path) == [3]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-5.tmp"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["full", "quota", "safetensors"])
def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_stays(tmp_path, error):
    save_checkpoint(tmp_path, 1, writes("whole"), keep=Keep(1, 1))

    def fails(folder: Path) -> None:
        writes("half")(folder)
        raise error

    with pytest.raises(UserError, match="full: free some space"):
        save_checkpoint(tmp_path, 2, fails, keep=Keep(1, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "model").read_text() == "whole"


def test_torch_drops_the_error_number_so_the_disk_is_asked(tmp_path, monkeypatch):
    def fails(folder: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, 2, fails, keep=Keep(1, 1))
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("node.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="full"):
        save_checkpoint(tmp_path, 2, fails, keep=Keep(1, 1))


def test_another_failure_is_not_dressed_up_and_leaves_nothing(tmp_path):
    def fails(folder: Path) -> None:
        writes("half")(folder)
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path, 2, fails, keep=Keep(1, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of rounds 1 to 3 as the trainer writes them."""
    folder = tmp_path_factory.mktemp("run")
    policy = tiny_policy(folder / "policy")
    config = node_config(rounds=3, save_steps=1, save_total_limit=3)
    trainer_of(policy, config, folder, fixed_rounds(*[mixed_samples(policy)] * 3)).train()
    return folder / "checkpoints"


@pytest.fixture
def three(written: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_finite(path: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, path, {"format": "pt"})


DAMAGE = [
    ("model.safetensors", not_finite),
    *((name, Path.unlink) for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
    *((name, empty) for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
    *((name, cut) for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")),
    ("trainer_state.json", Path.unlink),
    ("trainer_state.json", lambda path: path.write_text("[]")),
    ("optimizer.pt", lambda path: path.write_text("text")),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_that_is_whole(three, name, damage):
    assert [find_damage(checkpoint.path) for checkpoint in list_checkpoints(three)] == ["", "", ""]
    damage(three / "checkpoint-3" / name)
    assert name in find_damage(three / "checkpoint-3")
    assert whole_checkpoint(three) == Checkpoint(2, three / "checkpoint-2")


def test_older_ones_keep_their_weights_alone(tmp_path):
    policy = tiny_policy(tmp_path / "policy")
    config = node_config(rounds=3, save_steps=1, save_total_limit=3, save_full=1)
    trainer_of(policy, config, tmp_path, fixed_rounds(*[mixed_samples(policy)] * 3)).train()
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    assert [has_optimiser(checkpoint.path) for checkpoint in checkpoints] == [False, False, True]
    assert [find_damage(checkpoint.path) for checkpoint in checkpoints] == ["", "", ""]
    assert whole_checkpoint(tmp_path / "checkpoints") == checkpoints[2]
    empty(checkpoints[2].path / "optimizer.pt")
    assert whole_checkpoint(tmp_path / "checkpoints") == checkpoints[1]
    empty(checkpoints[1].path / "model.safetensors")
    assert whole_checkpoint(tmp_path / "checkpoints") == checkpoints[0]


def test_a_disk_too_full_for_the_mark_of_weights_alone_costs_no_optimiser(three, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("node.training.checkpoint.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(three, 4, writes("4"), keep=Keep(4, 1))
    assert [find_damage(checkpoint.path) for checkpoint in list_checkpoints(three)[:3]] == ["", "", ""]


def test_going_on_from_weights_alone_keeps_the_schedule_and_the_round(tmp_path):
    policy = tiny_policy(tmp_path / "policy")
    config = node_config(rounds=4, save_steps=1, save_full=1, lr_scheduler_type="linear", learning_rate=0.01)
    rounds = fixed_rounds(*[mixed_samples(policy)] * 4)
    trainer_of(policy, config, tmp_path, rounds).train()
    weights_alone = tmp_path / "checkpoints" / "checkpoint-3"
    policy = tiny_policy(tmp_path / "policy")
    logged = []
    trainer = trainer_of(policy, config, tmp_path, rounds, lambda number, logs: logged.append((number, logs)))
    trainer.train(resume_from_checkpoint=str(weights_alone))
    ((number, logs),) = logged
    assert number == 4
    assert logs["learning_rate"] == pytest.approx(0.01 / 4)


def test_all_damaged_is_one_line_that_names_folder_and_damage(three):
    for number in (1, 2, 3):
        empty(three / f"checkpoint-{number}" / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-3: optimizer.pt cannot be read.*begin at round 0") as caught:
        whole_checkpoint(three)
    assert str(three) in str(caught.value)
    assert whole_checkpoint(three / "absent") is None


def test_what_a_damaged_one_left_behind_goes_with_the_next_that_is_saved(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, writes(str(number)), keep=Keep(3, 3))
    save_checkpoint(tmp_path, 2, writes("again, as 3 is damaged"), keep=Keep(1, 1))
    assert rounds_in(tmp_path) == [2]


def test_adapters_are_weights_too(tmp_path):
    policy = tiny_policy(tmp_path / "policy", lora=4)
    trainer_of(policy, node_config(rounds=1, save_steps=1), tmp_path, fixed_rounds(mixed_samples(policy))).train()
    assert find_damage(tmp_path / "checkpoints" / "checkpoint-1") == ""
    not_finite(tmp_path / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    assert re.fullmatch(
        r"adapter_model\.safetensors cannot be read \(base_model\.\S+lora\S+ is not finite\)",
        find_damage(tmp_path / "checkpoints" / "checkpoint-1"),
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", "float64", "int64"])
def test_numbers_of_any_kind_are_looked_at_in_slices(dtype, monkeypatch):
    monkeypatch.setattr("node.training.checkpoint.SLICE", 5)
    numbers = torch.full((4, 4), 1e300 if dtype == "float64" else 1.0, dtype=torch.float64)
    assert is_finite(numbers.to(getattr(torch, dtype)))
    if dtype != "int64":
        numbers[3, 2] = float("nan")
        assert not is_finite(numbers.to(getattr(torch, dtype)))
    assert is_finite(numbers[:0].to(getattr(torch, dtype)))


def scoring(accuracy: float, reward: float = 0.0):
    def write(folder: Path) -> None:
        writes(str(accuracy))(folder)
        write_score(folder, {"accuracy": accuracy, "reward": reward, "questions": 4})

    return write


def test_the_best_by_evaluation_is_kept_and_has_a_name(tmp_path):
    for number, write in enumerate([writes("no score"), scoring(0.5), scoring(0.5), scoring(0.25), writes("")], 1):
        save_checkpoint(tmp_path, number, write, keep=Keep(1, 1))
    assert rounds_in(tmp_path) == [2, 5]
    assert (tmp_path / "best").readlink() == Path("checkpoint-2")
    assert is_better({"accuracy": 0.5, "reward": 0.1}, tmp_path)
    assert not is_better({"accuracy": 0.5, "reward": 0.0}, tmp_path)
    save_checkpoint(tmp_path, 6, scoring(0.5, reward=0.1), keep=Keep(1, 1))
    assert (rounds_in(tmp_path), (tmp_path / "best").readlink()) == ([6], Path("checkpoint-6"))
    save_checkpoint(tmp_path, 4, writes("again, as 6 is damaged"), keep=Keep(1, 1))
    assert (rounds_in(tmp_path), (tmp_path / "best").is_symlink()) == ([4], False)


def test_a_node_may_keep_no_optimiser_at_all(tmp_path):
    policy = tiny_policy(tmp_path / "policy")
    config = node_config(rounds=2, save_steps=1, save_full=0, lr_scheduler_type="linear", learning_rate=0.01)
    rounds = fixed_rounds(*[mixed_samples(policy)] * 2)
    trainer_of(policy, config, tmp_path, rounds).train()
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    assert [(has_optimiser(checkpoint.path), find_damage(checkpoint.path)) for checkpoint in checkpoints] == [
        (False, "")
    ] * 2
    trainer = trainer_of(policy, config, tmp_path, rounds)
    trainer.train(resume_from_checkpoint=str(checkpoints[0].path))
    assert trainer.rounds_done == 2
