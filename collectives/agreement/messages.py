"""The members' messages about views and operations: typed, and bounded before they are parsed.

None is signed: the link that it comes on says who speaks. Their form as bytes is made by `message_codec` from what is
declared here: a new message is a class and a line in `MESSAGES`, a new field goes last and has bounds. The table in
`agreement` says who sends which to whom, and what answers it.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from collectives.agreement.fields import (
    MAX_MEMBERS,
    AtMost,
    Count,
    Mark,
    MemberIds,
    NotEmpty,
    Packed,
    Reason,
    Session,
    Text,
)
from collectives.agreement.views import AddressText, Ballot, Member, OpId, View
from protocol.identity import NodeId

MAX_SHARE_BYTES = 64 << 10
MAX_OPEN = 256  # operations that a member may have called and not seen end
MAX_ENTRIES = 4096  # operations of one view in a report: those open, and the last ended of each tag
MAX_LEDGERS = 4  # views whose operations a report tells about
MAX_FIELDS = 16  # of a digest
MAX_PENDING = 64  # newcomers that are kept waiting
MAX_RULINGS = MAX_LEDGERS * (MAX_ENTRIES + MAX_OPEN)
MAX_LAG_MS = 2**40
MAX_APPLIED_EPOCH = 2**48  # a stranger cannot use the epochs up

PackedView = Annotated[View, Packed()]
Digest = Annotated[tuple[tuple[Text, int | str], ...], AtMost(MAX_FIELDS)]
Share = Annotated[bytes, AtMost(MAX_SHARE_BYTES)]


class Stage(IntEnum):
    """How far an operation got at a member, as it reports. Only ever rises, and the last two are final."""

    CALLED = 0
    STARTED = 1
    DONE = 2  # carried out here, and said so
    HOLDS = 3  # the coordinator only: it sent Commit to somebody
    COMMITTED = 4
    ABORTED = 5


@dataclass(frozen=True, slots=True)
class Mismatched:
    """`member` gave `theirs` for `field`, `ours` is what the others (or the reader) gave."""

    member: NodeId
    field: Text
    theirs: int | str
    ours: int | str


@dataclass(frozen=True, slots=True)
class Beat:
    """`mark` is that of the sender's view; `round` the greatest ballot's that it has promised."""

    mark: Mark
    epoch: Count
    round: Count
    missing: MemberIds = ()
    reaches: Annotated[tuple[NodeId, ...], AtMost(MAX_PENDING)] = ()
    pending: bool = False  # from the coordinator: somebody waits to be let in


@dataclass(frozen=True, slots=True)
class Apply:
    """The sender is in no view and asks to be let in; `epoch` is that of the last view it was in, or 0."""

    address: AddressText
    session: Session
    epoch: Annotated[int, AtMost(MAX_APPLIED_EPOCH)]


@dataclass(frozen=True, slots=True)
class ViewNotice:
    """The sender's view."""

    view: PackedView


@dataclass(frozen=True, slots=True)
class Pending:
    """The applicants, as far as the sender knows."""

    newcomers: Annotated[tuple[Member, ...], AtMost(MAX_PENDING)]


@dataclass(frozen=True, slots=True)
class Initiate:
    """The sender's owner called `op`. `lag_ms`: see `Begin`."""

    op: OpId
    kind: Text
    digest: Digest
    share: Share
    lag_ms: Annotated[int, AtMost(MAX_LAG_MS)] = 0


@dataclass(frozen=True, slots=True)
class OperationStart:
    """Everybody called `op`: what each member handed in, in the view's order."""

    op: OpId
    shares: Annotated[tuple[Share, ...], AtMost(MAX_MEMBERS)]


@dataclass(frozen=True, slots=True)
class OperationDone:
    """The sender carried `op` out (`ok`), or it could not or will not any more, because of `reason`."""

    op: OpId
    ok: bool
    late: bool = False  # its time was up
    reason: Reason = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """All members have carried `op` out. `view` is the one that an admission leads to."""

    op: OpId
    view: PackedView | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """The sender has the Commit of `op`."""

    op: OpId


@dataclass(frozen=True, slots=True)
class Abort:
    """`op` is called off."""

    op: OpId
    late: bool = False
    reason: Reason = ""
    mismatch: Mismatched | None = None


@dataclass(frozen=True, slots=True)
class Evict:
    """The coordinator leaves the receiver out, because of `reason`, which `op` was the last to show."""

    op: OpId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Propose:
    """Leave your view; `members` shall make the next one. `epoch` is that of the proposer's view."""

    ballot: Ballot
    epoch: Count
    members: MemberIds


@dataclass(frozen=True, slots=True)
class Ledger:
    """How far the operations of one view got at one of its members, which takes no further part in it.

    `whole` is False where ended operations were forgotten: then one that is not listed says nothing.
    """

    mark: Mark
    members: Annotated[tuple[NodeId, ...], AtMost(MAX_MEMBERS), NotEmpty()]
    entries: Annotated[tuple[tuple[OpId, Stage], ...], AtMost(MAX_ENTRIES)]
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Ruling:
    """The stage of `op`: `Stage.COMMITTED`, `ABORTED`, `CALLED` (it carries over) or `DONE` (in doubt)."""

    op: OpId
    stage: Stage


Rulings = Annotated[tuple[Ruling, ...], AtMost(MAX_RULINGS)]


@dataclass(frozen=True, slots=True)
class BallotReport:
    """The sender takes part in none of the views in `ledgers` any more, and promises no smaller ballot."""

    ballot: Ballot
    view: PackedView
    missing: MemberIds
    ledgers: Annotated[tuple[Annotated[Ledger, Packed()], ...], AtMost(MAX_LEDGERS)]


@dataclass(frozen=True, slots=True)
class Decide:
    """The view that `ballot` led to, and what became of operations till then."""

    ballot: Ballot
    view: PackedView
    rulings: Rulings


@dataclass(frozen=True, slots=True)
class Welcome:
    """The receiver's application of `session` was granted: it is in `view`."""

    session: Session
    view: PackedView


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender is gone for good."""


OperationMessage = Initiate | OperationStart | OperationDone | Commit | Ack | Abort | Evict
BallotMessage = Propose | BallotReport | Decide
Message = OperationMessage | BallotMessage | Beat | Apply | ViewNotice | Pending | Welcome | Goodbye

# Each one's number on the wire. Numbers are only ever appended, never given again.
MESSAGES: dict[int, type[Message]] = {
    1: Beat,
    2: Apply,
    3: ViewNotice,
    4: Initiate,
    5: OperationStart,
    6: OperationDone,
    7: Commit,
    8: Ack,
    9: Abort,
    10: Propose,
    11: BallotReport,
    12: Decide,
    13: Welcome,
    14: Pending,
    15: Goodbye,
    19: Evict,
}
