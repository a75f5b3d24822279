"""Checkpoint folders: whole or absent, newest kept, a full disk named."""

import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from node.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, remove_leftovers, save_checkpoint
from node.errors import UserError


def writes(text: str):
    def write(folder: Path) -> None:
        (folder / "model").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "state").write_text(text)

    return write


def rounds_in(folder: Path) -> list[int]:
    return [one.round for one in list_checkpoints(folder)]


def test_the_newest_is_found_by_number_and_the_oldest_go(tmp_path):
    for number in (8, 9, 10, 100):
        save_checkpoint(tmp_path, number, writes(str(number)), keep=3)
    assert rounds_in(tmp_path) == [9, 10, 100]
    assert latest_checkpoint(tmp_path) == Checkpoint(100, tmp_path / "checkpoint-100")
    assert (tmp_path / "checkpoint-100" / "deeper" / "state").read_text() == "100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-9"]


def test_there_is_none_before_the_first(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_round_that_is_done_again_replaces_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 3, writes("before"), keep=2)
    save_checkpoint(tmp_path, 3, writes("after"), keep=2)
    assert (tmp_path / "checkpoint-3" / "model").read_text() == "after"


def test_what_a_crash_left_is_neither_used_nor_kept(tmp_path):
    save_checkpoint(tmp_path, 3, writes("whole"), keep=2)
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
    save_checkpoint(tmp_path, 1, writes("whole"), keep=1)

    def fails(folder: Path) -> None:
        writes("half")(folder)
        raise error

    with pytest.raises(UserError, match="full: free some space"):
        save_checkpoint(tmp_path, 2, fails, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "model").read_text() == "whole"


def test_torch_drops_the_error_number_so_the_disk_is_asked(tmp_path, monkeypatch):
    def fails(folder: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, 2, fails, keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("node.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="full"):
        save_checkpoint(tmp_path, 2, fails, keep=1)


def test_another_failure_is_not_dressed_up_and_leaves_nothing(tmp_path):
    def fails(folder: Path) -> None:
        writes("half")(folder)
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path, 2, fails, keep=1)
    assert list(tmp_path.iterdir()) == []
