"""Views: who is in the group, and the names of views, operations and changes.

A view is a fixed set of members. Its `mark`, 8 random bytes drawn by its maker, tells it
from the view of the same epoch on the other side of a partition; whatever is said in a view
carries the mark, so nothing said in one is ever taken for something said in another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

from collectives.agreement.fields import MARK_BYTES, MAX_MEMBERS, Ascending, AtMost, Count, Mark, Session, Tag
from protocol.identity import NodeId

MAX_GROUP_BYTES = 64
MAX_ADDRESS_BYTES = 320
AddressText = Annotated[str, AtMost(MAX_ADDRESS_BYTES)]
ADMIT_TAG = 2**64 - 1  # the tag under which members let newcomers in; a caller's own are below 2**63
RENDEZVOUS_TAG = 2**64 - 2  # that under which they meet to begin anew: see coordinator
NOWHERE = bytes(MARK_BYTES)  # the mark of those who are in no view


class Member(NamedTuple):
    """A node that is in a view or asks to be: its address ("" if it cannot be dialled), and which run of it this is.

    `session` (8 random bytes a process) tells a restarted process, which has forgotten all it
    promised, from the one that was let in.
    """

    id: NodeId
    address: AddressText
    session: Session


class Ballot(NamedTuple):
    """An attempt to agree on the next view; the greater one counts."""

    round: Count
    proposer: NodeId  # "" below all

    def above(self, proposer: NodeId) -> "Ballot":
        """Return `proposer`'s ballot that is greater than this one."""
        return Ballot(self.round + 1, proposer)


NO_BALLOT = Ballot(0, NodeId(""))


class OpId(NamedTuple):
    """An operation: the view it is carried out in, by mark and epoch, and the count of its tag's operations there."""

    mark: Mark
    epoch: Count
    tag: Tag
    n: Count


def first_after(rendezvous: int) -> int:
    """Return the number of the first operation of every tag after the n-th rendezvous of a view."""
    return (rendezvous + 1) << 32


@dataclass(frozen=True)
class View:
    """The members of `group` (its hash) in `epoch`, sorted by id; the first is the coordinator."""

    group: Annotated[bytes, AtMost(MAX_GROUP_BYTES)]
    epoch: Count
    mark: Mark
    roster: Annotated[tuple[Member, ...], AtMost(MAX_MEMBERS), Ascending()]

    @classmethod
    def of(cls, group: bytes, epoch: int, mark: bytes, roster: Iterable[Member]) -> "View":
        """Return the view of `roster`, in any order."""
        return cls(group, epoch, mark, tuple(sorted(roster)))

    @cached_property
    def members(self) -> tuple[NodeId, ...]:
        """The ids of all, sorted."""
        return tuple(member.id for member in self.roster)

    @cached_property
    def ids(self) -> frozenset[NodeId]:
        """The ids of all, for look-ups."""
        return frozenset(self.members)

    @cached_property
    def addresses(self) -> dict[NodeId, str]:
        """Where each member is dialled; "" for one that cannot be."""
        return {member.id: member.address for member in self.roster}

    @cached_property
    def sessions(self) -> dict[NodeId, bytes]:
        """Which run of each member is meant."""
        return {member.id: member.session for member in self.roster}

    @property
    def coordinator(self) -> NodeId:
        """The member that the others' messages about operations go through."""
        return self.members[0]


def outranks(ids: Iterable[NodeId], other: Iterable[NodeId]) -> bool:
    """Tell whether the side `one` of a split group goes on when two meet: the larger, or that with the least id."""
    mine, theirs = sorted(ids), sorted(other)
    return (-len(mine), mine) < (-len(theirs), theirs)
