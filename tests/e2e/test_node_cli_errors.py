"""The command, as a process of its own: what a real node cannot start with is one line."""

import socket
from pathlib import Path

from protocol.identity import Identity
from tests.commands import run
from tests.policies import write_tiny_policy


def errors(*arguments: str) -> list[str]:
    """Return the error lines; the log's own lines carry a level, and are not counted."""
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        (line,) = errors("node", "--state", str(tmp_path), "--model", "builtin", "--listen", endpoint)
    assert "in use" in line and "choose another port" in line


def test_a_key_file_that_is_none_and_one_that_others_read(tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    key.touch(0o600)
    key.write_text("no key\n")
    (line,) = errors("node", "--state", str(tmp_path), "--model", "builtin")
    assert str(key) in line and "restore it" in line
    Identity.generate().save(key)
    key.chmod(0o644)
    (line,) = errors("node", "--state", str(tmp_path), "--model", "builtin")
    assert f"chmod 600 {key}" in line


def test_what_is_said_about_a_key_does_not_stand_in_what_is_printed_of_it(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity.key")
    (tmp_path / "identity.key").chmod(0o660)
    done = run("identity", "show", tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["node", "key"]
    assert "is its owner's alone again" in done.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (line,) = errors("node", "--state", str(tmp_path / "state"), "--set", f"policy.model={tmp_path / 'none'}")
    assert "policy.model" in line and "no such folder" in line


def test_a_state_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = errors("node", "--state", str(tmp_path / "file" / "state"), "--model", "builtin")
    assert "cannot use" in line


ALONE = ["--set", "network.enabled=false", "--set", "threads=1"]


def test_a_node_without_a_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    damaged = tmp_path / "checkpoints" / "checkpoint-5"
    damaged.mkdir(parents=True)
    (damaged / "optimizer.pt").touch()
    (line,) = errors("node", "--state", str(tmp_path), "--model", "builtin", *ALONE)
    assert str(tmp_path / "checkpoints") in line and "restore one" in line
    assert not (tmp_path / "config.json").exists()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    state = tmp_path / "state"
    write_tiny_policy(tmp_path / "one", width=16)
    write_tiny_policy(tmp_path / "other", width=32)
    done = run("node", "--state", str(state), "--rounds", "1", *ALONE, "--set", f"policy.model={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    before = [(state / name).read_bytes() for name in ("config.json", "settings.json")]
    (line,) = errors("node", "--state", str(state), "--rounds", "2", "--model", str(tmp_path / "other"))
    assert "checkpoint-1" in line and "another model" in line
    assert [(state / name).read_bytes() for name in ("config.json", "settings.json")] == before


def test_several_processes_that_cannot_train_together(tmp_path: Path) -> None:
    state, missing, other, old = (tmp_path / name for name in ("state", "none.yaml", "deepspeed.yaml", "fsdp.yaml"))
    other.write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n")
    old.write_text("distributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\n")
    (line,) = errors("node", "--state", str(state), "--set", "role=relay", "--processes", "2")
    assert "a relay trains nothing: leave out --processes" in line
    (line,) = errors("node", "--state", str(state), "--model", "builtin", *ALONE, "--accelerate-config", str(missing))
    assert f"there is no file {missing}" in line
    (line,) = errors("node", "--state", str(state), "--model", "builtin", *ALONE, "--accelerate-config", str(other))
    assert f"{other} cannot be used: this node trains on one machine, data parallel or by FSDP2" in line
    (line,) = errors("node", "--state", str(state), "--model", "builtin", *ALONE, "--accelerate-config", str(old))
    assert "set fsdp_version: 2" in line
