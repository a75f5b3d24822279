"""The image and the compose file without Docker: their steps, commands and health checks, as they stand."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from node.telemetry.status_server import ask
from protocol.identity import Identity
from tests.images import Image, command_of, placed, read_compose, read_image
from tests.swarms import ROOT, rows_of
from tests.waiting import wait_until

# What the hub has of the model that is asked for its size.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def environment_of(image: Image, places: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    said = zip(image.environment, placed(list(image.environment.values()), places), strict=True)
    return kept | dict(said) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def copied_as_docker_does(source: str, target: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    assert f"!{source}" in rules, f".dockerignore keeps {source} from the image"
    if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target / source, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(ROOT / source, target)


def run(
    command: list[str | Path], environment: dict[str, str] | None, folder: Path
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(image: Image, venv: Path, work: Path) -> None:
    """Do the image's steps into a virtual environment that has what this interpreter has, but for gossamer."""
    python = venv / "bin" / "python"
    run([sys.executable, "-m", "venv", "--without-pip", venv], None, venv.parent)
    packages = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work.mkdir(parents=True)
    for word, rest in image.steps:
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                copied_as_docker_does(source, work)
        elif word == "RUN" and rest.startswith("pip "):
            rest = rest.replace("--constraint constraints.txt", "")  # offline there is what this interpreter has
            wanted = rest.replace('"', "").replace("${EXTRAS}", image.environment["EXTRAS"]).split()[2:]
            offline = ["--no-index", "--no-build-isolation", "--quiet"]
            done = run([sys.executable, "-m", "pip", "--python", python, "install", *offline, *wanted], None, work)
            assert "does not provide the extra" not in done.stderr


@contextmanager
def running(command: list[str | Path], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block lasts; what it prints goes into the file `printed` in its folder."""
    with (folder / "printed").open("ab") as printed:
        node = subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    try:
        yield node
    finally:
        node.kill()
        node.wait()


def stop(nodes: Mapping[Path, subprocess.Popen[bytes]]) -> None:
    """Ask the nodes in these folders to stop, once each, and wait until all have."""
    for node in nodes.values():
        node.terminate()
    for folder, node in nodes.items():
        assert node.wait(100) == 0, (folder / "printed").read_text()


class Made(NamedTuple):
    """The image as made here: its programs, and where its places are on this machine."""

    programs: Path
    places: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("image")
    build(read_image("cpu"), folder / "venv", folder / "work")
    return Made(folder / "venv" / "bin", {"/opt/gossamer": str(folder / "work")})


def places_of(made: Made, state: Path) -> dict[str, str]:
    free = {"tcp://0.0.0.0:4001": "tcp://127.0.0.1:0", "host=0.0.0.0": "host=127.0.0.1", "port=8000": "port=0"}
    return made.places | free | {"/state": str(state)}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_image_without_a_gpu_is_made_trains_the_builtin_policy_and_is_healthy(made: Made, tmp_path: Path) -> None:
    image, places = read_image("cpu"), places_of(made, tmp_path)
    environment = environment_of(image, places)
    *tini, program = image.entrypoint
    assert tini == ["tini", "--"]
    with running([made.programs / program, *placed(image.command, places)], environment, tmp_path) as node:
        wait_until(lambda: len(rows_of(tmp_path)) > 2 or node.poll() is not None, 100, "rounds")
        assert node.poll() is None, (tmp_path / "printed").read_text()
        python, *words = image.health
        looked = run([made.programs / python, *placed(words, places)], environment, tmp_path)
        assert looked.stdout.startswith("healthy")
        stop({tmp_path: node})
    assert "model=builtin" in (tmp_path / "printed").read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_image_for_a_gpu_trains_qwen3_from_the_hubs_cache_in_its_volume(made: Made, tmp_path: Path) -> None:
    image, places = read_image("gpu"), places_of(made, tmp_path)
    model = tmp_path / "hub" / "hub" / "models--Qwen--Qwen3-0.6B"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0")
    (model / "snapshots" / "0").mkdir(parents=True)
    (model / "snapshots" / "0" / "config.json").write_text(json.dumps(QWEN3))
    words = [made.programs / image.entrypoint[-1], *placed(image.command, places), "--dry-run"]
    config = tomllib.loads(run(words, environment_of(image, places), tmp_path).stdout)
    assert config["policy"]["model"] == "Qwen/Qwen3-0.6B"
    assert config["trainer"]["learning_rate"] == 3e-6, "the preset of a model of its size"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(image.environment["EXTRAS"].split(",")) <= set(extras)


class Service(NamedTuple):
    """A service of the compose file as processes of this machine."""

    command: list[str]
    health: list[str]
    state: Path
    environment: dict[str, str]

    def is_healthy(self) -> bool:
        looked = subprocess.run(self.health, cwd=self.state, env=self.environment, capture_output=True, timeout=20)
        return looked.returncode == 0


def services_of(compose: dict[str, Any], image: Image, volumes: Path) -> dict[str, Service]:
    """Return what the services run, their volumes in folders here, each at a loopback address of its own."""
    hosts = {name: f"127.77.{os.getpid() % 256}.{number}" for number, name in enumerate(compose["services"], 1)}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = {}
    for name, service in compose["services"].items():
        mounted = dict(reversed(mount.split(":")[:2]) for mount in service["volumes"])
        assert set(mounted.values()) <= compose["volumes"].keys()
        made = next(rest for word, rest in image.steps if word == "RUN" and "install -d" in rest)
        assert set(mounted) <= set(made.split()), "a volume of Docker's belongs to root where the image has no folder"
        places = {path: str(volumes / volume) for path, volume in mounted.items()} | {"0.0.0.0": hosts[name]}
        places |= {f"//{other}:": f"//{host}:" for other, host in hosts.items()}
        for volume in mounted.values():
            (volumes / volume).mkdir(exist_ok=True)
        environment = environment_of(image, places) | {"PATH": programs, "PYTHONPATH": str(ROOT)}
        command, health = placed(command_of(service, image), places), placed(image.health, places)
        found[name] = Service(command, health, Path(places["/state"]), environment)
    return found


@contextmanager
def up(compose: dict[str, Any], services: dict[str, Service]) -> Iterator[None]:
    """Start the services in the order that they depend on one another; they have to end in order when asked to."""
    with ExitStack() as stack:
        started: dict[Path, subprocess.Popen[bytes]] = {}
        for name in sorted(services, key=lambda name: len(compose["services"][name].get("depends_on", ()))):
            for other, wish in compose["services"][name].get("depends_on", {}).items():
                assert wish == {"condition": "service_healthy"}
                wait_until(services[other].is_healthy, 100, f"{other} to be healthy")
            one = services[name]
            started[one.state] = stack.enter_context(running(one.command, one.environment, one.state))
        yield
        stop(started)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_compose_files_nodes_train_on_one_anothers_groups_and_again_after_a_restart(tmp_path: Path) -> None:
    compose = read_compose()
    services = services_of(compose, read_image(compose["services"]["node1"]["build"]["args"]["VARIANT"]), tmp_path)
    relay, board, *nodes = (service.state for service in services.values())
    assert len(nodes) == 3
    page = f"http://{services['board'].command[-3]}:8080/swarm.json"
    invite = tmp_path / "shared" / "invite"

    def external(folder: Path) -> int:
        return sum(row["groups_external"] for row in rows_of(folder))

    def reported() -> set[str]:
        with urllib.request.urlopen(page, timeout=20) as answer:
            return {node["id"] for node in json.load(answer)["nodes"]}

    with up(compose, services):
        wait_until(lambda: all(external(node) > 0 for node in nodes), 300, "each node to train on others' groups")
        wait_until(lambda: all(len(ask(node)["peers"]) == 4 for node in nodes), 100, "each node to know the others")
        ids = {Identity.load(node / "identity.key").node_id for node in nodes}
        wait_until(lambda: reported() >= ids, 100, "the board to show each node")
    first, before = invite.read_text(), [external(node) for node in nodes]
    assert "@127.77." in first
    with up(compose, services):
        wait_until(
            lambda: all(external(node) > n for node, n in zip(nodes, before, strict=True)), 300, "the nodes to go on"
        )
    assert invite.read_text().startswith(first.strip())
    assert not (relay / "checkpoints").exists() and not (board / "checkpoints").exists()
