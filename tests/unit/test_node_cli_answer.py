"""`gossamer answer`, as a person types it: a process of its own, a server of this machine, and a peer that draws."""

import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from gossamer import Exchange
from packaging.requirements import Requirement

from node.cli.app import run
from node.config import parse_config
from node.exchange import answering
from node.swarm.founding import found
from node.swarm.inviting import make_invite
from node.swarm.sharing import NetworkExchange
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from tests.chat_server import Body, Reply, chat_server, says, sum_of

pytestmark = pytest.mark.usefixtures("own_log_setup")
ROOT = Path(__file__).parents[2]
SEEDS = ["--set", f"network.seeds=['tcp://127.0.0.1:1?key={'ab' * 32}']"]
PROGRAM = """
import sys
from node.cli.app import run
status = run(sys.argv[1:], debug=False)
assert not {"torch", "transformers", "trl", "numpy", "matplotlib"} & set(sys.modules)
sys.exit(status)
"""


@pytest.fixture
def founder(tmp_path: Path) -> Iterator[Exchange]:
    config = parse_config({"tasks": [{"name": "builtin/sums"}], "sampling": {"max_length_ratio": 0.0}})
    found(config, tmp_path / "first", "club", JoinPolicy.OPEN, [])
    with Exchange(tmp_path / "first", sampling={"max_length_ratio": 0.0}) as member:
        (tmp_path / "invite").write_text(
            str(make_invite(tmp_path / "first", [], own=[Address.parse(member.address or "")]))
        )
        yield member


def half_right(body: Body) -> Reply:
    return says(str(sum_of(body)), "no")


def start(folder: Path, url: str, *options: str) -> subprocess.Popen[str]:
    """Answer with `--state FOLDER/a` and two completions."""
    words = ["answer", "--url", url, "--model", "tiny", "--state", str(folder / "a"), "--completions", "2", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.real
def test_it_joins_answers_resumes_and_imports_nothing_that_trains(founder: Exchange, tmp_path: Path) -> None:
    with chat_server(half_right) as (url, asked):
        for options, most in (([f"@{tmp_path / 'invite'}"], 2), ([], 5)):
            process = start(tmp_path, url, "--questions", str(most), *options)
            said, complaints = process.communicate(timeout=90)
            assert process.returncode == 0, complaints
            assert said.startswith(f"{most} questions, {2 * most} answers, mean reward 0.500, {most} groups published")
    assert len(asked) == 5
    assert {group.policy for group in founder.draw(8, least=5)} == {"tiny"}


@pytest.mark.slow
def test_a_signal_ends_it_in_order_though_its_server_hangs(founder: Exchange, tmp_path: Path) -> None:
    hangs, came = threading.Event(), threading.Event()

    def hang(body: Body) -> Reply:
        came.set()
        hangs.wait(90)
        return half_right(body)

    with chat_server(hang) as (url, _):
        process = start(tmp_path, url, f"@{tmp_path / 'invite'}")
        try:
            assert came.wait(60)
            process.send_signal(signal.SIGTERM)
            said, complaints = process.communicate(timeout=30)
        finally:
            hangs.set()
            process.kill()
    assert process.returncode == 0, complaints
    assert re.fullmatch(r"0 questions, 0 answers, 0 groups published, [1-9]\d* tokens\n", said)
    assert "Traceback" not in complaints


@pytest.mark.slow
def test_no_question_is_sent_that_is_longer_than_a_member_pays_for(
    founder: Exchange, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "MOST_PROMPT_BYTES", 2)
    with chat_server(half_right) as (url, asked):
        words = [f"@{tmp_path / 'invite'}", "--url", url, "--model", "tiny", "--state", str(tmp_path / "a")]
        assert run(["answer", *words], debug=False) == 2
    assert not asked and "questions fits: they are too long" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cost", "1"], "--cost and --price go together"),
        (
            ["--cost", "1", "--price", "0.15"],
            "--price has to be two numbers with a comma, 0.15,0.6 say, and not '0.15'",
        ),
        (["--cost", "1", "--price", "nan,1"], "--price has to be two numbers"),
        (["--url", "127.0.0.1:1"], "has to begin with http:// or https://"),
        ([*SEEDS, "--url", "http://127.0.0.1:1/v1"], "no server is at http://127.0.0.1:1/v1"),
        ([*SEEDS, "--set", "sampling.locall=2"], "did you mean 'sampling.local'"),
        ([], "belongs to no swarm: `gossamer answer INVITE --state"),
    ],
)
def test_what_is_of_no_use_is_one_line(
    options: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with chat_server(half_right) as (url, _):
        words = ["answer", "--url", url, "--model", "tiny", "--state", str(tmp_path / "a"), *options]
        assert run(words, debug=False) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--not-kept"]])
def test_its_groups_are_marked_where_no_archive_may_keep_them(
    options: list[str], founder: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []
    publish = NetworkExchange.publish
    monkeypatch.setattr(
        NetworkExchange,
        "publish",
        lambda self, groups: sent.extend(group.kept for group in groups) or publish(self, groups),
    )
    with chat_server(half_right) as (url, _):
        words = ["answer", f"@{tmp_path / 'invite'}", "--url", url, "--model", "tiny", "--state", str(tmp_path / "a")]
        assert run([*words, "--completions", "2", "--questions", "1", *options], debug=False) == 0
    assert sent == [not options]


def test_what_is_installed_for_it_alone_is_what_the_whole_package_wants() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "examples" / "answer-requirements.txt").read_text().splitlines()
    light = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert light <= {str(Requirement(line)) for line in whole}
    assert not {"torch", "transformers", "trl", "datasets", "numpy"} & {Requirement(line).name for line in light}
