"""Training steps that a group takes together: rendezvous, redo, commit, as one member sees them; no I/O.

    MEET --all say where they are--> SYNC (if anybody is behind, or has just come) --> STEP --> END --> STEP of the next
      ^                                                                                          |
      +----------------------------- ADMIT <----------- somebody waits to be let in -------------+
      +---- from anywhere, when a call is called off, is in doubt, or this member was left out (then by way of ADMIT)

A step is the owner's function and an END, an operation without values that all call when they have come to
the end of the function. The step counts if END commits. So it counts for all or for none, except for members
that are *in doubt* of END: they keep what the function gave until the next rendezvous, where somebody who
knows that it counted says so. If nobody does, nobody who is left has counted it, and all take it again.

At a rendezvous each member tells a `Claim`, and all compute from the claims alike which step comes next and who is
behind: `locate`. A step is named by the END under which it counted, so two that have one number and come from two sides
of a split group are not taken for the same. A member that was out of the group since its last rendezvous does not count
if another one stayed: it may come from another group.

A member that calls for a rendezvous draws all others to it, whatever they wait in (see `coordinator`). So
nothing here depends on members seeing the same errors, or in the same order. Torch elastic's workers, too, meet in a
rendezvous after each change; there a store runs it, here the members do.

Invariants:
    One view a step: all calls of a step that counts, and its END, are carried out in one view. So the contributors to
        each of them are the step's members. A member in which a call of an `Attempt` starts in another view than an
        earlier one calls it off, and all take the step again.
    One outcome a step: it counts for all of its members or for none, but for those in doubt until they meet.
    Rising numbers: a member that stays in the group counts each step once, in order.
"""

import struct
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from collectives.agreement.views import OpId
from collectives.errors import Aborted, CollectiveError
from protocol.identity import NodeId
from protocol.wire.encoding import UINT64_MAX

_CLAIM = struct.Struct("<?Q16s16s")
_NAME = struct.Struct(">8sQ")
NO_STEP = bytes(_NAME.size)


class Phase(Enum):
    """The next call of a member."""

    ADMIT = "admit"
    MEET = "rendezvous"
    SYNC = "sync"
    STEP = "step"
    END = "end"


class Claim(NamedTuple):
    """A member's statement of itself at a rendezvous."""

    stayed: bool  # in the group since the last one
    done: int  # the steps that count
    by: bytes  # the name of the END of the last of them
    doubt: bytes  # that of the step after, if this member does not know whether it counts

    def encode(self) -> bytes:
        """Return the wire form: 41 bytes."""
        return _CLAIM.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> "Claim":
        """Read another member's; raises `CollectiveError` for anything else."""
        if len(data) != _CLAIM.size:
            raise CollectiveError(f"a claim has {_CLAIM.size} bytes, this one {len(data)}: run one version")
        return cls(*_CLAIM.unpack(data))


class StepPlace(NamedTuple):
    """Where a group is, or a member of it."""

    done: int
    by: bytes


def name_of(end: OpId) -> bytes:
    """Return the name of a step: that of the END under which it counts."""
    return _NAME.pack(end.mark, end.n)


def locate(claims: Mapping[NodeId, Claim]) -> tuple[StepPlace, dict[NodeId, StepPlace]]:
    """Return where the group is, and where each member is once its doubt is settled; a pure function."""
    counted = {claim.by for claim in claims.values()} - {NO_STEP}
    places = {
        member: StepPlace(claim.done + 1, claim.doubt) if claim.doubt in counted else StepPlace(claim.done, claim.by)
        for member, claim in claims.items()
    }
    stayed = [places[member] for member, claim in claims.items() if claim.stayed]
    return max(stayed or places.values()), places


class Attempt:
    """One member's attempt at a step: the view that its calls, on any threads, are carried out in."""

    def __init__(self) -> None:
        self.has_called = False  # that it has made a call
        self._marks: set[bytes] = set()

    def carry_out_in(self, mark: bytes) -> None:
        """A call of the step is about to be carried out in the view `mark`. Raises `Aborted` if one was in another."""
        self._marks.add(mark)  # first, so that of two threads with different ones at least the later one raises
        if len(self._marks) > 1:
            raise Aborted("the group changed within the step, which is taken again")


class Steps:
    """One member's way from step to step. Its owner makes the call that `phase` names, and says how it ended."""

    def __init__(self, done: int = 0) -> None:
        """Begin after `done` steps, of an earlier run perhaps."""
        self.phase = Phase.MEET
        self.done = done
        self.joined = False  # the next step is the first after this member was behind
        self.offers = True  # of a SYNC: this member's state is as good as any
        self.by = NO_STEP  # the name of the last step that counts
        self._doubt = NO_STEP
        self._stay: int | None = None
        self._claimed_stay: int | None = None

    def claim(self, stay: int) -> Claim:
        """Return what to say at the rendezvous; `stay` counts how often this member came into the group."""
        self._claimed_stay = stay
        return Claim(stay == self._stay, min(self.done, UINT64_MAX), self.by, self._doubt)

    def met(self, own: NodeId, claims: Mapping[NodeId, Claim]) -> bool:
        """The rendezvous committed. Returns whether the step that this member was in doubt of counts."""
        group, places = locate(claims)
        some_stayed = any(claim.stayed for claim in claims.values())
        settled = self._doubt != NO_STEP and places[own].by == self._doubt
        current = places[own] == group
        strangers = group.by == NO_STEP and len(places) > 1  # with nothing in common yet
        self.phase = Phase.SYNC if strangers or any(place != group for place in places.values()) else Phase.STEP
        self.joined = self.joined or not current
        self.offers = current and (group.by != NO_STEP or claims[own].stayed or not some_stayed)
        self.done, self.by = group
        self._doubt = NO_STEP
        self._stay = self._claimed_stay
        return settled

    def synced(self) -> None:
        """All have one state."""
        self.phase = Phase.STEP

    def stepped(self) -> None:
        """The owner's function came to its end."""
        self.phase = Phase.END

    def ended(self, end: OpId, pending: bool) -> None:
        """END committed: the step counts. `pending`: somebody waits, as all were told with it."""
        self.done, self.by = self.done + 1, name_of(end)
        self.joined = False
        self.phase = Phase.ADMIT if pending else Phase.STEP

    def admitted(self) -> None:
        """Those who waited are in, and come to the rendezvous."""
        self.phase = Phase.MEET

    def doubted(self, end: OpId) -> None:
        """Whether END counts is unknown until the next rendezvous."""
        self._doubt = name_of(end)

    def disturbed(self, *, admits: bool) -> None:
        """A call was called off, or is in doubt. `admits`: somebody waits to be let in, perhaps this member."""
        self.phase = Phase.ADMIT if admits and self.phase is not Phase.ADMIT else Phase.MEET
