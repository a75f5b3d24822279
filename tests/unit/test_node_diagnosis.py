"""What `gossamer doctor` finds, and what it says to do about it."""

import json
from pathlib import Path

import pytest

from node.cli.app import run
from node.cli.doctor import OF_A_MODEL
from node.operations import diagnosis
from node.operations.diagnosis import Diagnosis, examine, examine_node
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.identity import Identity


def found(name: str, checks: object) -> Diagnosis:
    (one,) = [check for check in checks if check.name == name]  # type: ignore[attr-defined]
    return one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requires", "ok", "says"),
    [
        (["pydantic>=2"], True, "all 1 within their ranges"),
        (["pydantic>=99"], False, "pydantic "),
        (["no-such-thing>=1"], False, "no-such-thing missing, wants >=1"),
        (['no-such-thing>=1; extra == "dev"'], True, "all 0"),
        (['no-such-thing>=1; sys_platform == "amiga"'], True, "all 0"),
    ],
)
def test_what_is_installed_is_held_against_what_is_declared(
    requires: list[str], ok: bool, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    check = found("packages", examine(tmp_path))
    assert check.ok == ok and says in check.text and check.needed


@pytest.mark.slow
def test_a_package_of_others_in_our_folders_is_told_and_how_to_be_rid_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not [check for check in examine(tmp_path) if check.name.startswith("package ")]
    shared = {"node": ["node", "gossamer", "gossamer"], "numpy": ["numpy"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: shared)
    check = found("package node", examine(tmp_path))
    assert not check.ok and check.needed and "pip uninstall node" in check.do


@pytest.mark.slow
def test_an_extra_of_another_version_is_worth_knowing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ['reasoning-gym>=99; extra == "reasoning-gym"'])
    check = found("reasoning-gym", examine(tmp_path))
    assert not check.ok and not check.needed and "wants >=99" in check.text and "pip install" in check.do


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["", "the kernel is of before Linux 6.12"])
def test_what_a_cage_lacks_here_is_worth_knowing(lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis, "lacking", lambda: lacks)
    check = found("cage", examine(tmp_path))
    assert check.ok == (not lacks) and check.text.startswith(lacks or "whole") and not check.needed


@pytest.mark.slow
def test_a_driver_that_torch_makes_no_use_of_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(diagnosis, "NVIDIA", tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", None)
    checks = list(examine(tmp_path))
    assert "built for the CPU" in found("gpu", checks).text and "CUDA build" in found("gpu", checks).do
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "CUDA 13.0" in found("gpu", examine(tmp_path)).do


@pytest.mark.slow
def test_of_several_gpus_it_is_said_which_one_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "AB"[index])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert found("gpu", examine(tmp_path)).text == "A"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (
        found("gpu", examine(tmp_path)).text
        == "A, B; a node trains on the first, those of `gossamer swarm` on each in turn"
    )


@pytest.mark.parametrize(
    ("version", "ok", "needed", "says"),
    [
        (0, True, True, "builtin/sums: as the swarm's"),
        (9, False, True, "builtin/sums"),
        (1, False, False, "builtin/sums has version 1 in the swarm and 2 here"),  # its node starts, and warns
    ],
)
def test_the_swarms_tasks_and_protocol_are_held_against_what_is_here(
    version: int, ok: bool, needed: bool, says: str, tmp_path: Path
) -> None:
    from node.config import TaskConfig
    from node.swarm.agreed_tasks import describe_tasks
    from node.swarm.swarm_folder import save_manifest

    (described,) = describe_tasks([TaskConfig(name="builtin/sums")])
    if version:
        described = ManifestTask(described.name, version, described.config, described.options)
    save_manifest(tmp_path, make_manifest(Identity(bytes(32)), "club", 1, JoinPolicy.OPEN, [described]))
    (tmp_path / "config.json").write_text('{"tasks": [{"name": "builtin/sums"}]}')
    checks = list(examine_node(tmp_path))
    assert found("swarm", checks).ok and "'club', founded on protocol 4.0" in found("swarm", checks).text
    tasks = found("swarm's tasks", checks)
    assert (tasks.ok, tasks.needed) == (ok, needed) and says in tasks.text
    assert "no node is running" in found("node", checks).text


def test_settings_and_a_manifest_that_are_damaged_are_findings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.bin").write_bytes(b"x")
    assert not found("swarm", examine_node(tmp_path)).ok
    (tmp_path / "config.json").write_text("[]")
    assert "damaged" in found("settings", examine_node(tmp_path)).text
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "settings.json").write_text('{"frobnicate": 1}')
    assert found("settings", examine_node(tmp_path)).do == f"gossamer node --state {tmp_path} --forget frobnicate"


def test_a_folder_that_others_can_look_into_is_worth_knowing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tmp_path.chmod(0o700)
    assert not [check for check in examine_node(tmp_path) if check.name == "privacy"]
    tmp_path.chmod(0o755)
    assert found("privacy", examine_node(tmp_path)).do == f"chmod 700 {tmp_path}"


def test_what_has_to_be_mended_makes_it_fail_and_json_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Diagnosis("a", True, "1"),
        Diagnosis("b", False, "2", needed=False, do="maybe"),
        Diagnosis("c", False, "3", do="must"),
    ]
    monkeypatch.setattr("node.cli.doctor.examine", lambda *_: iter(findings))
    arguments = ["doctor", "--state", str(tmp_path)]
    assert run(arguments, debug=False) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["✓", "a", "1"],
        ["!", "b", "2"],
        ["→", "maybe"],
        ["✗", "c", "3"],
        ["→", "must"],
        [],
        ["to", "be", "mended:", "c;", "1", "worth", "knowing"],
    ]
    assert run([*arguments, "--json"], debug=False) == 1
    told = json.loads(capfd.readouterr().out)
    assert not told["ok"] and [check["do"] for check in told["checks"]["This machine"]] == ["", "maybe", "must"]
    findings.pop()
    assert run(arguments, debug=False) == 0


@pytest.mark.parametrize(
    "given", [("--model", "builtin"), ("--set", "rounds=3"), ("--gpu", "24GB"), ("--processes", "2")]
)
def test_a_swarm_is_looked_at_alone(given: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--swarm", "no invite", *given], debug=False) == 2
    assert f"leave out --model, {OF_A_MODEL}" in capfd.readouterr().err
