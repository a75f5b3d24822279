"""Fuzzing a verifier: texts that answer nothing earn no more than a wrong answer, or the check says which one does."""

from collections.abc import Callable

import pytest

from node.tasks import Item, TaskKey
from node.tasks.answers import READERS
from node.tasks.builtin.families import FAMILIES
from node.tasks.dataset import Dataset
from node.tasks.fuzz import fuzz


class Holed:
    """Sums, paid as a test likes."""

    key = TaskKey("holed", 1, "aa")

    def __init__(self, verify: Callable[[Item, str], float]) -> None:
        self.verify = verify

    def make(self, seed: int) -> Item:
        number = seed % 97
        return Item(f"{number}+{number}=", str(2 * number), "Add.")


def failed(verify: Callable[[Item, str], float]) -> list[str]:
    return [finding.line for finding in fuzz(Holed(verify)) if not finding.holds]


@pytest.mark.parametrize(
    ("verify", "found"),
    [
        (lambda item, text: float(item.answer in text.split()), "everything at once: earns 1 at most"),
        (lambda item, text: float(not text), "an empty text: earns 1 at most, where a wrong answer earns 0: ''"),
        (lambda item, text: float("<think>" in text), "injected tags: earns 1"),
        (lambda item, text: float(item.question in text), "the question copied: earns 1"),
        (lambda item, text: min(len(text) / 10_000, 1.0), "a very long text: earns 1"),
    ],
)
def test_what_fools_a_verifier_is_said(verify: Callable[[Item, str], float], found: str) -> None:
    assert any(found in line for line in failed(verify))


def test_a_verifier_that_reads_one_answer_is_not_fooled_whatever_it_reads() -> None:
    for read in READERS.values():
        assert failed(lambda item, text, read=read: float(read(text) == item.answer)) == []
    assert failed(lambda item, text: 0.3 + 0.7 * (text == item.answer)) == []
    for family in FAMILIES.values():
        assert all(finding.holds for finding in fuzz(family()))


def test_no_data_set_is_fooled() -> None:
    items = tuple(Item(f"{number}+{number}=", str(2 * number)) for number in range(50))
    assert all(finding.holds for finding in fuzz(Dataset(TaskKey("dataset", 2, "aa"), items)))
