"""The events that links and owner hand to the agreement core, and the actions that it asks for.

The driver calls `Agreement.handle(event, now)` for each event and carries out the actions in
order; `now` is in seconds on a steady clock. It sends a `Tick` at least twice a heartbeat.
"""

from dataclasses import dataclass
from enum import Enum

from collectives.agreement.messages import Message, Mismatched
from collectives.agreement.views import OpId, View
from protocol.identity import NodeId

ADMIT = "admit"  # the kind of operation that lets newcomers in


class CallVerdict(Enum):
    """How a call ended."""

    COMMIT = "commit"  # publish the result
    ABORT = "abort"  # called off for everybody: nobody publishes
    DEADLINE = "deadline"  # as ABORT, because somebody's time was up
    MISMATCH = "mismatch"  # as ABORT, because the members' arguments differ
    DOUBT = "doubt"  # the others may have published and may not: unknown here, and never published here
    EVICTED = "evicted"  # as ABORT: this node is outside of the group
    CLOSED = "closed"  # as ABORT: its owner left


# --- events ---


@dataclass(frozen=True, slots=True)
class Linked:
    """A control link to an authenticated `member` is up; `address` is what it says it can be dialled at, or ""."""

    member: NodeId
    address: str = ""


@dataclass(frozen=True, slots=True)
class Unlinked:
    """The control link to `member` closed; what was on its way is lost."""

    member: NodeId


@dataclass(frozen=True, slots=True)
class Heard:
    """A message from the node at the other end of a link."""

    member: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Begin:
    """The owner calls an operation: at most one outstanding a tag.

    `digest` must be equal at all members, field by field; `share` (at most 64 KiB) is handed to
    all. `deadline` is in seconds from now. Kind `ADMIT` lets newcomers in, under `ADMIT_TAG`. A member that lets
    all who called wait for `lag` seconds, and makes no call itself, is left out; 0: see `GroupTiming.misses`.
    """

    tag: int
    kind: str
    deadline: float
    digest: tuple[tuple[str, int | str], ...] = ()
    share: bytes = b""
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Performed:
    """The owner has carried out `op` up to publication, or could not (`ok` is False).

    `blames`: the member that sent unusable values. If the coordinator's owner says so, it is left out.
    """

    op: OpId
    ok: bool = True
    reason: str = ""
    blames: str = ""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The owner waits no more for its call under `tag`: it was interrupted. One that was carried out goes on."""

    tag: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The owner leaves the group for good."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Linked | Unlinked | Heard | Begin | Performed | GiveUp | Leave | Tick

# --- actions ---


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message on the link to `member`; drop it when there is none."""

    member: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Perform:
    """Everybody called `op`: carry it out among the view's members, with everybody's share, then tell `Performed`."""

    op: OpId
    kind: str
    view: View
    shares: dict[NodeId, bytes]


@dataclass(frozen=True, slots=True)
class Finished:
    """The outstanding call under `op.tag` ended: stop carrying it out, and publish if it is a COMMIT.

    `contributors` (of a COMMIT) are the same at every member. `mismatch` is set with MISMATCH,
    as seen from here. An operation that was never started is named as it would have been.
    """

    op: OpId
    verdict: CallVerdict
    contributors: tuple[NodeId, ...] = ()
    reason: str = ""
    mismatch: Mismatched | None = None


@dataclass(frozen=True, slots=True)
class Install:
    """`view` holds from now on. Calls that were not yet started go on in it by themselves."""

    view: View


@dataclass(frozen=True, slots=True)
class OutOfGroup:
    """The others went on without this node. It asks to be let in again by itself; an `Install` says when it is.

    Until then every call but ADMIT ends with EVICTED at once; ADMIT waits to be let in.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Dial:
    """Link with the node at `address`, which must be `member` if that is not None. Repeated until it is linked."""

    member: NodeId | None
    address: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the link to `member`: it broke the rules."""

    member: NodeId
    reason: str


Action = Send | Perform | Finished | Install | OutOfGroup | Dial | Drop
