"""Quotations: does a text give away a question and its answer, word by word? Pure.

Nobody asks a held-out question in training, but a peer's right answer to another question may quote one with its
answer, and whoever trains on that text is taught it. A text quotes a question if

    the question's words stand in it one after another, and the answer's words somewhere after them

Case, white space and marks at the question's end do not count. A question of fewer than `LEAST` words is not looked
for: texts say such words by chance. The same question in other words is not found.

The time for a text is bounded by its length times the number of questions that begin with the same `LEAST` words.
"""

import re
import unicodedata
from collections.abc import Iterable

from node.tasks import Item

LEAST = 4
_WORD = re.compile(r"\w+|[^\w\s]")
_MARKS = 4  # combining marks on a character that count: sorting a long run of them takes the square of its length


class Quotations:
    """Finds these questions in texts. It holds each question and answer once, as text."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._by_start: dict[str, dict[str, str]] = {}  # from the first `LEAST` words to questions with their answers
        for item in items:
            words = _words(item.question)
            while words and not words[-1].isalnum():
                words.pop()
            if len(words) >= LEAST:
                alike = self._by_start.setdefault(" ".join(words[:LEAST]), {})
                alike[_spaced(words)] = _spaced(_words(item.answer))

    def are_in(self, text: str) -> bool:
        """Tell whether `text` quotes one of the questions with its answer."""
        if not self._by_start:
            return False
        words = _words(text)
        spaced = _spaced(words)
        starts = {" ".join(words[at : at + LEAST]) for at in range(len(words) - LEAST + 1)}
        for start in starts & self._by_start.keys():
            for question, answer in self._by_start[start].items():
                at = spaced.find(question)
                if at >= 0 and spaced.rfind(answer) >= at + len(question) - 1:  # both have the space between them
                    return True
        return False


def _words(text: str) -> list[str]:
    if text.isascii():
        return _WORD.findall(text.lower())
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= _MARKS:
            kept.append(character)
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", "".join(kept)).casefold())
    return _WORD.findall(folded)


def _spaced(words: list[str]) -> str:
    return f" {' '.join(words)} "
