"""docs/tasks.md: every snippet of the page, in the order of the page, does what it is there for."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from node.cli.app import run
from node.config import load_config
from node.tasks import load_tasks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
SNIPPET = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two processes for every task that is checked
def test_every_snippet_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kinds = []
    for language, name, text in SNIPPET.findall(PAGE.read_text()):
        kinds.append(language)
        if language == "sh":
            for line in text.splitlines():
                obey(shlex.split(line), tmp_path)
                assert "FAILS" not in capsys.readouterr().out, line
        else:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            if language == "toml" and path.parent == tmp_path and "verifiers/" not in text:  # its command checks that
                assert load_tasks(load_config(path).tasks).tasks
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"sh": 9, "toml": 8, "python": 4, "jsonl": 3}


def obey(command: list[str], folder: Path) -> None:
    """Run one line of the page as the reader would; a package is installed without network, into the test's folder."""
    if command[:2] == ["pip", "install"]:
        offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(folder / "site")]
        subprocess.run([sys.executable, "-m", "pip", "install", *offline, *command[2:]], check=True, timeout=100)
        importlib.invalidate_caches()
        return
    with pytest.MonkeyPatch.context() as changed:
        if command[0] == "PYTHONPATH=.":
            changed.setenv("PYTHONPATH", ".")
            changed.syspath_prepend(str(folder))
            command = command[1:]
        assert command[0] == "gossamer"
        assert run(command[1:], debug=False) == 0, command


def test_the_layouts_that_the_page_shows_are_those_of_the_code() -> None:
    from node.policy.prompt import plain_text
    from node.tasks import Item

    item = Item("What is 21 - 25?", "-4", "Calculate.", (("What is 18 + 49?", "67"),))
    shown = "\n".join(f"    {line}".rstrip() for line in plain_text(item).splitlines())
    assert shown in PAGE.read_text()
