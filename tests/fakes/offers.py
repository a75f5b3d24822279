"""What a draw needs of a group buffer and of a swarm (`node.rollouts.draw`), and what it told them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from node.rollouts.group import Group
from node.rollouts.group_buffer import ReceivedGroup
from node.rollouts.own_results import OwnResult, OwnResults
from node.rollouts.rule import Candidate
from node.tasks import TaskKey


@dataclass
class Offers:
    """Groups on offer: `groups` by their ids, those `offered` now, and the signers that are revoked, `out`."""

    groups: dict[bytes, Group] = field(default_factory=dict)
    offered: list[Candidate] = field(default_factory=list)
    own_results: OwnResults = field(default_factory=OwnResults)
    out: set[str] = field(default_factory=set)
    was_read: set[bytes] = field(default_factory=set)
    buried: list[bytes] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def signers(self) -> set[str]:
        return {candidate.peer for candidate in self.offered}

    def candidates(self, now: float, round_number: int) -> list[Candidate]:
        return list(self.offered)

    def read(self, ids: Iterable[bytes]) -> dict[bytes, Group]:
        self.was_read |= {*ids}
        return {key: self.groups[key] for key in ids if key in self.groups}

    def of_signers(self, signers: Collection[str]) -> list[Candidate]:
        return [candidate for candidate in self.offered if candidate.peer in signers]

    def bury(self, ids: Sequence[bytes], round_number: int) -> None:
        self.buried += ids

    def begin_round(self, external: int) -> None: ...

    def revoked(self, signers: Collection[str]) -> list[str]:
        return sorted(self.out.intersection(signers))

    def refuse(self, group_id: bytes, reason: str) -> None:
        self.reasons.append(reason)

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        return []

    def record_own_results(self, round_number: int, results: Sequence[OwnResult]) -> None:
        self.own_results.put(round_number, results)

    def use(self, used: Sequence[Candidate], round_number: int, now: float) -> None: ...

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None: ...
