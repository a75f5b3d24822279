"""What `mkdocs` does beside copying docs/: pages from the root, pages made from the code, links that stay inside.

A link to a file that is no page (code, an example) becomes its text: the site stands alone.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FROM_ROOT = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    from website.reference import PAGES

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    for path, source in FROM_ROOT.items():
        files.append(File.generated(config, path, content=(ROOT / source).read_text()))
    for source in (ROOT / "website" / "iframe-worker").iterdir():  # npm's iframe-worker 1.0.4
        files.append(File.generated(config, f"assets/iframe-worker/{source.name}", content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site."""
    path = page.file.src_uri
    source = ROOT / FROM_ROOT.get(path, f"docs/{path}")
    return LINK.sub(lambda link: relinked(link, path, source, {file.src_uri for file in files}), markdown)


def relinked(link: re.Match[str], page: str, source: Path, uris: set[str]) -> str:
    """Return a link on the site, for one in the repository; its text where it leads to no page."""
    mark, text, target = link.groups()
    name, _, anchor = target.partition("#")
    if not name or "://" in target:
        return link[0]
    place = os.path.relpath(source.parent / name, ROOT)
    uri = {of: to for to, of in FROM_ROOT.items()}.get(place) or place.removeprefix("docs/")
    if uri not in uris and f"{uri}/README.md" in uris:
        uri = f"{uri}/README.md"
    if uri not in uris or not (place.startswith("docs") or uri in FROM_ROOT):
        return text
    there = os.path.relpath(uri, Path(page).parent)
    return f"{mark}[{text}]({there}{'#' if anchor else ''}{anchor})"
