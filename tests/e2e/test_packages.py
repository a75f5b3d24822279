"""What is built and installed: `python -m build`, the wheel in an environment of its own, and the demo from it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gossamer import Exchange

from node.config import parse_config
from node.swarm.founding import found
from node.swarm.inviting import make_invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from tests.chat_server import chat_server, says, sum_of

ROOT = Path(__file__).resolve().parents[2]
# What nobody imports, and a node cannot do without.
DATA = {
    "node/cli/demo.toml",
    "node/policy/builtin/model.safetensors",
    "node/policy/builtin/tokenizer.json",
    "node/telemetry/dashboard/static/index.html",
    "node/telemetry/dashboard/static/uPlot.LICENSE",
    "node/telemetry/report.html.j2",
    "collectives/py.typed",
    "gossamer/py.typed",
    "node/py.typed",
    "protocol/py.typed",
}
NOT_COPIED = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")  # a build writes into its folder
TOP_LEVEL = {"gossamer", "node", "collectives", "protocol"}
# Files of a user's, in the folder where the command is given; to import one of them is an error at once.
USERS_FILES = ("node.py", "collectives.py", "protocol.py", "benchmarks.py", "tests.py", "torch.py", "rich.py")


def run(*command: str | Path, limit: float = 100, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=limit, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# What each extra is for, in a line of Python; `dev` is for the tests, and vLLM is several GB for a GPU.
PURPOSES = {
    "bitsandbytes": "from bitsandbytes.optim import AdamW8bit; from bitsandbytes.nn import Linear4bit",
    "gguf": "from transformers.utils import is_gguf_available; assert is_gguf_available()",
    "math": "from trl.rewards import accuracy_reward as score; "
    "assert score([[{'content': r'\\boxed{\\frac{2}{4}}'}]], [r'$\\frac{1}{2}$']) == [1.0]",
    "ray": "import node.fleet.ray_cluster, ray; from ray.util import placement_group",
    "reasoning-gym": "import reasoning_gym; next(iter(reasoning_gym.create_dataset('leg_counting', size=1, seed=1)))",
    "serve": "from transformers.cli.serve import Serve; from transformers.utils import import_utils; "
    "assert import_utils.is_serve_available()",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "trackio": "import trackio",
    "verifiers": "import node.tasks.verifiers.episodes",
    "wandb": "import wandb",
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A wheel, and an environment that has it and what it needs, from the index that pip knows; gone afterwards."""
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, limit=1500)
    yield wheel, folder / "venv"
    shutil.rmtree(folder)


def test_each_extra_has_a_purpose_that_is_tried() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(PURPOSES) == set(extras) - {"dev", "vllm"}


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("extra", sorted(PURPOSES))
def test_an_extra_alone_brings_what_it_is_for(extra: str, clean: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is installed beside the same clean environment, into one that sees that."""
    wheel, base = clean
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    Path(run(python, "-c", where).strip(), "base.pth").write_text(run(base / "bin/python", "-c", where))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, f"gossamer[{extra}] @ {wheel.as_uri()}", env=environment, limit=600)
    run(python, "-c", PURPOSES[extra], cwd=tmp_path, env=environment)
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_machine_that_only_answers_needs_the_packages_of_its_own_list_alone(tmp_path: Path) -> None:
    """As docs/answer.md installs it: it joins, answers and ends, and torch is not there."""
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pip = [tmp_path / "venv/bin/pip", "install", "--quiet"]
    run(*pip, "-r", tmp_path / "source/examples/answer-requirements.txt", env=environment, limit=600)
    run(*pip, "--no-deps", tmp_path / "source", env=environment, limit=300)
    config = parse_config({"tasks": [{"name": "builtin/sums"}]})
    found(config, tmp_path / "first", "club", JoinPolicy.OPEN, [])
    with Exchange(tmp_path / "first") as peer, chat_server(lambda body: says(str(sum_of(body)), "no")) as (url, _):
        own = [Address.parse(peer.address or "")]
        (tmp_path / "invite").write_text(str(make_invite(tmp_path / "first", [], own=own)))
        words = ["answer", "@invite", "--url", url, "--model", "tiny", "--completions", "2", "--questions", "3"]
        said = run(tmp_path / "venv/bin/gossamer", *words, cwd=tmp_path, env=environment)
        assert said.startswith("3 questions, 6 answers, mean reward 0.500, 3 groups published")
        assert len(peer.draw(4, least=3)) == 3
    run(tmp_path / "venv/bin/python", "-c", "import importlib.util; assert importlib.util.find_spec('torch') is None")


@pytest.mark.slow
def test_the_wheel_holds_what_the_demo_needs_and_nothing_of_a_users_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", tmp_path / "source")
    (wheel,) = (tmp_path / "dist").glob("*.whl")  # made from the archive of the sources, which is thereby complete
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
    assert names >= DATA
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == TOP_LEVEL
    files = {str(path.relative_to(ROOT)) for folder in TOP_LEVEL for path in (ROOT / folder).rglob("*.py")}
    modules = {name.removeprefix("node/public/") for name in files}  # `gossamer` is in node/public here
    of_checkouts = {name for name in modules if name.startswith("collectives/simulator/")}
    assert of_checkouts and names.isdisjoint(of_checkouts)
    assert names >= modules - of_checkouts
    with tarfile.open(archive) as sources:
        assert {"LICENSE", "README.md", "pyproject.toml"} <= {name.partition("/")[2] for name in sources.getnames()}

    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # What this interpreter has, torch and the like, but for gossamer: an editable install is a .pth, and not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    home = tmp_path / "home"
    home.mkdir()
    for name in USERS_FILES:
        (home / name).write_text("raise SystemExit('a file of the user was imported')\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    gossamer = environment / "bin" / "gossamer"
    said = run(
        gossamer, "demo", "-n", "2", "--rounds", "2", "--out", "demo", "--set", "eval.every=0", cwd=home, env=clean
    )
    assert "mean reward" in said
    assert (home / "demo" / "report.html").stat().st_size > 10_000
    metrics = [len((home / f"demo/nodes/n{node}/metrics.jsonl").read_text().splitlines()) for node in (0, 1)]
    assert metrics == [2, 2]
    (line,) = run(python, "-c", "import node; print(node.__file__)", cwd="/", env=clean).splitlines()
    assert line.startswith(str(environment))
