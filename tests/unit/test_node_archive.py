"""An archive keeps what may be kept, survives a kill at any write, and exports nothing that a signer only claims."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from node.archive import store
from node.archive.judging import GroupJudge, JudgedGroup
from node.archive.keeping import open_keeper
from node.archive.rows import export_rows
from node.archive.store import Archive, ArchivedGroup, ArchiveError, open_group, open_writer
from node.cli.app import run
from node.config import TaskConfig, load_config
from node.errors import UserError
from node.policy.model_card import splits_in
from node.rollouts.group import Group, encode, one_turn
from node.swarm.agreed_tasks import describe_tasks
from node.swarm.peering import Network
from node.swarm.sharing import topic_of_group
from node.tasks import Task, load_tasks
from node.tasks.questions import Split
from protocol.credentials.manifest import JoinPolicy, ManifestSplit, SwarmManifest, make_manifest
from protocol.host import ItemVerdict, Received
from protocol.identity import Identity
from protocol.wire.compression import pack_content
from protocol.wire.envelope import Kind, open_item, seal

pytestmark = pytest.mark.usefixtures("own_log_setup")
FOUNDER, ALICE, BOB = (Identity(bytes([number]) * 32) for number in range(3))
SUMS = [TaskConfig(name="builtin/sums")]
SPLIT = ManifestSplit(200_000, 7)
MANY = 10**9
TASK = load_tasks(SUMS, Split(0.2, 7)).tasks[0]


def club(tasks: Sequence[TaskConfig] = SUMS, name: str = "club", *, archive: bool = True) -> SwarmManifest:
    described = describe_tasks(tasks)
    return make_manifest(FOUNDER, name, 1, JoinPolicy.OPEN, described, split=SPLIT, archive=archive)


CLUB = club()


def seeds(*, held_out: bool) -> list[int]:
    """The first seeds of the task whose questions are held out in the club, or are not; no question twice."""
    asked = {TASK.make(seed).question: seed for seed in range(200)}
    return [seed for text, seed in asked.items() if Split(0.2, 7).holds_out(TASK.key.name, text) == held_out]


ASKED, HELD = seeds(held_out=False), seeds(held_out=True)


def group_on(seed: int, task: Task = TASK, rewards: Sequence[float] = (1.0, 0.0), **changes: Any) -> Group:
    """A right and a wrong answer to the question of a seed, with these rewards as their signer claims them."""
    item = task.make(seed)
    made = [one_turn(text, True, reward) for text, reward in zip((item.answer, "no"), rewards, strict=True)]
    return replace(Group(task.key, seed, item.question, tuple(made), "qwen", 3, item.content), **changes)


def signed(group: Group, signer: Identity = ALICE, manifest: SwarmManifest = CLUB, kind: Kind = Kind.ITEM) -> bytes:
    return seal(signer, manifest.swarm, kind, 1, 1000, pack_content(encode(group), topic_of_group(group)))


def fill(folder: Path, frames: Sequence[bytes], manifest: SwarmManifest = CLUB) -> Path:
    """Make an archive of these frames, whatever is in them, as a hostile keeper may."""
    folder.mkdir()
    (folder / "manifest.bin").write_bytes(manifest.encoded)
    for frame in frames:
        name = open_item(frame).item_id.hex()
        path = folder / "groups" / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frame)
    return folder


def kept_in(folder: Path) -> list[Group]:
    damaged: list[object] = []
    found = [group.group for group in Archive(folder).groups(lambda *why: damaged.append(why))]
    assert not damaged
    return found


def rows_of(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    out = folder.parent / "rows" / "rows.jsonl"
    status = run(["archive", "export", str(folder), "--out", str(out), *options], debug=False)
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_signed_group_is_opened_and_what_is_signed_otherwise_is_refused_by_its_reason() -> None:
    group = group_on(ASKED[0])
    found = open_group(signed(group), CLUB)
    assert (found.group, found.signer, found.body) == (group, ALICE.node_id, encode(group))

    def reason(frame: bytes, manifest: SwarmManifest = CLUB) -> str:
        with pytest.raises(ArchiveError) as caught:
            open_group(frame, manifest)
        return caught.value.reason

    frame = signed(group)
    assert all(reason(frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]) == "forged" for at in (0, 40, 140, -1))
    assert reason(frame[:100]) == reason(signed(group, kind=Kind.PING)) == "malformed"
    assert reason(signed(group, manifest=club(name="other"))) == "other_swarm"
    assert reason(signed(replace(group, kept=False))) == "not_kept"
    forbids = club(archive=False)
    assert reason(signed(group, manifest=forbids), forbids) == "not_kept"
    noise = seal(ALICE, CLUB.swarm, Kind.ITEM, 1, 1000, bytes(8) + b"\0noise")
    assert reason(noise) == reason(seal(ALICE, CLUB.swarm, Kind.ITEM, 1, 1000, b"")) == "malformed"


def test_a_group_of_several_chunks_is_kept_as_it_was_signed(tmp_path: Path) -> None:
    noise = random.Random(1)
    long = tuple(one_turn(noise.randbytes(60_000).hex(), True, 0.0) for _ in range(4))
    frame = signed(group_on(ASKED[0], completions=long))
    assert len(frame) > 200_000
    with open_writer(tmp_path / "a", CLUB, MANY) as writer:
        assert writer.keep(open_group(frame, CLUB)) == ""
    assert [group.frame for group in Archive(tmp_path / "a").groups(pytest.fail)] == [frame]


def test_a_group_is_kept_once_and_the_bounds_hold_over_all_starts(tmp_path: Path) -> None:
    most = 4 * store.BLOCK

    def keep(seed: int, signer: Identity) -> str:
        with open_writer(tmp_path / "a", CLUB, most) as writer:
            return writer.keep(open_group(signed(group_on(seed), signer), CLUB))

    assert [keep(ASKED[at], ALICE) for at in (0, 1, 1, 2)] == ["", "", "", "signer_full"]
    assert [keep(ASKED[at], BOB) for at in (0, 1)] == ["", ""]
    with pytest.raises(UserError, match="is full, with 4 groups: raise --gigabytes"):
        keep(ASKED[2], FOUNDER)
    assert len(kept_in(tmp_path / "a")) == 4


def test_what_is_no_archive_of_the_swarm_is_not_written_to(tmp_path: Path) -> None:
    def refused(folder: Path, manifest: SwarmManifest) -> str:
        with pytest.raises(UserError) as caught, open_writer(folder, manifest, MANY):
            pass
        return str(caught.value)

    assert "'club' allows no archives" in refused(tmp_path / "none", club(archive=False))
    assert not (tmp_path / "none").exists()
    fill(tmp_path / "other", [], club(name="other"))
    assert "the archive of another swarm, 'other'" in refused(tmp_path / "other", CLUB)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    assert "holds other things than an archive" in refused(tmp_path / "home", CLUB)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter"]
    with open_writer(tmp_path / "held", CLUB, MANY):
        assert "is running in" in refused(tmp_path / "held", CLUB)


GROUPS = [group_on(seed) for seed in ASKED[:3]]
FRAMES = [signed(group) for group in GROUPS]


def killed_at(moment: int, folder: Path) -> bool:
    """Fill an archive in a process that is killed before the file system is touched for this time; tell whether it was.

    A write is cut off in the middle.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in {"open", "os.rename", "os.mkdir", "os.remove"}:
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        def sync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
            count("open", ())
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and seen == moment - 1:
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            real(descriptor)

        os.fsync = sync
        sys.addaudithook(count)
        try:
            with open_writer(folder, CLUB, MANY) as writer:
                for frame in FRAMES[:2]:
                    writer.keep(open_group(frame, CLUB))
        except BaseException:  # noqa: BLE001  # of the test's own process nothing may go on here
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.slow
def test_after_a_kill_at_any_write_all_that_is_there_is_whole_and_the_next_start_keeps_the_rest(tmp_path: Path) -> None:
    moment, left = 1, 0
    while killed_at(moment, folder := tmp_path / str(moment)):
        if (folder / "manifest.bin").exists():
            assert set(kept_in(folder)) <= set(GROUPS)
            left += any(folder.glob("groups/*/.*.tmp"))
        with open_writer(folder, CLUB, MANY) as writer:
            assert [writer.keep(open_group(frame, CLUB)) for frame in FRAMES] == [""] * 3
        assert set(kept_in(folder)) == set(GROUPS)
        assert not [*folder.glob("groups/*/.*.tmp")]
        moment += 1
    assert moment > 15 and left > 2, "kills between the making of a file and its renaming were among them"


def test_verify_names_and_counts_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [signed(replace(GROUPS[0], kept=False)), *FRAMES, signed(GROUPS[0], BOB)]
    folder = fill(tmp_path / "a", frames)
    marked, changed, moved, *_ = (next(folder.glob(f"groups/*/{open_item(frame).item_id.hex()}")) for frame in frames)
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    moved.rename(moved.with_name("f" * 64))
    elsewhere = tmp_path / "secret"
    elsewhere.write_bytes(b"secret")
    moved.symlink_to(elsewhere)
    os.mkfifo(folder / "groups" / "ab-fifo")
    os.mkfifo(moved.with_name("fifo"))
    assert run(["archive", "verify", str(folder)], debug=False) == 1
    said = capsys.readouterr()
    assert said.out == "swarm club: 2 groups, 4 answers, 2 signers; 6 damaged\n"
    reasons = {line.split(": ")[1]: line.split(": ")[2] for line in said.err.splitlines()}
    assert reasons == {
        str(marked): "not_kept",
        str(changed): "forged",
        str(moved): "unreadable",
        str(moved.with_name("f" * 64)): "misnamed",
        str(moved.with_name("fifo")): "unreadable",
        str(folder / "groups" / "ab-fifo"): "unreadable",
    }
    assert run(["archive", "verify", str(fill(tmp_path / "b", FRAMES))], debug=False) == 0
    assert capsys.readouterr().out == "swarm club: 3 groups, 6 answers, 1 signers; 0 damaged\n"


def test_a_file_that_is_astray_is_damage_and_its_group_is_kept_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "a", FRAMES)
    first, second, _ = Archive(folder).files()
    astray = first.rename(folder / "groups" / first.name)
    (folder / "groups" / "elsewhere").mkdir()
    moved = second.rename(folder / "groups" / "elsewhere" / second.name)
    (folder / "groups" / "junk").write_bytes(b"junk")
    (folder / "groups" / ".hidden").write_bytes(b"what a kill left")

    def verified() -> dict[str, str]:
        assert run(["archive", "verify", str(folder)], debug=False) == 1
        return {line.split(": ")[1]: line.split(": ")[2] for line in capsys.readouterr().err.splitlines()}

    reasons = {str(astray): "misnamed", str(moved): "misnamed", str(folder / "groups" / "junk"): "malformed"}
    assert verified() == reasons
    with open_writer(folder, CLUB, MANY) as writer:
        assert len(writer) == 1
        assert [writer.keep(open_group(frame, CLUB)) for frame in FRAMES] == [""] * 3
    assert verified() == reasons and first.is_file() and second.is_file()


def test_an_archive_that_has_lost_its_groups_is_one_line_and_no_empty_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "a", FRAMES)
    shutil.rmtree(folder / "groups")
    assert run(["archive", "verify", str(folder)], debug=False) == 2
    assert "a has lost its groups, the folder groups/: copy them there" in capsys.readouterr().err
    with pytest.raises(UserError, match="has lost its groups"), open_writer(folder, CLUB, MANY):
        pass
    assert not (folder / "groups").exists()


def test_a_damaged_manifest_is_told_as_an_archives_and_is_written_again_once_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "a", FRAMES)
    (folder / "manifest.bin").write_bytes(CLUB.encoded[:-1] + b"?")
    assert run(["archive", "verify", str(folder)], debug=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("or delete it and let `gossamer archive run` write it again")
    with pytest.raises(UserError, match="let `gossamer archive run`"), open_writer(folder, CLUB, MANY):
        pass
    (folder / "manifest.bin").unlink()
    with open_writer(folder, CLUB, MANY) as writer:
        assert len(writer) == 3
    assert len(kept_in(folder)) == 3


def test_a_file_that_grows_too_large_is_one_line_and_no_rows_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = fill(tmp_path / "a", FRAMES), resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["archive", "export", str(folder), "--out", str(tmp_path / "rows" / "rows.jsonl")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        assert run(words, debug=False) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "would be larger than is allowed here: raise the limit" in capsys.readouterr().err
    assert not [*(tmp_path / "rows").iterdir()]


def test_what_is_no_archive_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forbidden = fill(tmp_path / "a", FRAMES, club(archive=False))
    for folder, says in ((tmp_path, "is no archive"), (forbidden, "swarm 'club' allows no archives")):
        for words in (["verify", str(folder)], ["export", str(folder), "--out", str(tmp_path / "r" / "r.jsonl")]):
            assert run(["archive", *words], debug=False) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and says in line
    assert not (tmp_path / "r").exists()


class Home:
    """What a keeper uses of a host."""

    def __init__(self) -> None:
        self.reports: list[tuple[ItemVerdict, str]] = []

    def judge(self, _: bytes, verdict: ItemVerdict, reason: str) -> None:
        self.reports.append((verdict, reason))


def received(frame: bytes) -> Received:
    item = open_item(frame)
    return Received(item.item_id, ALICE.node_id, b"not looked at", 1.0, item.body[:8], frame)


def taken(folder: Path, frames: Sequence[bytes], manifest: SwarmManifest = CLUB) -> Home:
    host = Home()
    network = Network(host, FOUNDER, manifest.swarm, manifest, None)  # type: ignore[arg-type]
    with open_keeper(network, folder, MANY) as take:
        take([received(frame) for frame in frames])
    return host


ATTACKS = {
    "held_out": group_on(HELD[0]),
    "false_question": group_on(HELD[1], question=TASK.make(ASKED[5]).question),  # a held-out one under another's name
    "unknown_task": replace(group_on(ASKED[7]), task=TASK.key._replace(version=99)),
    "not_kept": group_on(ASKED[8], kept=False),
}
FALSE_REWARD = group_on(ASKED[6], rewards=(0.0, 1.0))  # kept, for no answer is scored; in no row


def test_a_keeper_keeps_groups_on_true_questions_alone_and_reports_lies(tmp_path: Path) -> None:
    host = taken(tmp_path / "a", [*map(signed, [*ATTACKS.values(), FALSE_REWARD]), *FRAMES])
    assert set(kept_in(tmp_path / "a")) == {*GROUPS, FALSE_REWARD}
    assert {reason for verdict, reason in host.reports if verdict is ItemVerdict.REJECT} == {"false_question"}
    assert {reason for verdict, reason in host.reports if verdict is ItemVerdict.IGNORE} == {"held_out", "unknown_task"}


def test_no_group_of_a_swarm_that_allows_no_archives_is_kept(tmp_path: Path) -> None:
    forbids = club(archive=False)
    with pytest.raises(UserError, match="allows no archives"):
        taken(tmp_path / "a", [signed(GROUPS[0], manifest=forbids)], forbids)
    assert not (tmp_path / "a").exists()


def test_a_folder_with_a_pipe_in_place_of_its_manifest_is_no_archive(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", FRAMES)
    (folder / "manifest.bin").unlink()
    os.mkfifo(folder / "manifest.bin")
    with pytest.raises(UserError, match="is no archive"):
        store.Archive(folder)


def test_a_full_archive_ends_its_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MANY", 2 * store.BLOCK)
    with pytest.raises(UserError, match="is full, with 2 groups"):
        taken(tmp_path / "a", [signed(GROUPS[0]), signed(GROUPS[1], BOB), signed(GROUPS[2], FOUNDER)])
    assert len(kept_in(tmp_path / "a")) == 2


def test_a_full_disk_is_told_of_the_archives_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    new = tmp_path / "new"
    for name, folder in (("save_manifest", new), ("write_atomically", fill(tmp_path / "begun", FRAMES[:1]))):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, fail)
            with pytest.raises(UserError, match=f"the disk that holds {folder} is full"):
                taken(folder, FRAMES)
    assert taken(new, FRAMES) and len(kept_in(new)) == 3, "the next start goes on"


def test_rows_have_the_rewards_that_are_found_here_and_say_who_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nearly = signed(group_on(ASKED[0], rewards=(1 - 1e-7, 0.0)))
    folder = fill(tmp_path / "a", [nearly, signed(GROUPS[1], BOB)])
    status, rows = rows_of(folder)
    assert status == 0 and capsys.readouterr().out == "4 rows of 2 groups, 2 signers\n"
    item, group_id = TASK.make(ASKED[0]), open_item(nearly).item_id.hex()
    asked = [{"role": "user", "content": item.question}]
    told = {"finished": True, "task": "builtin/sums", "signer": ALICE.node_id, "base": "qwen", "group": group_id}
    assert [row for row in rows if row["signer"] == ALICE.node_id] == [
        {"prompt": asked, "completion": [{"role": "assistant", "content": text}], "reward": reward, **told}
        for text, reward in ((item.answer, 1.0), ("no", 0.0))
    ]
    shutil.rmtree(folder.parent / "rows")
    _, plain = rows_of(folder, "--plain")
    assert [(row["prompt"], row["completion"]) for row in plain if row["group"] == group_id] == [
        (item.question, item.answer),
        (item.question, "no"),
    ]


def test_what_lies_is_on_a_held_out_question_or_says_the_same_again_is_in_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backwards = replace(GROUPS[1], completions=GROUPS[1].completions[::-1])
    bad = [*ATTACKS.values(), FALSE_REWARD, backwards]
    folder = fill(tmp_path / "a", [*map(signed, bad), *FRAMES, signed(GROUPS[0], BOB)])
    status, rows = rows_of(folder)
    said = capsys.readouterr()
    assert status == 1, "a file is marked as not to be kept"
    (line,) = said.err.splitlines()
    assert line.endswith(": not_kept")
    left = "1 false_question, 1 false_reward, 1 held_out, 2 same_texts, 1 unknown_task"
    assert said.out == f"6 rows of 3 groups, {len({row['signer'] for row in rows})} signers; left out: {left}\n"
    assert {row["prompt"][0]["content"] for row in rows} == {group.question for group in GROUPS}


def test_an_answer_that_quotes_a_held_out_row_with_its_answer_is_in_no_row(tmp_path: Path) -> None:
    asked = [{"question": f"What is the capital of country number {n}?", "answer": f"City {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "club.toml").write_text(
        f"[[tasks]]\nname = 'dataset/capitals'\noptions = {{path = '{tmp_path / 'rows.jsonl'}'}}\n"
    )
    configs = load_config(tmp_path / "club.toml").tasks
    manifest, task = club(configs), load_tasks(configs).tasks[0]
    held, seed = {}, 0
    for at, row in enumerate(asked):
        if Split(0.2, 7).holds_out(task.key.name, row["question"]):
            held = row
        else:
            seed = at
    item = task.make(seed)
    texts = [item.answer, f"{held['question']} {held['answer']}"]
    made = tuple(one_turn(text, True, task.verify(item, text)) for text in texts)
    folder = fill(tmp_path / "a", [signed(group_on(seed, task, completions=made), manifest=manifest)], manifest)
    status, rows = rows_of(folder, "--config", str(tmp_path / "club.toml"))
    assert status == 0 and [row["completion"][0]["content"] for row in rows] == [item.answer]


def test_an_export_replaces_nothing_and_its_card_has_the_swarms_salt_and_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "a", FRAMES)
    rows_of(folder)
    card = (tmp_path / "rows" / "README.md").read_text()
    assert "6 answers of 3 groups, 3 of them with a reward of 1, by 1 signers" in card
    assert splits_in(tmp_path / "rows") == [Split(0.2, 7)]
    capsys.readouterr()

    def refused(out: Path) -> str:
        assert run(["archive", "export", str(folder), "--out", str(out)], debug=False) == 2
        return capsys.readouterr().err

    assert "rows.jsonl exists already" in refused(tmp_path / "rows" / "rows.jsonl")
    (tmp_path / "README.md").write_text("# My project\n")
    assert "choose a folder of its own" in refused(tmp_path / "rows.jsonl")
    assert "choose a folder of its own" in refused(tmp_path / "rows" / "again.jsonl"), "its card has this salt"
    assert (tmp_path / "rows" / "README.md").read_text() == card
    assert [path.name for path in (tmp_path / "rows").glob("*.jsonl")] == ["rows.jsonl"]
    assert "README.md is the name of the card" in refused(tmp_path / "new" / "README.md")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "README.md").read_text() == "# My project\n" and not (tmp_path / "rows.jsonl").exists()


class JudgeWhileAnotherExports(GroupJudge):
    """Judges once a second process has exported the same archive to the same file."""

    def __init__(self, archive: Archive, out: Path) -> None:
        super().__init__(archive.manifest)
        self.archive, self.out = archive, out

    def judge(self, groups: Sequence[ArchivedGroup], seconds: float) -> list[JudgedGroup]:
        child = os.fork()
        if child == 0:
            try:
                export_rows(self.archive, GroupJudge(CLUB), self.out, plain=True)
            except BaseException:  # noqa: BLE001  # of the test's own process nothing may go on here
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0
        return super().judge(groups, seconds)


@pytest.mark.slow
def test_two_exports_to_one_file_at_once_leave_whole_rows_and_their_card(tmp_path: Path) -> None:
    archive, out = Archive(fill(tmp_path / "a", FRAMES)), tmp_path / "rows" / "rows.jsonl"
    export_rows(archive, JudgeWhileAnotherExports(archive, out), out, plain=True)
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 6
    assert sorted(path.name for path in out.parent.iterdir()) == ["README.md", "rows.jsonl"]


def test_an_export_that_fails_leaves_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, out = Archive(fill(tmp_path / "a", FRAMES)), tmp_path / "rows" / "rows.jsonl"
    replace_file = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target == out:
            raise OSError(errno.EIO, "Input/output error")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        export_rows(archive, GroupJudge(CLUB), out, plain=True)
    assert not [*out.parent.iterdir()]


def test_what_is_not_scored_in_time_is_unscorable_and_no_lie() -> None:
    found = [open_group(frame, CLUB) for frame in FRAMES]
    judge = GroupJudge(CLUB)
    assert [refused.reason for refused in judge.judge(found, 60.0)] == [""] * 3
    assert [refused.reason for refused in judge.judge(found, 0.0)] == ["unscorable"] * 3
