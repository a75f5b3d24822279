"""A first start that is cut off or fails: the next one is the same node, or is told that nothing was started."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from node.api import Node
from node.cli.app import run as run_command
from node.config import NodeConfig
from node.errors import UserError
from node.state_folder import exclusive, first_start, recall
from node.swarm import founding, joining, swarm_folder
from protocol import storage
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address, Endpoint
from protocol.identity import Identity
from protocol.joiner import FetchedManifest
from tests.commands import FORK, run, start
from tests.policies import write_tiny_policy
from tests.swarms import events_of
from tests.waiting import wait_until

LISTEN = ["--listen", "tcp://127.0.0.1:0"]
NOTHING = "no node was started in"


def hang(*_: object, **__: object) -> None:
    """Stand in for a model that takes for ever to load or to download."""
    while True:
        time.sleep(3600)


def model_at_next_start(folder: Path) -> str:
    """Return what a requeued job, which names no model, would train."""
    again = run("node", "--state", folder, *LISTEN, "--set", "trainer.stop_grace=10", "--dry-run")
    assert again.returncode == 0, again.stderr
    return next(line for line in again.stdout.splitlines() if line.startswith("model = "))


@pytest.mark.parametrize("alone", [False, True], ids=["in a network", "alone"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_first_start_that_is_cut_off_while_its_model_loads_trains_that_model_at_the_next(
    number: signal.Signals, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.run.load_policy", hang)  # of the command, too: it is forked from here
    folder, model = tmp_path / "n0", tmp_path / "model"
    write_tiny_policy(model)
    settings = ["--set", "sampling.local=3", *(["--set", "network.enabled=false"] if alone else [])]
    child = start(tmp_path, "node", "--state", folder, "--model", model, *LISTEN, *settings)
    try:
        if alone:
            wait_until(lambda: events_of(folder, "loading") or child.exitcode is not None, 60, "the model to load")
        else:
            wait_until(lambda: (folder / "identity.key").exists() or child.exitcode is not None, 60, "the key")
        os.kill(child.pid or 0, number)
        child.join(60)
        assert child.exitcode == (0 if number == signal.SIGTERM else -number), (tmp_path / "stderr").read_text()
    finally:
        child.kill()
        child.join()
    assert str(model) in model_at_next_start(folder)
    assert recall(folder).settings["sampling"] == {"local": 3}


def make_invite(folder: Path) -> tuple[Invite, FetchedManifest]:
    manifest = founding.found(NodeConfig(role="relay"), folder, "club", JoinPolicy.OPEN, [])
    address = Address(Endpoint("127.0.0.1", 9), Identity.load(folder / "identity.key").curve_key)
    return Invite("club", manifest.hash, (address,)), FetchedManifest(manifest, b"")


def command(*arguments: object) -> None:
    run_command([str(argument) for argument in arguments], debug=False)


def train_from_a_program(folder: Path, model: Path, _: Invite) -> None:
    Node(str(model), tasks=["builtin/sums"], folder=folder, network={"listen": "tcp://127.0.0.1:0"}).train(1)


STARTS: Mapping[str, Callable[[Path, Path, Invite], None]] = {
    "node": lambda folder, model, _: command("node", "--state", folder, "--model", model, *LISTEN),
    "relay": lambda folder, model, _: command("node", "--state", folder, "--set", "role=relay", *LISTEN),
    "found": lambda folder, model, _: command("found", "a", "--state", folder, "--model", model, "--no-start"),
    "join": lambda folder, model, invite: command("join", invite, "--state", folder, "--model", model, "--no-start"),
    "board": lambda folder, _, invite: command("board", invite, "--state", folder, *LISTEN, "--port", "0"),
    "program": train_from_a_program,
}


def cut_off(begin: Callable[[], object], after: int) -> bool:
    """Run `begin` in a process that is killed once it has written `after` files; tell whether it came so far."""
    sync, written = storage.sync_folder, []

    def sync_and_die(folder: Path) -> None:
        sync(folder)
        written.append(folder)
        if len(written) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    def main() -> None:
        storage.sync_folder = sync_and_die
        begin()

    child = FORK.Process(target=main)
    child.start()
    child.join(60)
    is_alive = child.is_alive()
    child.kill()
    child.join()
    assert not is_alive, "it neither ended nor was killed"
    return child.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kind", STARTS)
def test_whichever_file_is_written_last_before_a_kill_the_next_start_is_the_same_or_is_told_of_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite, fetched = make_invite(tmp_path / "founder")
    monkeypatch.setattr(joining, "fetch_manifest", lambda *_: fetched)
    monkeypatch.setattr("node.run.load_policy", lambda *_, **__: os._exit(0))  # the start has come far enough
    monkeypatch.setattr("node.relay.MetricsLog", lambda *_: os._exit(0))
    model = tmp_path / "model"
    write_tiny_policy(model)
    after, keys = 1, 0
    while cut_off(partial(STARTS[kind], folder := tmp_path / f"n{after}", model, invite), after):
        after += 1
        if not (folder / "identity.key").exists():
            continue
        keys += 1
        memory = recall(folder)
        if not memory.settings:
            again = run("node", "--state", folder, *LISTEN, "--dry-run")
            assert (again.returncode, again.stderr.count("\n")) == (2, 1) and NOTHING in again.stderr
        elif kind in ("relay", "board"):
            assert memory.settings["role"] == "relay"
        else:
            assert str(model) in model_at_next_start(folder)
        if kind == "join" and memory.settings:
            assert swarm_folder.load_manifest(folder) is not None
    assert keys
    assert (folder / "identity.key").exists() and recall(folder).settings


def test_a_first_start_that_fails_leaves_nothing_that_the_next_one_would_be_told_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "n0", tmp_path / "model"
    write_tiny_policy(model)
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise UserError("no such model on the hub")

        patch.setattr("node.run.load_policy", fail)
        bad = run("node", "--state", folder, "--model", model, *LISTEN, "--set", "trainer.learning_rate=0.5")
        assert bad.returncode == 2 and "no such model on the hub" in bad.stderr and "listening" in bad.stderr
    assert not recall(folder).settings and not (folder / "identity.key").exists()
    other = run("node", "--state", folder, "--model", "builtin", "--dry-run")
    assert 'model = "builtin"' in other.stdout and "learning_rate = 0.5" not in other.stdout


def test_a_start_that_fails_keeps_a_key_that_it_was_given_and_what_an_earlier_one_ran_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("no such model on the hub")

    monkeypatch.setattr("node.run.load_policy", fail)
    given, founded = tmp_path / "given", tmp_path / "founded"
    given.mkdir()
    Identity.generate().save(given / "identity.key")
    make_invite(founded)
    key, settings = (given / "identity.key").read_bytes(), (founded / "settings.json").read_bytes()
    for folder in (given, founded):
        failed = run("node", "--state", folder, "--model", "builtin", *LISTEN, "--set", "role=train")
        assert failed.returncode == 2 and "no such model on the hub" in failed.stderr
    assert (given / "identity.key").read_bytes() == key and not recall(given).settings
    assert (founded / "settings.json").read_bytes() == settings


@pytest.mark.parametrize("fails", ["node.cli.running.check_model", "node.run.load_policy"])
@pytest.mark.parametrize("had_key", [True, False], ids=["with a key", "without a key"])
def test_a_start_that_fails_after_one_that_was_cut_off_leaves_what_that_one_was_set_to(
    fails: str, had_key: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job that names no model goes on with the first start's, whatever somebody tried meanwhile."""
    folder, model, other = tmp_path / "n0", tmp_path / "model", tmp_path / "other"
    for path in (model, other):
        write_tiny_policy(path)
    with (
        pytest.raises(KeyboardInterrupt),
        exclusive(folder),
        first_start(NodeConfig(policy={"model": str(model)}), folder),
    ):
        if had_key:
            Identity.generate().save(folder / "identity.key")
        raise KeyboardInterrupt
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert ("identity.key" in kept) is had_key and "settings.json" in kept

    def fail(*_: object, **__: object) -> None:
        raise UserError("no such model on the hub")

    with monkeypatch.context() as patch:
        patch.setattr(fails, fail)
        for tried in (other, model):
            bad = run("node", "--state", folder, "--model", tried, *LISTEN, "--set", "trainer.learning_rate=0.5")
            assert bad.returncode == 2 and "no such model on the hub" in bad.stderr
    assert (folder / "identity.key").exists() is had_key
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert str(model) in model_at_next_start(folder)


def test_a_folder_with_a_key_alone_is_no_node_of_the_built_in_policy(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity.key")
    refused = run("node", "--state", tmp_path, *LISTEN, "--set", "trainer.stop_grace=10", "--dry-run")
    assert refused.returncode == 2 and f"{NOTHING} {tmp_path} yet" in refused.stderr
    with pytest.raises(UserError, match=NOTHING):
        Node(folder=tmp_path)
    for said in (["--model", "builtin"], ["--task", "builtin/sums"], ["--set", "role=relay"]):
        assert run("node", "--state", tmp_path, *said, "--dry-run").returncode == 0
    assert Node("builtin", folder=tmp_path).round == 0
