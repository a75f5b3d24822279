"""The documents: links lead somewhere, and the reference that is made from the code leaves nothing out."""

import re
from pathlib import Path

import pytest
import typer.main

from node.cli.app import app
from node.config import all_keys
from node.metrics import METRICS
from website.reference import PAGES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            broken.append(target)
    assert broken == []


def test_the_reference_names_every_verb_every_setting_and_its_meaning() -> None:
    commands, settings = PAGES["reference/commands.md"](), PAGES["reference/settings.md"]()
    verbs = typer.main.get_command(app).commands
    assert {name for name in verbs if not re.search(rf"^## gossamer {name}\b", commands, re.MULTILINE)} == set()
    assert commands.count("Example:") >= commands.count("\n## ")
    named = set()
    table = ""
    for line in settings.splitlines():
        if line.startswith("## "):
            table = line.removeprefix("## ").replace("the top", "")
        elif found := re.match(r"\| `(\w+)` \|", line):
            named.add(f"{table}.{found[1]}".strip("."))
    tables = {key for key in all_keys() if any(other.startswith(f"{key}.") for other in all_keys())}
    assert {key for key in all_keys() if key not in tables} - named == set()
    assert not re.search(r"Annotated|Union|Optional|object at", settings)
    assert (
        "| `save_steps` | `20` | int, >= 1 | rounds between checkpoints, or more, to write 1 TB a day at most |"
        in settings
    )


def test_the_reference_of_metrics_names_each_and_its_meaning() -> None:
    page = PAGES["reference/metrics.md"]()
    for metric in METRICS.values():
        name = metric.name.replace("*", metric.label.upper())
        assert re.search(
            rf"^\| `{re.escape(name)}` \| {metric.unit} \| {re.escape(metric.meaning)} \|", page, re.MULTILINE
        )
        assert metric.exported in page


def test_the_sites_navigation_is_of_pages_that_there_are_and_leaves_out_none() -> None:
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "website" / "mkdocs.yml").read_text(), re.MULTILINE))
    made = {*PAGES, "index.md", "changelog.md", "contributing.md", "security.md"}
    assert listed == made | {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
