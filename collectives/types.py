"""The words of the public interface: operations, codecs, and what comes of a call."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from protocol.identity import NodeId


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
    UINT8_MINMAX = "uint8-minmax"  # affine between the least and the greatest of each block
    UINT8_ZERO_POINT = "uint8-zero-point"  # affine with an integral zero point, so that zero stays zero


class SyncStrategy(Enum):
    """Whose shared state holds."""

    ENFORCE_POPULAR = "enforce-popular"  # that of the newest revision which most members have
    RECEIVE_ONLY = "receive-only"  # ours counts for nothing: take the others'
    SEND_ONLY = "send-only"  # ours is not replaced: it is what others may take


class Partition(Enum):
    """What the two sides of a split group do."""

    CONTINUE = "continue"  # each goes on; when they meet again, the popular state wins
    MAJORITY = "majority"  # the side with less than half of the members waits


@dataclass(frozen=True, slots=True)
class ReduceResult:
    """What a committed operation gave; `contributors` are the same, in the same order, at every member.

    `value` is the caller's own buffer, or `out`, and a new one for what has none to fill.
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
    """What a synchronisation did: 0 bytes received means that nothing had drifted.

    `source` is the member that most of it came from, None if nothing came.
    """

    revision: int
    bytes_sent: int
    bytes_received: int
    source: NodeId | None
    contributors: tuple[NodeId, ...]
    seconds: float
