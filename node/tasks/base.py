"""What a task is: a pure function from a seed to a question, and a verifier.

A task is named by `TaskKey`: two nodes with equal keys make the same item from the
same seed and give the same reward to the same text, so a receiver can rebuild what
a peer claims to have been asked instead of believing it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class TaskKey(NamedTuple):
    """Identity of a task: its name, the version of its code, the hash of its configuration."""

    name: str
    version: int
    config: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    `question` is what the policy is asked and `system` an optional instruction before
    it (used by chat policies). `answer` is the ground truth, private to the verifier.
    """

    question: str
    answer: str
    system: str = ""


class Task(Protocol):
    """A family of questions with a verifier. Both methods are pure and deterministic."""

    @property
    def key(self) -> TaskKey: ...

    def make(self, seed: int) -> Item:
        """Return the item that `seed` (0 <= seed < 2**63) stands for."""
        ...

    def verify(self, item: Item, text: str) -> float:
        """Return the reward of `text` in [0, 1]. Never executes or evaluates the text."""
        ...


def config_hash(config: Mapping[str, object]) -> str:
    """Return 16 hex digits that name a task's configuration (canonical JSON, SHA-256)."""
    canonical = json.dumps(dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from `parts` by hash, so that neighbours give unrelated streams."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
