"""A class has a name of its own, so that a search for it finds one thing."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAME_IN_TWO_LAYERS = {  # a peer's and a group member's; an `Item` is a question of a task, or what gossip carries
    "Ack",
    "Address",
    "BadAddress",
    "Dial",
    "Goodbye",
    "Item",
    "Send",
    "Tick",
}
OWN_ELSEWHERE = {"Answer", "Exchange", "Group", "Network", "Node"}  # classes of a module's own in the lower packages


def classes(package: str, pattern: str = r"_?(\w+)") -> Counter[str]:
    """How often each class name is defined, without the underscore of those that are a module's own."""
    files = (ROOT / package).rglob("*.py")
    return Counter(
        name for path in files for name in re.findall(rf"^ *class {pattern}", path.read_text(), re.MULTILINE)
    )


def test_a_class_of_node_has_a_name_of_its_own() -> None:
    node, others = classes("node"), classes("protocol") | classes("collectives")
    assert {name for name, count in node.items() if count > 1} == set()
    assert {name for name in node if name in others} <= SAME_IN_TWO_LAYERS | OWN_ELSEWHERE


def test_a_public_class_of_the_three_packages_has_a_name_of_its_own() -> None:
    public = sum((classes(package, r"([A-Za-z]\w*)") for package in ("node", "protocol", "collectives")), Counter())
    assert {name for name, count in public.items() if count > 1} == SAME_IN_TWO_LAYERS
