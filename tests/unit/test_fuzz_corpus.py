"""The fuzzer's corpus, again and again: every file, and whether the good ones still reach what they are for."""

from pathlib import Path

import pytest

from tests.fuzz.make_corpus import inputs
from tests.fuzz.targets import TARGETS, try_one

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_nothing_but_the_typed_errors_comes_of_it(path: Path) -> None:
    try_one(path.read_bytes())


@pytest.mark.parametrize("number", range(len(TARGETS)))
def test_a_good_input_is_taken_by_its_target(number: int) -> None:
    TARGETS[number](inputs()[number])
