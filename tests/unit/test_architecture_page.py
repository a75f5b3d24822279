"""docs/architecture.md: each function that it draws exists, and its caller names it."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
LINE = re.compile(r"^(?P<indent> *)(?P<handed>> )?(?P<name>[\w.]+)(?:  +(?P<words>.*))?$")


class Step(NamedTuple):
    """A line of a road: the function, whether it is handed over to, and the functions above it."""

    name: str
    is_handed: bool
    callers: tuple[str, ...]


def steps() -> list[Step]:
    found = []
    for block in re.findall(r"^```road\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        above: list[str] = []
        for line in block.splitlines():
            read = LINE.match(line)
            assert read is not None, line
            depth, rest = divmod(len(read["indent"]), 4)
            assert rest == 0 and depth <= len(above), line
            above[depth:] = [read["name"]]
            found.append(Step(read["name"], read["handed"] is not None, tuple(above[:-1])))
    return found


def resolve(name: str) -> Any:
    """Return what a dotted name stands for."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"no module of {name}")


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.name)
def test_each_function_exists_and_its_caller_names_it(step: Step) -> None:
    assert callable(resolve(step.name))
    if step.callers and not step.is_handed:
        source = inspect.getsource(resolve(step.callers[-1]))
        assert re.search(rf"\b{step.name.rpartition('.')[2]}\b", source), f"{step.callers[-1]} does not name it"


def test_three_roads_are_drawn_in_few_words() -> None:
    assert sum(not step.callers for step in steps()) >= 3
    assert len(PAGE.read_text().split()) <= 900
