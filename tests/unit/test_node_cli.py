"""The command line: one clear line for what a person got wrong, and nothing heavy before it is needed."""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from node.cli.app import app, explain, main, run
from node.config import COMMON_KEYS, NodeConfig, TaskConfig, TrlOptions, all_keys, is_key, load_config
from node.engines import EngineError
from node.errors import UserError
from node.operations.config_text import to_toml
from node.operations.trained import find_trained
from node.policy.memory import Machine, ModelSize
from node.state_folder import check_free, exclusive
from node.tasks import load_tasks
from node.tasks.questions import Split
from node.tasks.task_set import TaskSet
from protocol.credentials.grants import Pass
from protocol.credentials.invite import Invite, SharedInvite
from protocol.credentials.records import Address
from protocol.identity import Identity
from tests.policies import write_diverged_policy

EXAMPLE_INVITE = str(
    Invite("club", bytes(32), (Address.parse(f"tcp://192.0.2.7:4001?key={Identity(bytes(32)).curve_key.hex()}"),), None)
)
SEED = f"tcp://192.0.2.7:4001?key={'ab' * 32}"
AT = ("--address", SEED)


def verbs_of(group: Any, before: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the name of each verb, and whether it is a group of others."""
    for name, command in group.commands.items():
        is_group = hasattr(command, "commands")
        yield f"{before}{name}", is_group
        if is_group:
            yield from verbs_of(command, f"{before}{name} ")


ALL = list(verbs_of(typer.main.get_command(app)))
VERBS, GROUPS = ([name for name, is_group in ALL if is_group is wanted] for wanted in (False, True))


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must end with status 2 and one line; return that line."""
    assert run(list(arguments), debug=False) == 2
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*verb.split(), "--help"], debug=False) == 0
    assert f"Example:\n    gossamer {verb}" in capfd.readouterr().out.replace("(umask 077; ", "")


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_a_list_of_verbs_says_each_in_a_whole_sentence(group: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*group.split(), "--help"], debug=False) == 0
    listed = capfd.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert len(listed) >= 2
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_the_version_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], debug=False) == 0
    assert capfd.readouterr().out == f"gossamer {importlib.metadata.version('gossamer')}\n"


@pytest.mark.slow
def test_a_shell_completes_verbs_and_their_options(tmp_path: Path) -> None:
    def complete(words: str) -> set[str]:
        asked = {"_GOSSAMER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        command = [sys.executable, "-c", "from node.cli import main; main()"]
        done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
        return set(done.stdout.split())

    assert complete("gossamer in") == {"invite", "inspect"}
    assert "--processes" in complete("gossamer node --pro")


def test_without_a_verb_a_person_on_a_terminal_is_told_what_is_here_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        with pytest.raises(SystemExit) as end:
            main([])
        assert end.value.code == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert "Usage: gossamer" in told(), "a program gets the help"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert told().startswith("no node is in this folder\nnext:\n  gossamer demo ")
    assert run(found(tmp_path / "club"), debug=False) == 0
    capsys.readouterr()
    for name, rows in (("metrics.jsonl", [{"round": 7}]), ("evaluations.jsonl", [{"round": 0, "accuracy": 0.25}] * 2)):
        (tmp_path / "club" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = told()
    assert "  club: stopped, swarm club, round 7, held-out accuracy 0.250 at first, 0.250 last\n" in said
    assert "gossamer node --state club " in said and "gossamer export club my-model " in said
    with exclusive(tmp_path / "club"):
        said = told()
    assert "  club: running, swarm" in said and "gossamer invite club " in said and "gossamer status club " in said


@pytest.mark.slow
def test_a_crash_of_native_code_says_in_which_line_of_python_it_was() -> None:
    code = "import ctypes, node.cli.app as app; app.main = lambda _: ctypes.string_at(0); node.cli.main([])"
    done = subprocess.run([sys.executable, "-c", "import node.cli; " + code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "in string_at" in done.stderr


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom node.cli.app import run\nrun(['swarm', '--help'], debug=False)\n"
        "print({'torch', 'transformers', 'trl', 'matplotlib', 'zmq', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["swarm", "--set", "sampling.locl=4"],
            "key 'sampling.locl': did you mean 'sampling.local'?",
        ),
        (["node", "--set", "learning_rate=1e-5"], "did you mean 'trainer.learning_rate'?"),
        (
            ["node", "--set", "frobnicate=1"],
            "key 'frobnicate': see `gossamer node --dry-run --all`",
        ),
        (["swarm", "--set", "sampling.local=many"], "configuration key 'sampling.local'"),
        (["node", "--dry-run", "--set", "buffer.max_age=inf"], "'buffer.max_age': Input should be a finite number"),
        (["node", "--set", "sampling.local"], "--set wants KEY=VALUE"),
        (["node", "--rounds", "-1"], "--rounds"),
        (["swarm", "--rounds", "0"], "configuration key 'rounds'"),
        (["node", "--forget", "sampling.locl"], "--forget sampling.locl: unknown configuration key 'sampling.locl'"),
        (["node", "--set", "trainer.trl.lr_scheduler_type=cosine"], "comes down until the last round: set rounds"),
        (["node", "missing.toml"], "no configuration file missing.toml: check the path"),
        (["swarm", "-n", "0"], "-n"),
        (["swarm", "-n", "four"], "-n"),
        (["swarm", "--frobnicate"], "No such option"),
        (["swarm", "--set", 'tasks=[{name="riddles"}]'], "unknown task 'riddles'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["identity"], "Missing command"),
        (["lab", "compare", "a", "b"], "`gossamer lab compare` is gone: `gossamer report RUN OTHER`"),
        (["report", "."], ". is no run of a swarm: it has no folder `nodes`"),
        (["eval"], "Missing argument"),
        (["eval", "builtin", "--set", "engine.top_p=2"], "configuration key 'engine.top_p'"),
        (["inspect", "missing"], "no pool.sqlite"),
        (["identity", "show", "missing"], "no key file missing/identity.key"),
        (["identity", "export", "--state", "n0"], "the key is n0/identity.key, a PEM file"),
        (["identity", "import", "n0.pem"], "copy the PEM file to n0/identity.key"),
        (["status", "missing"], "no node is running in missing: start one with `gossamer node --state missing`"),
        (["invite", "missing"], "missing belongs to no swarm"),
        (["invite", "missing", "--for", "a", "--uses", "2"], "give --for or --uses"),
        (["invite", "missing", "--expires", "soon"], "--expires says how long"),
        (["invite", "missing", "--uses", "2", "--expires", "soon"], "--expires wants a time such as 30m"),
        (["invite", "missing", "--no-grant", "--address", "tcp://192.0.2.7:1"], "has no key"),
        (["invite", "missing", "--uses", "0"], "missing belongs to no swarm"),
        (["revoke", "missing", "someone"], "'someone' is no node id"),
        (["revoke", "missing", EXAMPLE_INVITE], "holds no grant that could be taken back"),
        (["identity", "hand-over", "n0", "abc"], "KEY has 64 hex digits"),
        (["join", "https://example.org"], "an invite begins with gossamer://"),
        (["join", "gossamer://club"], "not complete"),
        (["node", "--allow-task", "leaky"], "is gone: `gossamer join INVITE --allow-task NAME`"),
        (["node", "--seed-only", "--join=@invite.txt"], "`gossamer node --join` is gone: `gossamer join INVITE`"),
        (["found"], "Missing argument"),
        (["node", "--model", "./no-model"], "no such folder here: check the path"),
        (["swarm", "--set", "role=relay"], "role=relay trains nothing"),
        (["swarm", "--out", "/proc/x", "--rounds", "1"], "cannot use /proc/x"),
        (["node", "--state", "/proc/x", "--model", "builtin"], "cannot use /proc/x as a node's folder"),
        (["node", "--state", "typo"], "no node was started in typo yet: for a new one say what to train"),
        (["node", "--state", "typo", "--listen", "tcp://127.0.0.1:0"], "no node was started in typo yet"),
        (["doctor", "--model", "./no-model"], "no such folder here: check the path"),
        (["swarm", "--model", "no-model"], "not to be had from the model hub"),
        (["found", "club", "--policy", "closed"], "--policy"),
        (
            ["found", "my club", "--task", "builtin/sums", "--no-start", "--state", "never"],
            "has no more than 64 letters",
        ),
        (["demo", "--set", "sampling.locl=4"], "did you mean 'sampling.local'?"),
        (["backup", "n0", "n0.tar"], "`gossamer backup` is gone: stop the node, then `tar -cf n0.tar n0`"),
        (["restore", "n0.tar", "--state", "n0"], "`gossamer restore` is gone: `tar -xf n0.tar`"),
        (["init", "a.toml"], "`gossamer init` is gone: `gossamer node --model ID --task TASK --dry-run"),
        (["found", "club", "--allow", "someone"], "'someone' is no node id"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert says in fails(capfd, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "run"],
        ["inspect", "run", "--own"],
        ["invite", "run"],
        ["revoke", "run"],
        ["doctor", "--state", "run"],
        ["identity", "show", "run"],
        ["node", "--state", "run"],
        ["chat", "run", "12+7="],
    ],
    ids=" ".join,
)
def test_a_run_is_not_taken_for_a_node(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "nodes" / "n0").mkdir(parents=True)
    assert "run is the folder of a run: name one of its nodes, e.g. run/nodes/n0" in fails(capfd, *arguments)


def found(folder: Path, *arguments: str) -> list[str]:
    return ["found", "club", "--task", "builtin/sums", "--state", str(folder), "--no-start", *arguments]


def test_a_swarm_is_founded_once_and_its_folder_runs_without_more_options(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club = tmp_path / "füß ☃"  # a shell would take it for two words
    assert run(found(club, "--listen", "tcp://0.0.0.0:4001", "--rounds", "9"), debug=False) == 0
    assert f"gossamer node --state '{club}'" in capfd.readouterr().out
    assert "belongs to swarm 'club' already" in fails(capfd, *found(club))
    assert run(["node", "--state", str(club), "--dry-run"], debug=False) == 0
    (tmp_path / "printed.toml").write_text(capfd.readouterr().out)
    config = load_config(tmp_path / "printed.toml")
    assert (config.rounds, config.network.listen) == (9, "tcp://0.0.0.0:4001")
    assert [task.name for task in config.tasks] == ["builtin/sums"]


def test_a_founder_is_told_what_the_results_say_is_better_unless_it_is_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rule, weights = "--set sampling.rule=rft", "--set weights.mode=average"
    assert run(found(tmp_path / "open"), debug=False) == 0
    said = capfd.readouterr().err
    assert rule in said and weights not in said, "strangers could spoil the weights"
    assert run(found(tmp_path / "closed", "--policy", "allowlist", "--set", "sampling.rule=rft"), debug=False) == 0
    said = capfd.readouterr().err
    assert rule not in said and weights in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--allow", Identity(bytes(32)).node_id], "an open swarm admits everybody"),
        (["--task", "riddles"], "unknown task 'riddles'"),
        (["--task", "builtin", "--task", "builtin/sums"], "a task twice"),
        (["--task", ""], "unknown task ''"),
    ],
)
def test_what_makes_no_swarm(
    arguments: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capfd, *found(tmp_path / "club"), *arguments)
    assert list(tmp_path.iterdir()) == []
    for name in ("a name", "naïve☃", "x" * 5000):
        said = fails(capfd, "found", name, "--state", str(tmp_path / "new" / "other"), "--no-start")
        assert "a name begins with a letter or digit" in said and "task" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_or_port_in_use_is_told_before_anything_is_loaded_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for heavy in ("node.run", "node.relay"):  # no import of them from here on
        monkeypatch.setitem(sys.modules, heavy, None)
    held, new = tmp_path / "held", tmp_path / "runs" / "new"
    with exclusive(held):
        for verb in (["node"], ["join", EXAMPLE_INVITE], ["found", "club"]):
            line = fails(capfd, *verb, "--state", str(held), "--model", str(tmp_path / "of no interest yet"))
            assert f"another node is running in {held}" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = ["--state", str(new), "--listen", f"tcp://127.0.0.1:{taken.getsockname()[1]}"]
        for verb in (
            ["node", "--model", "builtin"],
            ["node", "--set", "role=relay"],
            ["join", EXAMPLE_INVITE],
            ["found", "club"],
        ):
            assert "is in use: choose another port" in fails(capfd, *verb, *where)
    assert list(tmp_path.iterdir()) == [held]


@pytest.mark.slow
def test_a_folder_is_held_while_what_runs_in_it_is_loaded_and_not_when_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Module:
        @property
        def run_node(self) -> Any:
            with pytest.raises(UserError, match="another node is running"):
                check_free(tmp_path)
            return lambda *_, **__: check_free(tmp_path)

    monkeypatch.setitem(sys.modules, "node.run", Module())
    assert run(["node", "--state", str(tmp_path), "--model", "builtin"], debug=False) == 0
    assert "error" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_found_or_join_that_fails_leaves_a_folder_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    for folder in ("mine", "new"):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            options = ["--task", "builtin/sums", "--state", str(tmp_path / folder), "--listen", endpoint]
            assert run(["found", "club", *options], debug=False) == 2
        assert "is in use" in capfd.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").exists() and not (tmp_path / "new").exists()


def test_an_invite_is_read_from_a_file_or_standard_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = tmp_path / "invite.txt"
    line.write_text(EXAMPLE_INVITE + "\n")
    club = tmp_path / "club"
    assert run(found(club), debug=False) == 0
    capfd.readouterr()
    for way in (str(line), f"@{line}", "-", EXAMPLE_INVITE):
        monkeypatch.setattr("sys.stdin", StringIO(line.read_text()))
        assert run(["join", way, "--state", str(club), "--no-start"], debug=False) == 2
        assert "belongs to another swarm, 'club'" in capfd.readouterr().err  # so the line was read
    assert "cannot read" in fails(capfd, "join", "@" + str(tmp_path / "missing"))
    assert "begins with gossamer://" in fails(capfd, "join", str(tmp_path / "missing"))
    line.write_bytes(b"\xff")
    assert "holds no invite" in fails(capfd, "join", f"@{line}")
    line.write_text(EXAMPLE_INVITE + "x" * 5000)
    assert "at most 4096 characters" in fails(capfd, "join", f"@{line}")


def test_an_invite_that_admits_nobody_is_not_printed_unless_that_is_wanted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club, party = str(tmp_path / "club"), str(tmp_path / "party")
    assert run(found(tmp_path / "club", "--policy", "allowlist"), debug=False) == 0
    assert run(found(tmp_path / "party"), debug=False) == 0
    capfd.readouterr()
    assert "would admit nobody: add --uses N" in fails(capfd, "invite", club, *AT)
    for folder in (club, party):
        says = fails(capfd, "invite", folder, *AT, "--expires", "3d")
        assert "--expires says how long --for or --uses admit" in says
    assert "--no-grant is for an invite that admits nobody" in fails(capfd, "invite", club, "--no-grant", "--uses", "2")
    for arguments in ([club, "--no-grant"], [party]):
        assert run(["invite", *arguments, *AT], debug=False) == 0
        assert Invite.parse(capfd.readouterr().out).grant is None


def test_what_was_invited_is_taken_back_by_its_line_its_node_or_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club = str(tmp_path / "club")
    assert run(found(tmp_path / "club", "--policy", "allowlist"), debug=False) == 0
    node = Identity(bytes(32)).node_id
    capfd.readouterr()
    assert run(["invite", club, *AT, "--uses", "3"], debug=False) == 0
    line = capfd.readouterr().out.strip()
    assert run(["revoke", club, node, line], debug=False) == 0
    said = capfd.readouterr().out
    assert "list 1: 2 revoked" in said and f"start the node in {club} to tell the swarm" in said
    assert f"on the list already: {node}" in fails(capfd, "revoke", club, node)
    assert run(["revoke", club], debug=False) == 0
    listed = capfd.readouterr().out.split()
    assert node in listed and len(listed) == 2
    with exclusive(tmp_path / "club"):  # as a node that runs there
        assert run(["revoke", club, "--undo", *listed], debug=False) == 0
    said = capfd.readouterr().out
    assert "list 2: 0 revoked" in said and f"the node in {club} tells the swarm" in said
    assert f"not on the list: {node}" in fails(capfd, "revoke", club, "--undo", node)
    assert run(["revoke", club], debug=False) == 0
    assert capfd.readouterr().out == "nobody is revoked\n"
    (tmp_path / "club" / "identity.key").unlink()
    Identity.generate().save(tmp_path / "club" / "identity.key")
    line = fails(capfd, "revoke", club, node)
    assert "only the founder of swarm 'club'" in line and "invite" not in line


def test_a_swarm_is_handed_over_once_and_the_old_owner_signs_no_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club, successor = tmp_path / "club", Identity(bytes(32))
    assert run(found(club, "--policy", "allowlist"), debug=False) == 0
    (tmp_path / "next").mkdir()
    successor.save(tmp_path / "next" / "identity.key")
    capfd.readouterr()
    assert run(["identity", "show", str(tmp_path / "next")], debug=False) == 0
    (key,) = [line.split()[1] for line in capfd.readouterr().out.splitlines() if line.startswith("key")]
    assert run(["identity", "hand-over", str(club), key], debug=False) == 0
    capfd.readouterr()
    for again in (["identity", "hand-over", str(club), "ab" * 32], ["invite", str(club), *AT, "--uses", "2"]):
        assert f"({successor.node_id}) can sign this" in fails(capfd, *again)
    for file in ("manifest.bin", "revocations.bin"):  # what the next owner's node gets from its peers
        (tmp_path / "next" / file).write_bytes((club / file).read_bytes())
    assert run(["invite", str(tmp_path / "next"), *AT, "--uses", "3"], debug=False) == 0


def test_an_invite_is_printed_with_the_seeds_and_the_right_that_were_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club, guest = tmp_path / "club", Identity(bytes([1]) * 32)
    assert run(found(club, "--policy", "allowlist"), debug=False) == 0
    seed = f"tcp://[2001:db8::7]:4001?key={'ab' * 32}"
    capfd.readouterr()
    invites = []
    for right in (["--no-grant"], ["--for", guest.node_id], ["--uses", "3", "--expires", "2h"]):
        assert run(["invite", str(club), "--address", seed, *right], debug=False) == 0
        invites.append(Invite.parse(capfd.readouterr().out))
    plain, single, shared = invites
    assert [str(address) for address in plain.seeds] == [seed]
    assert plain.manifest == hashlib.sha256((club / "manifest.bin").read_bytes()).digest()
    assert plain.grant is None
    assert isinstance(single.grant, Pass)
    assert isinstance(shared.grant, SharedInvite)
    assert shared.grant.certificate.uses == 3
    assert 7000 < shared.grant.certificate.expiry_ms / 1000 - time.time() <= 7200
    assert "1 to 4096 uses, not 0" in fails(capfd, "invite", str(club), "--address", seed, "--uses", "0")
    assert "no address of this node is known" in fails(capfd, "invite", str(club), "--no-grant")


BAD_NETWORK = [
    (["--set", 'network.advertise=["foo"]'], "'network.advertise.0': 'foo'"),
    (["--set", 'network.seeds=["tcp://192.0.2.7:1"]'], "has no key: write tcp://HOST:PORT?key=HEX"),
    (["--set", "network.listen=foo"], "'network.listen': 'foo'"),
    (["--set", "network.swarm=beef"], "'network.swarm': a swarm's id has 32 hex digits (got 'beef')"),
    (["--listen", "tcp://nowhere"], "'network.listen': 'tcp://nowhere'"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_NETWORK)
def test_a_bad_endpoint_is_refused_before_it_is_kept(
    arguments: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(found(tmp_path), debug=False) == 0
    before = (tmp_path / "config.json").read_bytes()
    capfd.readouterr()
    assert says in fails(capfd, "node", "--state", str(tmp_path), *arguments)
    assert (tmp_path / "config.json").read_bytes() == before
    assert run(["node", "--state", str(tmp_path), "--dry-run"], debug=False) == 0


def test_every_key_with_all_includes_each_of_trls_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--dry-run", "--all", "--set", "trainer.trl.epsilon_high=0.1"], debug=False) == 0
    printed = capfd.readouterr().out
    assert "\ntrl.epsilon_high = 0.1" in printed
    (tmp_path / "printed.toml").write_text(printed)
    assert load_config(tmp_path / "printed.toml").trainer.trl == {"epsilon_high": 0.1}
    (tmp_path / "live.toml").write_text(re.sub(r"^# (trl\.\w+ = (?=[^ #]))", r"\1", printed, flags=re.MULTILINE))
    set_now = load_config(tmp_path / "live.toml").trainer
    assert set_now.options == TrlOptions(epsilon_high=0.1)
    without_default = {name for name, field in TrlOptions.model_fields.items() if field.default is None}
    assert set_now.trl.keys() == TrlOptions.model_fields.keys() - without_default
    assert all(f"\n# trl.{name} =  # " in printed for name in without_default)


def test_bad_toml_names_file_and_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("rounds = \n")
    line = fails(capfd, "node", str(tmp_path / "bad.toml"))
    assert "bad.toml is not valid TOML" in line
    assert "line 1" in line


def test_debug_shows_the_traceback_and_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "missing.toml", "--debug"], debug=True) == 2
    error = capfd.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: no configuration file")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("node.cli.doctor.examine", broken)
    assert run(["doctor"], debug=False) == 1
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


def test_what_may_go_well_at_another_try_is_one_line_and_lets_a_service_start_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def short(*_: object) -> None:
        raise EngineError("vLLM did not start: no room")

    monkeypatch.setattr("node.cli.doctor.examine", short)
    assert run(["doctor"], debug=False) == 1
    assert capfd.readouterr().err == "error: vLLM did not start: no room\n"


def test_an_end_of_file_somewhere_inside_is_a_defect_and_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def truncated(*_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("node.cli.doctor.examine", truncated)
    assert run(["doctor"], debug=False) == 1
    assert "EOFError: Ran out of input" in capfd.readouterr().err


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("node.cli.doctor.examine", interrupted)
    assert run(["doctor"], debug=False) == 130
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["node.cli.app", "node.cli.join", "typer", "pydantic"])
def test_ctrl_c_while_the_command_is_imported_is_no_error(module: str) -> None:
    code = (
        "import sys\nclass Interrupt:\n def find_spec(self, name, *_):\n"
        "  if name == sys.argv[1]: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\nfrom node.cli import main\nmain(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("role", "module", "function"), [("train", "run", "run_node"), ("relay", "relay", "run_relay")]
)
def test_a_node_that_is_stopped_while_it_starts_says_so(
    role: str, module: str, function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setitem(sys.modules, f"node.{module}", SimpleNamespace(**{function: stopped}))
    before = signal.getsignal(number)
    assert run(["node", "--state", str(tmp_path / "n0"), "--set", f"role={role}"], debug=False) == 0
    assert "stopped while starting" in capfd.readouterr().err.splitlines()[-1]
    assert signal.getsignal(number) is before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Identity.generate().save(tmp_path / "identity.key")
    (tmp_path / "identity.key").chmod(0o644)
    assert "chmod 600" in fails(capfd, "identity", "show", str(tmp_path))


def test_a_full_disk_says_what_to_do() -> None:
    line = explain(OSError(errno.ENOSPC, "No space left on device", "/data/run"))
    assert line == "the disk is full at /data/run: free some space and start again"


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    line = fails(capfd, "swarm", "-n", "1", "--out", str(tmp_path / "file" / "run"))
    assert f"cannot use {tmp_path / 'file' / 'run'} as a run's folder" in line and "--out" in line
    assert "choose another --out" in fails(capfd, "swarm", "-n", "1", "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("verb", [["node"], ["join", EXAMPLE_INVITE]])
def test_a_state_folder_that_is_a_file_is_one_line(
    verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = fails(capfd, *verb, "--state", str(tmp_path / "file"))
    assert str(tmp_path / "file") in line and "choose another path" in line


@pytest.mark.parametrize("text", ["[]", '"x"', "7", "{", "{}"])
def test_a_damaged_config_of_a_folder_is_one_line(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json is damaged: delete it" in fails(capfd, "found", "club", "--state", str(tmp_path), "--no-start")


@pytest.mark.parametrize("name", ["config.json", "settings.json"])
@pytest.mark.parametrize("text", ["[]", '"x"', "7"])
def test_a_memory_that_is_no_table_is_one_line(
    name: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(found(tmp_path), debug=False) == 0
    capfd.readouterr()
    (tmp_path / name).write_text(text)
    line = fails(capfd, "node", "--state", str(tmp_path), "--set", "rounds=1", "--dry-run")
    assert f"{name} is damaged: delete it" in line


def test_dry_run_prints_what_would_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["node", "--set", "sampling.local=2", "--seed", "7", "--set", f"network.seeds=['{SEED}']"]
    assert run([*arguments, "--listen", "tcp://0.0.0.0:4001", "--dry-run"], debug=False) == 0
    (tmp_path / "printed.toml").write_text(capfd.readouterr().out)
    config = load_config(tmp_path / "printed.toml")
    assert (config.sampling.local, config.seed, config.network.seeds) == (2, 7, [SEED])
    assert config.network.listen == "tcp://0.0.0.0:4001"


@pytest.mark.parametrize("verb", ["node", "swarm"])
def test_a_dry_run_refuses_and_warns_of_what_a_start_would(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fails(capfd, verb, "--dry-run", "--set", "engine.max_completion_length=128")
    assert "leaves no room for a question: the policy has 128 positions" in line
    monkeypatch.setattr("node.operations.presets.SMALL", 1000)
    assert run([verb, "--dry-run", "--set", "trainer.learning_rate=1.0"], debug=False) == 0
    assert "note: trainer.learning_rate=1 over 0 M trained weights mostly destroys" in capfd.readouterr().err


def test_a_dry_run_shows_what_people_set_and_what_differs_and_all_of_it_on_request(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    printed = []
    for more in ([], ["--all"]):
        assert run(["node", "--set", "trainer.trl.weight_decay=0.1", "--dry-run", *more], debug=False) == 0
        printed.append(capfd.readouterr().out)
    short, full = (
        {line.split(" = ")[0].lstrip("# ") for line in text.splitlines() if " = " in line} for text in printed
    )
    assert {"learning_rate", "external", "trl"} <= short
    assert "tokens_per_batch" in full - short and len(short) < len(full) / 2
    (tmp_path / "short.toml").write_text(printed[0])
    (tmp_path / "full.toml").write_text(printed[1])
    assert load_config(tmp_path / "short.toml") == load_config(tmp_path / "full.toml")
    assert "[trainer]" in printed[0] and "[buffer]" not in printed[0] and "[buffer]" in printed[1]


@pytest.mark.parametrize("verb", ["node", "swarm"])
def test_a_named_preset_holds_where_nothing_else_is_said(
    verb: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([verb, "--preset", "paper", "--set", "sampling.local=3", "--dry-run"], debug=False) == 0
    (tmp_path / "printed.toml").write_text(capfd.readouterr().out)
    sampling = load_config(tmp_path / "printed.toml").sampling
    assert (sampling.rule, sampling.local, sampling.external) == ("sapo", 3, 4)
    assert sampling.max_surprise == sampling.max_length_ratio == sampling.max_signer_share == 0


def test_the_keys_that_are_shown_first_exist() -> None:
    assert all(map(is_key, COMMON_KEYS)) and len(COMMON_KEYS) <= 27


def test_settings_are_few() -> None:
    tables = {key.rpartition(".")[0] for key in all_keys()}
    assert len([key for key in all_keys() if key not in tables]) <= 70, "make it a constant, or part of another setting"


@pytest.mark.parametrize(
    ("verb", "arguments", "rounds"),
    [
        ("node", [], None),
        ("node", ["--rounds", "7"], 7),
        ("node", ["--set", "rounds=7", "--set", "trainer.trl.lr_scheduler_type=cosine"], 7),
        ("swarm", [], 300),
        ("swarm", ["--set", "trainer.trl.lr_scheduler_type=linear"], 300),
        ("swarm", ["--rounds", "7"], 7),
        ("swarm", ["seven.toml"], 7),
        ("node", ["seven.toml"], 7),
    ],
)
def test_a_node_trains_until_it_is_stopped_and_a_run_of_a_swarm_ends(
    verb: str,
    arguments: list[str],
    rounds: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seven.toml").write_text("rounds = 7\n")
    assert run([verb, *arguments, "--dry-run"], debug=False) == 0
    Path("printed.toml").write_text(capfd.readouterr().out)
    assert load_config(Path("printed.toml")).rounds == rounds


def test_a_swarm_with_a_budget_has_no_last_round_by_default(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["swarm", "--set", "budget.compute=1000", "--dry-run"], debug=False) == 0
    (tmp_path / "printed.toml").write_text(capfd.readouterr().out)
    printed = load_config(tmp_path / "printed.toml")
    assert (printed.rounds, printed.budget.compute) == (None, 1000)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["sampling.local=4", "sampling.questions=1"], "sampling.local=4 has no effect beyond sampling.questions=1"),
        (["network.enabled=false", "network.listen=tcp://0.0.0.0:1"], "network.enabled is false"),
        (["network.enabled=false", f'network.seeds=["{SEED}"]'], "network.enabled is false"),
        (["trainer.trl.warmup_steps=5"], "trainer.trl.warmup_steps has no effect"),
        (["engine.vllm.python=python"], "engine.vllm.python has no effect: engine.kind is 'hf'"),
        (["trainer.trl.loss_type=cispo"], "epsilon_high=0.28 cuts every ratio under 'cispo'"),
        (["trainer.trl.off_policy_mask_threshold=0.5"], "off_policy_mask_threshold has no effect"),
        (["sampling.external=0", "sampling.source=self"], "sampling.external is 0"),
        (["sampling.external=0"], ""),
        (["network.enabled=false"], ""),
        (["sampling.local=4", "sampling.questions=4"], ""),
    ],
)
def test_settings_that_contradict_each_other_are_said_in_one_line(
    settings: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for verb in ("node", "swarm"):
        assert run([verb, *(f"--set={setting}" for setting in settings), "--dry-run"], debug=False) == 0
        said = capfd.readouterr().err.splitlines()
        assert len(said) == bool(says)
        assert all(says in line and line.startswith("note: ") for line in said)


def test_a_model_brings_the_settings_of_its_size_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    size = ModelSize(135_000_000, 30, 576, 1536, 9, 192, 49152, 8192)
    monkeypatch.setattr("node.operations.presets.measure_model", lambda model: {"owner/model": size}[model])
    for verb in ("node", "swarm"):
        arguments = [verb, "--model", "owner/model", "--set", "engine.max_completion_length=24", "--dry-run"]
        assert run(arguments, debug=False) == 0
        printed = capfd.readouterr().out
        (rate,) = [line for line in printed.splitlines() if line.startswith("learning_rate")]
        assert "# for a model of this size: " in rate
        (tmp_path / "printed.toml").write_text(printed)
        config = load_config(tmp_path / "printed.toml")
        assert (config.policy.model, config.trainer.learning_rate) == ("owner/model", 1e-5)
        assert config.engine.max_completion_length == 24
    assert run(found(tmp_path / "club", "--model", "owner/model"), debug=False) == 0
    assert load_config(tmp_path / "club" / "config.json").trainer.learning_rate == 1e-5


def test_a_model_alone_is_evaluated_at_the_lengths_that_it_would_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    size = ModelSize(135_000_000, 30, 576, 1536, 9, 192, 49152, 8192)
    monkeypatch.setattr("node.operations.presets.measure_model", lambda model: {"owner/model": size}[model])
    monkeypatch.setattr(
        "node.operations.presets.detect_machine", lambda *_, **__: Machine(1 << 30)
    )  # where it would train adapters
    config = find_trained("owner/model", ["engine.max_prompt_length=99"]).config
    assert (config.engine.max_prompt_length, config.engine.max_completion_length) == (99, 32)
    assert config.policy.lora.r == 0


def test_a_node_that_has_saved_nothing_yet_is_no_damaged_model(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity.key")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no complete checkpoint yet: wait for its first"):
        find_trained(str(tmp_path), None)


@pytest.mark.parametrize(
    "asked", [["eval", "--count", "2", "--greedy"], ["chat", "12+7="], ["chat", "12+7=", "-n", "4"]]
)
def test_a_model_whose_logits_are_not_finite_says_nothing(
    asked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_diverged_policy(tmp_path)
    verb, *others = asked
    assert run([verb, str(tmp_path), *others], debug=False) == 2
    out, err = capfd.readouterr()
    assert out == "" and "error: the model's logits are not finite" in err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["eval", "chat"])
def test_a_policy_is_asked_by_the_split_of_its_swarm_and_nothing_that_its_node_trains_on(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    club, load, made = tmp_path / "club", load_tasks, list[TaskSet]()
    rows, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    for path in (rows, copy):
        path.write_text("".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(80)))
    config = tmp_path / "club.toml"
    config.write_text('[[tasks]]\nname = "dataset/rows"\noptions = { path = "rows.jsonl" }\n')
    assert run(["found", "club", str(config), "--salt", "7", "--state", str(club), "--no-start"], debug=False) == 0
    (club / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setattr("node.tasks.load_tasks", lambda *arguments: made.append(load(*arguments)) or made[-1])

    def asked(*arguments: str) -> str:
        made.clear()
        assert run([verb, str(club), *arguments], debug=False) == 2  # there is no policy in this checkpoint
        assert {tasks.split for tasks in made} == {Split(salt=7)}
        return capfd.readouterr().err

    said = asked()
    assert len(made) == 1 and ("note: the built-in policy was taught questions" in said) == (verb == "eval")
    asked("--task", str(copy))
    (task,) = made[-1].tasks
    assert task.key.name == "dataset/copy"
    if verb == "eval":
        trained = {question.item.question for question in made[0].questions(0, 60)}
        assert not trained & {item.question for item in made[-1].evaluation(task, 0, 80)}
        rows.unlink()
        assert "note: some of these questions may be trained on: the node's own tasks cannot be read" in asked(
            "--task", str(copy)
        )


def test_a_founder_trains_until_it_is_stopped(tmp_path: Path) -> None:
    assert run(found(tmp_path), debug=False) == 0
    assert load_config(tmp_path / "config.json").rounds is None


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
values = st.recursive(
    plain.filter(lambda value: value is not None),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.builds(TaskConfig, name=texts, options=st.dictionaries(texts, values, max_size=3)), min_size=1), texts
)
def test_printed_configuration_reads_as_itself(tmp_path_factory, tasks: list[TaskConfig], model: str) -> None:
    config = NodeConfig(tasks=tasks, policy={"model": model})
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
