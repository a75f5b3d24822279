"""docs/tutorials and pages of docs/ that can be followed: each is, to its end, from its own text."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from node.cli.app import run
from protocol.identity import Identity
from tests.namespaces import Namespace, why_impossible, wired
from tests.protocol_hosts import NEXT_MINOR
from tests.swarms import ROOT, rows_of
from tests.waiting import wait_until

TUTORIALS = ROOT / "docs" / "tutorials"
SNIPPET = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GOSSAMER = [sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())"]
PROGRAMS = {"gossamer": GOSSAMER, "python": [sys.executable]} | {
    name: [name] for name in ("mkdir", "cp", "tar", "chmod")
}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OBSTACLE = why_impossible()


@contextmanager
def background() -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that a page starts with `&`; those that still run are stopped at the end.

    A failure is told with what became of each of them, and with the last lines that it printed.
    """
    started: list[subprocess.Popen[str]] = []
    failure: BaseException | None = None
    try:
        yield started
    except BaseException as error:
        failure = error
        raise
    finally:
        statuses = [child.poll() for child in started]
        for child in started:
            child.terminate()
        for child, status in zip(started, statuses, strict=True):
            printed, _ = child.communicate(timeout=30)
            if failure is not None:
                ended = "ran" if status is None else f"had ended with {status}"
                last = "\n".join((printed or "").splitlines()[-15:])
                failure.add_note(f"{' '.join(map(str, child.args))}: {ended}\n{last}")


def follow(page: str, machines: Mapping[str, Namespace], started: list[subprocess.Popen[str]]) -> dict[str, str]:
    """Do what a tutorial says, in the current folder; return what each command that was waited for printed."""
    return follow_text((TUTORIALS / page).read_text(), machines, started)


def follow_text(page: str, machines: Mapping[str, Namespace], started: list[subprocess.Popen[str]]) -> dict[str, str]:
    """Do what the text of a page says, or a part of it."""
    said: dict[str, str] = {}
    for language, name, text in SNIPPET.findall(page):
        if language != "sh":
            Path(name).write_text(text)
            continue
        for line in text.splitlines():
            said[line] = obey(line, machines.get(name), started)
    return said


def obey(line: str, machine: Namespace | None, started: list[subprocess.Popen[str]]) -> str:
    typed, _, into = line.removesuffix("&").partition(">")
    words = shlex.split(typed)
    assert words[0] in PROGRAMS, line
    command = [*PROGRAMS[words[0]], *words[1:]]
    command = command if machine is None else machine.command(*command)
    if line.endswith("&"):
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        if "--state" in words:  # the page goes on when its reader sees that it runs
            folder = Path(words[words.index("--state") + 1])
            wait_until((folder / "observe.json").exists, 100, f"the node of {line}")
        return ""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    if into:
        Path(into.strip()).write_text(done.stdout)
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_first_swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    lines = in_process("first-swarm.md")
    assert "mean reward" in capfd.readouterr().out
    assert (tmp_path / "runs/first/report.html").exists() and (tmp_path / "my-model/model.safetensors").exists()
    assert len(lines) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ["your-task.md", "your-environment.md", "your-model.md"])
def test_what_is_your_own(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(in_process(page)) >= 3
    said = capfd.readouterr().out
    assert "FAILS" not in said and ("←" in said) == (page == "your-environment.md")
    rounds = {
        "your-task.md": ("runs/riddles/nodes/n0", 3),
        "your-environment.md": ("runs/dice/nodes/n0", 3),
        "your-model.md": ("n0", 6),
    }[page]
    assert len(rows_of(tmp_path / rounds[0])) == rounds[1]


def in_process(page: str) -> list[str]:
    """Follow a page whose commands are nearly all `gossamer`'s, in this process: torch is loaded once."""
    lines = []
    for language, name, text in SNIPPET.findall((TUTORIALS / page).read_text()):
        if language != "sh":
            Path(name).write_text(text)
            continue
        for line in text.splitlines():
            verb, *words = shlex.split(line)
            if verb == "gossamer" and ">" not in words:
                assert run(words, debug=False) == 0, line
            else:
                obey(line, None, [])
            lines.append(line)
    return lines


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reward_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with background() as started:
        said = follow("my-rewards.md", {}, started)
    assert len(rows_of(tmp_path / "n1")) == 3
    (checked,) = (text for line, text in said.items() if line.startswith("gossamer tasks check"))
    assert checked.count("  accuracy ") == 10 and "FAILS" not in checked and "not shared" not in checked
    rows = [json.loads(line) for line in (tmp_path / "runs/sums/nodes/n0/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        parts = row["rewards/accuracy/mean"] + row["rewards/digits/mean"]
        assert row["reward"] == pytest.approx(parts / 2) == row["rewards/rewards/sums/mean"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "node/public", tmp_path)))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", path)
    said = follow("my-notebook.md", {}, [])
    assert said["python notebook.py"].splitlines()[0].startswith("1 ")
    assert said["python swarm.py"].splitlines()[-1] == "[3, 3]"
    assert 0 <= float(said["python trl_script.py"].splitlines()[-1]) <= 1
    assert (tmp_path / "my-model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keep, check = (ROOT / "docs" / "archive.md").read_text().split("## Check")
    with background() as started:
        follow_text(keep, {}, started)
        wait_until(lambda: any(Path("club-archive").glob("groups/*/[!.]*")), 200, "a group to be kept")
    said = follow_text(check, {}, [])
    assert said["gossamer archive verify club-archive"].endswith("; 0 damaged\n")
    rows = [json.loads(line) for line in Path("rows/rows.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"builtin/sums"} and {row["reward"] for row in rows} <= {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trainer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "node/public"))))
    with background() as started:
        said = follow_text((ROOT / "docs" / "exchange.md").read_text(), {}, started)
        node = Identity.load(Path("n0", "identity.key")).node_id
        assert {line.split()[0] for line in said["python member.py"].splitlines()} == {node}
        member = Identity.load(Path("member", "identity.key")).node_id
        wait_until(lambda: any(member in row["swarm/taught_by"] for row in rows_of(Path("n0"))), 60, "n0 to be taught")


@pytest.mark.slow
def test_the_all_reduce_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "all-reduce.md"
    (promised,) = re.findall(r"`(100 steps: \[.*?\])`", (TUTORIALS / page).read_text())
    with background() as started:
        printed = [text for text in follow(page, {}, started).values() if text]
        assert len(started) == 2
        assert [*printed, *(child.communicate(timeout=30)[0] for child in started)] == [f"{promised}\n"] * 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_a_private_swarm_over_three_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with wired("a", "b", "c") as spaces, background() as started:  # a network without a router
        said = follow("private-swarm.md", dict(zip("abc", spaces, strict=True)), started)
    for node in ("n1", "n2"):
        assert len((tmp_path / node / "metrics.jsonl").read_text().splitlines()) == 40
    assert "club" in said["gossamer status n0"]


def ran_by(started: list[subprocess.Popen[str]], folder: str) -> subprocess.Popen[str]:
    """Return the process that a page started on `folder`."""
    (child,) = (child for child in started if folder in child.args)
    return child


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=30)


def stop(child: subprocess.Popen[str]) -> None:
    """Stop a node as its owner does."""
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0, out


def external(folder: str) -> int:
    """Return how many of peers' groups a node drew. Thousands of rows are not parsed: nodes need the processor."""
    path = Path(folder, "metrics.jsonl")
    return sum(map(int, re.findall(r'"groups_external":(\d+)', path.read_text()))) if path.exists() else 0


def live_peers(status: str) -> int:
    (count,) = re.findall(r"peers +(\d+) live", status)
    return int(count)


def board_of(machine: Namespace, link: str) -> dict[str, Any]:
    """Return what a board says, asked on `machine`."""
    code = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())"
    command = machine.command(sys.executable, "-c", code, f"{link}/swarm.json")
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def first_reports(tree: dict[str, Any]) -> dict[str, float]:
    return {node["id"]: node["first_report"] for node in tree["nodes"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_a_public_swarm_survives_the_loss_of_its_founder_and_of_a_relay_and_moves_to_other_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "public-swarm.md").read_text()
    parts = {part.partition("\n")[0]: part for part in page.split("\n## ")}
    names = ("a", "b", "n", "m")
    with wired(*names) as spaces, background() as started:
        machines = dict(zip(names, spaces, strict=True))

        def key_of(folder: str) -> str:
            path = Path(folder, "identity.key")
            return Identity.load(path).node_id if path.exists() else ""

        def read(text: str) -> dict[str, str]:
            return follow_text(text.replace("ID_OF_N", key_of("n")).replace("ID_OF_M", key_of("m")), machines, started)

        first, board = parts.pop("Found it").split("```sh b\n")
        read(first)
        read(f"```sh b\n{board}")
        shutil.rmtree("founder")  # the machine with the founder's key is lost

        wait_until(
            lambda: obey("gossamer invite relay-a", machines["a"], []).count("@") == 3, 100, "relay-a to know all"
        )
        looked = read(parts.pop("Publish it"))["gossamer doctor --swarm @invite.txt"]
        assert looked.count("answers after") == 3 and "gets in after" in looked
        wait_until(lambda: external("n") and external("m"), 120, "both nodes to learn from each other")
        link = f"http://{machines['b'].ipv4}:8080"
        nodes = {key_of("n"), key_of("m")}
        wait_until(lambda: first_reports(board_of(machines["m"], link)).keys() >= nodes, 60, "the board to know both")
        before = first_reports(board_of(machines["m"], link))
        wait_until(lambda: live_peers(obey("gossamer status n", machines["n"], [])) > 1, 60, "n to know another relay")

        kill(ran_by(started, "relay-a"))
        shutil.rmtree("relay-a")
        monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{NEXT_MINOR}{os.pathsep}{ROOT}")
        read(parts.pop("When a machine is lost"))  # the new relay is of the next minor version
        monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(ROOT))
        obey("gossamer invite relay-c > invite.txt", machines["a"], [])
        obey("gossamer doctor --swarm @invite.txt", machines["m"], [])
        learned = external("n"), external("m")
        try:
            wait_until(lambda: external("n") > learned[0] and external("m") > learned[1], 120, "both to go on learning")
        except AssertionError as error:
            error.add_note(f"they had drawn {learned}, and have drawn {external('n'), external('m')}")
            for folder in ("n", "m"):
                error.add_note(obey(f"gossamer status {folder}", machines[folder], []))
            raise
        assert first_reports(board_of(machines["m"], link)).items() >= before.items()

        read(parts.pop("Take back a member"))
        wait_until(lambda: "revoked" in obey("gossamer status m", machines["m"], []), 60, "m to be told")
        for folder in ("relay-c", "n", "board"):
            wait_until(Path(folder, "revocations.bin").exists, 60, f"{folder} to hear of it")

        stop(ran_by(started, "n"))
        read(parts.pop("Other rules"))
        wait_until(lambda: len(rows_of(Path("n-2"))) > 2, 120, "n to go on")
        assert key_of("n-2") in nodes and key_of("n-2") == key_of("n")
        moved = json.loads(Path("n-2", "config.json").read_text())
        assert moved["policy"]["model"] == "n-model" and [task["name"] for task in moved["tasks"]] == ["builtin/sums"]
    assert [part for part, text in parts.items() if "```sh" in text] == []
