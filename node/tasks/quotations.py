"""Quotations: does a text give away a question and its answer, word by word? Pure.

Nobody asks a held-out question in training, but a peer's right answer to another question may quote one with its
answer, and whoever trains on that text is taught it. A text quotes a question if

    the question's words stand in it one after another, and the answer's words somewhere after them

Case, white space and marks at the question's end do not count. A question of fewer than `LEAST` words is not looked
for: texts say such words by chance. The same question in other words is not found.
"""

import re
import unicodedata
from collections.abc import Iterable

from node.tasks import Item

LEAST = 4
_WORD = re.compile(r"\w+|[^\w\s]")


class Quotations:
    """Finds these questions in texts. It holds each question and answer once, as text."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._answers: dict[str, str] = {}
        self._lengths: dict[str, set[int]] = {}  # in words, by the first `LEAST` words
        for item in items:
            words = _words(item.question)
            while words and not words[-1].isalnum():
                words.pop()
            if len(words) >= LEAST:
                self._answers[" ".join(words)] = " ".join(_words(item.answer))
                self._lengths.setdefault(" ".join(words[:LEAST]), set()).add(len(words))

    def are_in(self, text: str) -> bool:
        """Tell whether `text` quotes one of the questions with its answer."""
        if not self._answers:
            return False
        words = _words(text)
        for begin in range(len(words) - LEAST + 1):
            for length in self._lengths.get(" ".join(words[begin : begin + LEAST]), ()):
                answer = self._answers.get(" ".join(words[begin : begin + length]))
                if answer is not None and f" {answer} " in f" {' '.join(words[begin + length :])} ":
                    return True
        return False


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return _WORD.findall(folded)
