"""Questions: which of them are the same, and which are held out for evaluation. Pure.

A question is named by its task's name and its own text. Its answer, an instruction before it and the solved
examples around it play no part, since nodes may differ in them. Case, the amount of white space and the form of an
accent (Unicode's NFC) do not count either.

A hash of the swarm's salt and that name holds out `share` of all questions: the evaluation's part. It is the same part
at every node of the swarm, and it never changes. Training never asks a held-out question, never shows one as a solved
example, and accepts no peer's group on one. Nodes in a swarm without a manifest use the default: one question in eight.
"""

import hashlib
import unicodedata
from typing import NamedTuple

SHARE = 1 / 8
ID_BYTES = 16


class Split(NamedTuple):
    """Which questions are held out for evaluation: a share of all, chosen by a hash with a salt (0 <= salt < 2**32)."""

    share: float = SHARE
    salt: int = 0

    def holds_out(self, task: str, question: str) -> bool:
        """Tell whether a question of the task named `task` is held out."""
        return int.from_bytes(_digest("split", str(self.salt), task, question)[:8], "big") < self.share * 2**64


DEFAULT_SPLIT = Split()


def question_id(task: str, question: str) -> bytes:
    """Return 16 bytes that name a question of the task named `task`, however it is spaced or capitalised."""
    return _digest("question", task, question)[:ID_BYTES]


def text_id(question: str) -> bytes:
    """Return 16 bytes that name a question's text, whichever task asks it, however it is spaced or capitalised."""
    return _digest("text", question)[:ID_BYTES]


def _digest(*parts: str) -> bytes:
    *others, question = parts
    # `casefold` takes some letters apart. So accents are taken apart before it (NFD) and put together after it (NFC).
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", question).casefold())
    normal = " ".join(folded.split())
    return hashlib.sha256("\x1f".join((*others, normal)).encode(errors="replace")).digest()
