"""A class has a name of its own, so that a search for it finds one thing."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = {  # with protocol/ or collectives/, where both are what people call it
    "Answer",
    "Exchange",
    "Group",
    "Item",
    "Network",
    "Node",
    "Policy",
    "Start",
}


def classes(package: str) -> Counter[str]:
    """How often each class name is defined, without the underscore of those that are a module's own."""
    files = (ROOT / package).rglob("*.py")
    return Counter(name for path in files for name in re.findall(r"^ *class _?(\w+)", path.read_text(), re.MULTILINE))


def test_a_class_of_node_has_a_name_of_its_own() -> None:
    node, others = classes("node"), classes("protocol") | classes("collectives")
    assert {name for name, count in node.items() if count > 1} == set()
    assert {name for name in node if name in others} <= SHARED
