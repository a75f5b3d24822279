"""Facts about the project itself that a change can break without any other test noticing."""

import ast
import configparser
import importlib
import importlib.metadata
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from node.cli.app import EXIT_USER_ERROR, app
from node.processes.signals import signals_to_stop

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("node", "collectives", "protocol", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_BUILTIN_BYTES = 5_000_000

# Files of `node/cli/` whose name says what they are: a verb's.
VERBS = {"evaluate" if group.name == "eval" else group.name for group in typer.main.get_command(app).commands.values()}

# Run by another interpreter, in an environment that has what they compare us with.
FOREIGN = {
    "benchmarks/hivemind_peers.py": "hivemind",
    "benchmarks/pccl_rank.py": "pccl",
    "benchmarks/spread_peer.py": "libtorrent",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


DOORS = [str(path.relative_to(ROOT)) for path in sources(*PACKAGES[:3]) if path.name == "__init__.py"]


def text_files() -> Iterator[Path]:
    folders = (*PACKAGES, "tests", "examples", "docs", ".ci")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    for path in (*ROOT.iterdir(), *nested):
        readable = path.suffix in {"", ".py", ".toml", ".md", ".sh", ".j2", ".json", ".txt", ".cfg", ".ini"}
        written = path.name not in {".git", "sbom.json"}  # what others say is in these
        if path.is_file() and readable and written and path != Path(__file__).resolve():
            yield path


def modules() -> list[str]:
    names = []
    for path in sources(*PACKAGES):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    foreign = {file.removesuffix(".py").replace("/", ".") for file in FOREIGN}
    return [name for name in names if not name.endswith("__main__") and name not in foreign]


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0:
            roots.add(statement.module.partition(".")[0])
    foreign = FOREIGN.get(str(path.relative_to(ROOT)), "")
    return roots - set(sys.stdlib_module_names) - {*PACKAGES, "gossamer", "examples", foreign}


def imported_distributions(*folders: str) -> set[str]:
    by_root = importlib.metadata.packages_distributions()
    roots = {root for path in sources(*folders) for root in imported_roots(path)}
    return {name.lower().replace("_", "-") for root in roots for name in by_root.get(root, [root])}


SLOW = {"node.tasks.verifiers.episodes"}  # imports verifiers, for seconds, and its own tests import it too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in modules()]
)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_folder_of_code_is_a_package() -> None:
    bare = {
        str(path.parent.relative_to(ROOT)) for path in sources(*PACKAGES) if not (path.parent / "__init__.py").exists()
    }
    assert not bare, "import-linter and the wheel miss folders without __init__.py"


@pytest.mark.parametrize(
    "door", [str(path.relative_to(ROOT)) for path in sources(*PACKAGES[:3]) if path.name == "__init__.py"]
)
def test_a_folders_door_names_all_that_is_in_it(door: str) -> None:
    path = ROOT / door
    named = set(re.findall(r"\w+", ast.get_docstring(ast.parse(path.read_text())) or ""))
    files = {file.stem for file in path.parent.glob("*.py") if not file.stem.startswith("_")}
    folders = {folder.parent.name for folder in path.parent.glob("*/__init__.py")}
    unsaid = VERBS if path.parent.name == "cli" else set()
    assert not (files | folders) - named - unsaid


def test_what_is_imported_is_declared() -> None:
    optional = PROJECT["optional-dependencies"]
    named = ("vllm", "bitsandbytes", "reasoning-gym", "verifiers", "ray")
    extras = [item for name in named for item in optional[name]]
    declared = distribution_names(PROJECT["dependencies"] + extras)
    assert imported_distributions(*PACKAGES) <= declared
    assert imported_distributions("examples") <= declared | distribution_names(optional["gguf"])


def test_what_is_declared_is_used() -> None:
    assert not distribution_names(PROJECT["dependencies"]) - imported_distributions(*PACKAGES)


def test_what_ci_and_the_images_are_made_with_is_within_the_ranges() -> None:
    """`make constraints` writes it anew after a change of the ranges."""
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    ours, *dev = map(Requirement, extras["dev"])
    lines = PROJECT["dependencies"] + [line for name in {"vllm", *ours.extras} for line in extras[name]]
    wrong = {
        item.name
        for item in (*map(Requirement, lines), *dev)
        if item.name != "torch"  # its build is the machine's choice
        and (item.marker is None or item.marker.evaluate({"python_version": "3.11"}))
        and not item.specifier.contains(versions.get(canonicalize_name(item.name), "0"))
    }
    assert not wrong
    assert "--constraint constraints.txt" in (ROOT / "Dockerfile").read_text()
    assert "CONSTRAINTS=.ci/constraints.txt" in (ROOT / ".ci" / "run").read_text()


def test_torch_is_a_range_and_no_local_build_is_named() -> None:
    torch = next(item for item in PROJECT["dependencies"] if item.startswith("torch"))
    assert "==" not in torch
    assert not any("+cpu" in item for item in PROJECT["dependencies"])


def test_the_installed_version_is_the_projects() -> None:
    assert importlib.metadata.version("gossamer") == PROJECT["version"]


def test_the_builtin_policy_stays_small() -> None:
    size = sum(
        path.stat().st_size
        for path in (ROOT / "node/policy/builtin").rglob("*")
        if path.suffix in {".safetensors", ".json"}
    )
    assert 0 < size <= MAX_BUILTIN_BYTES


def test_no_file_names_a_registry_or_a_folder_of_some_machine() -> None:
    hosts = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org"
    pattern = re.compile(rf"{hosts}|(?<![\w.])/(?:work|root|opt/wheels)/|(?<![\w.])/(?:home|Users)/\w")
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    }
    assert not found


# Linux, some of them as root, or else there is nothing to test; pytest prints which and why (-ra).
MAY_SKIP = {
    "test_node_machine.py": "glibc",
    "test_node_cage.py": "Landlock, and root to become somebody else",
    "test_node_tasks_caged.py": "Landlock",
    "test_node_tasks_verifiers.py": "Landlock",
    "test_benchmarks_allreduce.py": "network namespaces",
    "test_benchmarks_gossip.py": "network namespaces",
    "test_protocol_interop.py": "Node.js and npm",
    "test_protocol_hostile.py": "/proc, and loopback addresses beside the first",
    "test_protocol_nat.py": "network namespaces",
    "test_swarm_home.py": "network namespaces, and for one miniupnpd",
    "test_tutorials.py": "network namespaces",
    "test_collectives_links.py": "network namespaces",
    "test_collectives_local.py": "abstract Unix sockets, shared memory",
    "test_collectives_memory.py": "shared memory",
    "test_collectives_reduce.py": "shared memory",
    "test_node_serve.py": "the extra serve, which no other test needs",
    "test_collectives_torch.py": "shared memory",
    "test_collectives_torch_lines.py": "network namespaces",
}


def test_no_test_is_skipped_or_marked_flaky() -> None:
    pattern = re.compile(r"mark\.(skip|skipif|xfail|flaky)|pytest\.(skip|importorskip|xfail)\(")
    here = Path(__file__).resolve()
    found = {path.name for path in sources("tests") if path != here and pattern.search(path.read_text())}
    assert found == set(MAY_SKIP)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.slow
def test_the_demo_installs_what_a_node_needs_and_the_tests_install_the_rest_into_the_same_environment(
    tmp_path: Path,
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()

    def installed_by(target: str) -> list[str]:
        command = ["make", "--dry-run", "--no-print-directory", "-C", str(tmp_path), target]
        return re.findall(r"--editable '\.\[(\w+)\]'", subprocess.run(command, capture_output=True, text=True).stdout)

    assert installed_by("demo") == installed_by("real") == ["gguf"]
    assert installed_by("test") == ["dev"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed-node").touch()
    assert installed_by("demo") == []
    assert installed_by("test") == ["dev"]


@pytest.mark.parametrize("document", ["README.md", ".ci/run"])
def test_the_make_targets_that_are_named_exist(document: str) -> None:
    named = re.findall(
        r"^(?:step \S+ |[ $]*)make (?:--no-print-directory )?([a-z]+)",
        (ROOT / document).read_text(),
        flags=re.MULTILINE,
    )
    assert named
    assert set(named) <= make_targets()


@pytest.mark.parametrize("page", ["learning", "protocol", "sharing"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    named = set(re.findall(r"test_\w+", re.sub(r"test_\w+\.py", "", (ROOT / f"docs/{page}.md").read_text())))
    there = {
        name for path in sources("tests") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    unknown = {name for name in named if name not in there and not name.endswith("_")}
    assert len(named) > 5
    assert unknown == set()


def test_the_service_starts_what_there_is_and_stays_down_where_a_person_is_needed() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(ROOT / "examples" / "gossamer.service")
    service = unit["Service"]
    _, verb, *arguments = shlex.split(service["ExecStart"])
    known = {option for parameter in typer.main.get_command(app).commands[verb].params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known
    state = Path(arguments[arguments.index("--state") + 1])
    assert state.parent == Path("/var/lib") / service["StateDirectory"]
    assert service["RestartPreventExitStatus"].split() == ["0", str(EXIT_USER_ERROR)]
    assert getattr(signal, service["KillSignal"]) in signals_to_stop()


def test_the_commands_in_the_readme_parse() -> None:
    """Each verb exists and knows the options it is shown with."""
    verbs = typer.main.get_command(app).commands
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^ +[$ ]*gossamer +([^# ].*)$", text, re.MULTILINE)
    ]
    assert commands
    for verb, *arguments in commands:
        command = verbs[verb]
        while arguments and arguments[0] in getattr(command, "commands", {}):
            command = command.commands[arguments.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in arguments if word.startswith("-")}
        assert given <= known, verb
