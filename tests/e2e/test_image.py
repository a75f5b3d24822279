"""The container image as far as it goes without Docker: its steps, its commands and its health check, as they stand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.images import Image, placed, read_image
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
            wanted = rest.replace('"', "").replace("${EXTRAS}", image.environment["EXTRAS"]).split()[2:]
            offline = ["--no-index", "--no-build-isolation", "--quiet"]
            done = run([sys.executable, "-m", "pip", "--python", python, "install", *offline, *wanted], None, work)
            assert "does not provide the extra" not in done.stderr


@contextmanager
def running(command: list[str | Path], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    node = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        yield node
    finally:
        node.kill()
        node.communicate()


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
        assert node.poll() is None, node.communicate()[0]
        python, *words = image.health
        looked = run([made.programs / python, *placed(words, places)], environment, tmp_path)
        assert looked.stdout.startswith("healthy")
        node.send_signal(signal.SIGTERM)
        said = node.communicate(timeout=60)[0]
    assert node.returncode == 0 and "model=builtin" in said, said


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
