"""A node's folder in one file and back: whole or not at all, and never two of one key."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from node.config import parse_config
from node.errors import UserError
from node.operations.backup import HEAD, SUMS, back_up, restore
from node.state_folder import sole_process_of
from node.swarm import founding, revoking
from node.tasks.questions import DEFAULT_SPLIT, Split
from node.training.checkpoint import find_damage
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from protocol.identity import Identity
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SEED = Address.parse(f"tcp://127.0.0.1:1?key={'ab' * 32}")
OTHER_SEED = Address.parse(f"tcp://127.0.0.1:2?key={'cd' * 32}")
PLAIN = ("config.json", "settings.json", "manifest.bin", "grant.bin", "revocations.bin", "peers.json", "uses.bin")


def make_checkpoint(folder: Path, number: int, weights: int = 1000) -> Path:
    path = folder / "checkpoints" / f"checkpoint-{number}"
    path.mkdir(parents=True)
    save_file({"weights": np.full(weights, float(number), np.float32)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("data.pkl", b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    assert find_damage(path) == ""
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "n0"
    folder.mkdir(mode=0o700)
    Identity.generate().save(folder / "identity.key")
    for name in PLAIN:
        (folder / name).write_bytes(name.encode() * 3)
    (folder / "metrics.jsonl").write_text('{"round": 7}\n')
    (folder / "lock").touch()
    (folder / "log.jsonl").write_text("{}\n")
    make_checkpoint(folder, 5)
    make_checkpoint(folder, 6)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_node_needs_comes_back_to_the_byte_and_for_its_owner_alone(folder: Path, tmp_path: Path) -> None:
    before = files_of(folder)
    head = back_up(folder, tmp_path / "n0.tar")
    assert (head["node"], head["round"]) == (Identity.load(folder / "identity.key").node_id, 6)
    assert files_of(folder) == before
    assert (tmp_path / "n0.tar").stat().st_mode & 0o777 == 0o600
    assert restore(tmp_path / "n0.tar", tmp_path / "deep" / "again") == head
    gone = {name for name in before if "checkpoint-5" in name} | {"lock", "log.jsonl"}
    assert files_of(tmp_path / "deep" / "again") == {name: data for name, data in before.items() if name not in gone}
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "deep" / "again").rglob("*") if path.is_file()}
    assert modes == {0} and (tmp_path / "deep" / "again").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_its_sums_are_what_sha256sum_checks(folder: Path, tmp_path: Path) -> None:
    back_up(folder, tmp_path / "n0.tar")
    (tmp_path / "by-hand").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "n0.tar", "-C", tmp_path / "by-hand"], check=True)
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=tmp_path / "by-hand", capture_output=True, text=True
    )
    assert done.returncode == 0 and "model.safetensors: OK" in done.stdout


@pytest.mark.parametrize("name", ["pool.sqlite", "board.sqlite"])
def test_a_database_is_copied_while_it_is_written_to(name: str, folder: Path, tmp_path: Path) -> None:
    pool = sqlite3.connect(folder / name, isolation_level=None)
    pool.execute("PRAGMA journal_mode = WAL")
    pool.execute("CREATE TABLE groups (id INTEGER)")
    pool.execute("INSERT INTO groups VALUES (1)")
    pool.execute("BEGIN IMMEDIATE")
    pool.execute("INSERT INTO groups VALUES (2)")
    back_up(folder, tmp_path / "n0.tar")
    restore(tmp_path / "n0.tar", tmp_path / "again")
    pool.close()
    copy = sqlite3.connect(tmp_path / "again" / name)
    assert copy.execute("SELECT id FROM groups").fetchall() == [(1,)]
    copy.close()


def test_a_checkpoint_that_goes_meanwhile_gives_way_to_a_newer_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, linked = os.link, []

    def rotate(source: Path, target: Path) -> None:
        linked.append(source)
        if len(linked) == 3:  # in the middle of checkpoint 6
            for number in (7, 8):
                make_checkpoint(folder, number)
            (folder / "checkpoints/checkpoint-6").rename(folder / "checkpoints/.deleting-6")
        link(source, target)

    monkeypatch.setattr(os, "link", rotate)
    assert back_up(folder, tmp_path / "n0.tar")["round"] == 8
    assert restore(tmp_path / "n0.tar", tmp_path / "again")["round"] == 8
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()] == ["checkpoint-8"]


def test_rows_that_are_moved_out_of_the_way_meanwhile_are_taken_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def rotate(source: Path, target: Path) -> None:
        link(source, target)
        if source.name == "metrics.jsonl":
            source.rename(source.with_name("metrics.old.jsonl"))
            source.write_text("")

    monkeypatch.setattr(os, "link", rotate)
    back_up(folder, tmp_path / "n0.tar")
    restore(tmp_path / "n0.tar", tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("metrics*")] == ["metrics.jsonl"]
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == '{"round": 7}\n'


def test_nothing_is_restored_onto_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(folder, tmp_path / "n0.tar")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"is the current folder, .* --state n0"):
        restore(tmp_path / "n0.tar", Path())
    restore(tmp_path / "n0.tar", Path("n0"))


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    back_up(folder, tmp_path / "n0.tar")
    held = (tmp_path / "n0.tar").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        back_up(folder, tmp_path / "n0.tar")
    with pytest.raises(UserError, match="is there already"):
        restore(tmp_path / "n0.tar", folder)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere: make it first"):
        back_up(folder, tmp_path / "nowhere" / "n0.tar")
    assert (tmp_path / "n0.tar").read_bytes() == held
    (tmp_path / "empty").mkdir()
    restore(tmp_path / "n0.tar", tmp_path / "empty")


def test_a_model_is_not_taken_for_a_node(tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "x.tar"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is no node's folder: it has neither"):
        back_up(model, file)
    assert not file.exists()
    (model / "settings.json").write_text("{}")  # what a node leaves that never met a network
    assert back_up(model, file)["node"] is None


def test_a_damaged_checkpoint_is_not_backed_up(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoints/checkpoint-6/optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint-6 is damaged"):
        back_up(folder, tmp_path / "n0.tar")
    assert not (tmp_path / "n0.tar").exists()


Change = Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]


def rewritten(source: Path, target: Path, change: Change) -> Path:
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for entry in old:
            file = old.extractfile(entry)
            assert file is not None
            changed, data = change(entry, file.read())
            changed.size = len(data)
            new.addfile(changed, io.BytesIO(data))
    return target


def renamed(name: str, to: str, kind: bytes = tarfile.REGTYPE) -> Change:
    def change(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if entry.name == name:
            entry.name, entry.type, entry.linkname = to, kind, "/etc/passwd"
        return entry, b"" if kind != tarfile.REGTYPE and entry.name == to else data

    return change


def altered(name: str, data: bytes) -> Change:
    return lambda entry, held: (entry, data if entry.name == name else held)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed("grant.bin", "../grant.bin"), "belongs into no backup"),
        (renamed("grant.bin", "/tmp/grant.bin"), "belongs into no backup"),
        (renamed("grant.bin", "checkpoints/checkpoint-6/../../x"), "belongs into no backup"),
        (renamed("grant.bin", "checkpoints/checkpoint-6/.x"), "belongs into no backup"),
        (renamed("grant.bin", "config.json"), "belongs into no backup"),
        (renamed("grant.bin", "grant.bin", tarfile.SYMTYPE), "is no file"),
        (renamed("grant.bin", "grant.bin", tarfile.LNKTYPE), "is no file"),
        (renamed(SUMS, "uses.bin"), "belongs into no backup"),
        (altered("config.json", b"{}"), "its sums are not those of its files"),
        (altered(SUMS, b""), "its sums are not those of its files"),
        (altered(HEAD, b"[]"), "its head is none"),
        (altered(HEAD, b"{"), "is damaged"),
        (altered(HEAD, b'{"format": 2, "node": "a"}'), "it is of format 2"),
    ],
)
def test_what_is_no_backup_leaves_no_folder(change: Change, says: str, folder: Path, tmp_path: Path) -> None:
    back_up(folder, tmp_path / "n0.tar")
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError, match=says):
        restore(rewritten(tmp_path / "n0.tar", tmp_path / "bad.tar", change), tmp_path / "into" / "again")
    assert list((tmp_path / "into").iterdir()) == []


def test_half_a_backup_is_none(folder: Path, tmp_path: Path) -> None:
    back_up(folder, tmp_path / "n0.tar")
    whole = (tmp_path / "n0.tar").read_bytes()
    for size in (0, 100, 512, 700, len(whole) // 2, whole.index(SUMS.encode()), whole.index(SUMS.encode()) + 512):
        (tmp_path / "half.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"no backup|damaged|not complete"):
            restore(tmp_path / "half.tar", tmp_path / "again")
        assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_backup_that_is_killed_at_any_moment_leaves_a_whole_one_or_none(folder: Path, tmp_path: Path) -> None:
    make_checkpoint(folder, 9, weights=4_000_000)
    whole = tmp_path / "whole.tar"
    back_up(folder, whole)
    (tmp_path / "into").mkdir()
    fork, draw = multiprocessing.get_context("fork"), random.Random(7)

    def kill(target: Callable[..., object], *arguments: Path) -> None:
        child = fork.Process(target=target, args=arguments)
        child.start()
        time.sleep(draw.uniform(0, 0.1))  # the moment of its death; nothing is waited for
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(10)

    for number in range(6):
        back, again = tmp_path / f"{number}.tar", tmp_path / "into" / f"{number}"
        kill(back_up, folder, back)
        kill(restore, whole, again)
        if back.exists():
            restore(back, tmp_path / "into" / f"{number}-whole")
        if again.exists():
            assert files_of(again).keys() >= {"identity.key", "uses.bin"}
            assert find_damage(again / "checkpoints/checkpoint-9") == ""
        else:
            restore(whole, again)
        assert not [path for path in (tmp_path / "into").iterdir() if path.name.startswith(f".{number}")]
    back_up(folder, tmp_path / "last.tar")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def hold(node: str, folder: Path, ready: Path) -> None:
    with sole_process_of(node, folder):
        ready.touch()
        signal.pause()


@pytest.mark.slow
def test_two_processes_of_one_key_do_not_run_on_one_machine_and_a_killed_one_is_no_hindrance(
    folder: Path, tmp_path: Path
) -> None:
    node = back_up(folder, tmp_path / "n0.tar")["node"]
    child = multiprocessing.get_context("fork").Process(target=hold, args=(node, folder, tmp_path / "ready"))
    child.start()
    wait_until((tmp_path / "ready").exists, 10)
    with (
        pytest.raises(UserError, match=f"node {node} runs on this machine already, in {folder}"),
        sole_process_of(node),
    ):
        pass
    with pytest.raises(UserError, match="push each other out"):
        restore(tmp_path / "n0.tar", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    restore(tmp_path / "n0.tar", tmp_path / "again")


def swarm_of(folder: Path, tasks: Sequence[str], split: Split = DEFAULT_SPLIT) -> Invite:
    """Found a swarm; return an invite to it."""
    settings = parse_config({"tasks": [{"name": name} for name in tasks]})
    manifest = founding.found(settings, folder, folder.name, JoinPolicy.OPEN, [], split)
    return Invite(folder.name, manifest.hash, (SEED,))


def test_a_founder_from_an_older_backup_goes_on_from_the_revocation_list_of_a_member(tmp_path: Path) -> None:
    founder, again = tmp_path / "founder", tmp_path / "again"
    swarm_of(founder, ["builtin/sums"])
    back_up(founder, tmp_path / "founder.tar")
    first, second = (Identity.generate().node_id for _ in range(2))
    assert revoking.revoke(founder, [first]).sequence == 1
    restore(tmp_path / "founder.tar", again)
    shutil.copy(founder / "revocations.bin", again)  # as a relay has it
    made = revoking.revoke(again, [second])
    assert (made.sequence, made.revoked) == (2, {first, second})
