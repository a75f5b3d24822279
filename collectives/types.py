"""The words of the public interface: operations, codecs, how patient members are, and what comes of a call."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from protocol.identity import NodeId

T = TypeVar("T")


class Op(Enum):
    """How values are combined. AVG weighs each member's values by its `weight`."""

    SUM = "sum"
    AVG = "avg"
    PROD = "prod"
    MIN = "min"
    MAX = "max"


class Codec(Enum):
    """How values travel. All but NONE lose precision; every member ends with the same bits all the same."""

    NONE = "none"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # symmetric, a float32 scale for each block of 256


class SyncStrategy(Enum):
    """Whose shared state holds."""

    ENFORCE_POPULAR = "enforce-popular"  # of the newest revision, the state that most members have
    RECEIVE_ONLY = "receive-only"  # ours counts for nothing: take the others'
    SEND_ONLY = "send-only"  # ours is not replaced: it is what others may take


class Protection(Enum):
    """The protection of members' messages from those on the way; all members of a group want the same.

    Tensors between processes of one user on one machine do not leave it, and have none.
    """

    ENCRYPTED = "encrypted"  # nobody can read it or change it (AES-256-GCM)
    AUTHENTICATED = "authenticated"  # anybody can read it, nobody can change it (AES-256-GMAC)
    UNAUTHENTICATED = "unauthenticated"  # anybody can read tensors and change them; agreement is authenticated still


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """How patient the members of a group are; all in seconds.

    heartbeat   every member sends every other one something at least this often:
                n (n - 1) / heartbeat messages a second in the whole group, 40 bytes each
    timeout     silence for this long is death, unless `stall` is longer: 6 heartbeats, so that five late ones in a row
                are forgiven
    stall       how long a member may be silent while its connection lives: its process is stopped (SIGSTOP) or holds
                its interpreter, its machine is gone, or the line is down. The end of a process closes the connection
    grace       a link that closed has this long to come back before its end is missed, and calls
                that nobody carries out any more wait no longer than this for it
    patience    how long a proposer waits for a member's report, and a member for the decision
    hang        a member that makes no call while the others wait in calls for this long in all is left out: its process
                lives, but its owner hangs. In a step of `run` it has half of a call's time-out, if that is longer, so
                that the rest is enough to go on without it
    misses      outside of steps it may miss so many time-outs of a call, if that is longer than `hang`

    a dead member is out of the view within
        timeout (or grace, where its socket closed) + heartbeat (others are told) + 2 round trips
    and if the proposer dies meanwhile, patience more for each that does
    """

    heartbeat: float
    timeout: float
    misses: int = 3
    hang: float = 15.0
    stall: float = 0.0

    @property
    def silence(self) -> float:
        """How long a member may say nothing while its connection lives."""
        return max(self.timeout, self.stall)

    @property
    def grace(self) -> float:
        """How long a closed link may take to come back."""
        return self.heartbeat

    @property
    def patience(self) -> float:
        """How long a step of a view change may take: a member that answers at all answers within a timeout."""
        return self.timeout

    @property
    def settling(self) -> float:
        """How long after its deadline a call waits for its verdict: a view change with one dead proposer."""
        return 2 * (self.timeout + self.patience)


LAN = GroupTiming(heartbeat=0.25, timeout=1.5)
WAN = GroupTiming(heartbeat=1.0, timeout=6.0, stall=60.0)


@dataclass(frozen=True, slots=True)
class Health:
    """How many seconds ago another member last did something, as far as this one knows; None: not in this view.

    `called`: made a call. The coordinator knows of each, the others of those that started. `beat`: was heard; its
    control thread lives, also where its owner hangs. `moved`: sent bytes of a tensor to this member.
    """

    called: float | None
    beat: float | None
    moved: float | None


@dataclass(frozen=True, slots=True)
class ReduceResult:
    """The result of a committed operation; `contributors` are the same, in the same order, at every member.

    `value` is the caller's own buffer, or `out`, or a new one if the operation has none to fill.
    Bytes are those of the payload that this member sent and received.
    """

    value: Any
    contributors: tuple[NodeId, ...]
    epoch: int
    bytes_sent: int
    bytes_received: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The result of a synchronisation.

    `replaced`: some of this member's tensors differed, and are the group's now. Their bytes may have come in an earlier
    call, which was called off; then `bytes_received`, which is of this call, is 0. `source` is the member that most
    bytes came from, None if none came.
    """

    revision: int
    bytes_sent: int
    bytes_received: int
    source: NodeId | None
    contributors: tuple[NodeId, ...]
    seconds: float
    replaced: bool


@dataclass(frozen=True, slots=True)
class StepResult(Generic[T]):
    """A step that counts, for all of `members`; the same at each of them, but for `value`, `attempts` and `joined`.

    `value` is what the function returned here, the `attempts`-th time. `joined`: this member was behind
    before this step, or new.
    """

    number: int
    value: T
    members: tuple[NodeId, ...]
    attempts: int
    joined: bool
