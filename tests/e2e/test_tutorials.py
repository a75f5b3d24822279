"""docs/tutorials: each page is followed to its end, from its own text."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.cli.app import run
from tests.namespaces import Namespace, why_impossible, wired
from tests.swarms import ROOT
from tests.waiting import wait_until

TUTORIALS = ROOT / "docs" / "tutorials"
SNIPPET = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GOSSAMER = [sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OBSTACLE = why_impossible()


@contextmanager
def background() -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that a page starts with `&`; those that still run are stopped at the end."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for child in started:
            child.terminate()
        for child in started:
            child.communicate(timeout=30)


def follow(page: str, machines: Mapping[str, Namespace], started: list[subprocess.Popen[str]]) -> dict[str, str]:
    """Do what a page says, in the current folder; return what each command that was waited for printed."""
    said: dict[str, str] = {}
    for language, name, text in SNIPPET.findall((TUTORIALS / page).read_text()):
        if language != "sh":
            Path(name).write_text(text)
            continue
        for line in text.splitlines():
            said[line] = obey(line, machines.get(name), started)
    return said


def obey(line: str, machine: Namespace | None, started: list[subprocess.Popen[str]]) -> str:
    typed, _, into = line.removesuffix("&").partition(">")
    words = shlex.split(typed)
    command = [*GOSSAMER, *words[1:]] if words[0] == "gossamer" else [sys.executable, *words[1:]]
    assert words[0] in ("gossamer", "python"), line
    command = command if machine is None else machine.command(*command)
    if line.endswith("&"):
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        if "--state" in words:  # the page goes on when its reader sees that it runs
            folder = Path(words[words.index("--state") + 1])
            wait_until((folder / "observe.json").exists, 40, f"the node of {line}")
        return ""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    if into:
        Path(into.strip()).write_text(done.stdout)
    return done.stdout


@pytest.mark.slow
def test_a_first_swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    lines = in_process("first-swarm.md")
    assert "mean reward" in capfd.readouterr().out
    assert (tmp_path / "runs/first/report.html").exists() and (tmp_path / "my-model/model.safetensors").exists()
    assert len(lines) == 6


@pytest.mark.slow
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
    assert len((tmp_path / rounds[0] / "metrics.jsonl").read_text().splitlines()) == rounds[1]


def in_process(page: str) -> list[str]:
    """Follow a page whose commands are all `gossamer`'s, in this process: torch is loaded once."""
    lines = []
    for language, name, text in SNIPPET.findall((TUTORIALS / page).read_text()):
        if language != "sh":
            Path(name).write_text(text)
            continue
        for line in text.splitlines():
            verb, *words = shlex.split(line)
            assert verb == "gossamer"
            assert run(words, debug=False) == 0, line
            lines.append(line)
    return lines


@pytest.mark.slow
def test_a_reward_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = follow("my-rewards.md", {}, [])
    (checked,) = (text for line, text in said.items() if line.startswith("gossamer tasks check"))
    assert checked.count("  accuracy ") == 10 and "FAILS" not in checked and "not shared" not in checked
    rows = [json.loads(line) for line in (tmp_path / "runs/sums/nodes/n0/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        parts = row["rewards/accuracy/mean"] + row["rewards/digits/mean"]
        assert row["reward"] == pytest.approx(parts / 2) == row["rewards/rewards/sums/mean"]


@pytest.mark.slow
@pytest.mark.timeout(300)
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
def test_the_all_reduce_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "all-reduce.md"
    (promised,) = re.findall(r"`(100 steps: \[.*?\])`", (TUTORIALS / page).read_text())
    with background() as started:
        printed = [text for text in follow(page, {}, started).values() if text]
        assert len(started) == 2
        assert [*printed, *(child.communicate(timeout=30)[0] for child in started)] == [f"{promised}\n"] * 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_a_private_swarm_over_three_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with wired("a", "b", "c") as spaces, background() as started:  # a network without a router
        said = follow("private-swarm.md", dict(zip("abc", spaces, strict=True)), started)
    for node in ("n1", "n2"):
        assert len((tmp_path / node / "metrics.jsonl").read_text().splitlines()) == 40
    assert "club" in said["gossamer status n0"]
