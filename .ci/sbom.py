"""Write sbom.json: what a node needs, each with its version and licence, in CycloneDX's format.

    python .ci/sbom.py [FILE]

cyclonedx-bom lists what is in this environment; what only the development of gossamer needs is left out.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    """Make the list of everything here, then keep what gossamer reaches without its extras."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "sbom.json")
    command = "-m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible --output-file"
    subprocess.run([sys.executable, *command.split(), str(file), sys.prefix], check=True)
    bom = keep_needed(json.loads(file.read_text()), needed(requires))
    file.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{file}: {len(bom['components'])} packages\n")


def needed(requires: Callable[[str], list[str] | None]) -> set[str]:
    """Return the names of what gossamer wants without its own extras, on this system, and of all that this wants.

    `requires` says what a package wants, as importlib.metadata's does.
    """
    done: set[tuple[str, str]] = set()
    waiting = [("gossamer", "")]
    while waiting:
        name, extra = one = waiting.pop()
        if one in done:
            continue
        done.add(one)
        for wanted in map(Requirement, requires(name) or ()):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(wanted.name), further) for further in ("", *wanted.extras)]
    return {name for name, _ in done} - {"gossamer"}


def keep_needed(bom: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the list with what has one of `names`, and no more."""
    kept = {one["bom-ref"] for one in bom["components"] if canonicalize_name(one["name"]) in names}
    refs = kept | {bom["metadata"]["component"]["bom-ref"]}
    edges = [
        one | {"dependsOn": [ref for ref in one.get("dependsOn", []) if ref in kept]}
        for one in bom["dependencies"]
        if one["ref"] in refs
    ]
    return bom | {"components": [one for one in bom["components"] if one["bom-ref"] in kept], "dependencies": edges}


if __name__ == "__main__":
    main()
