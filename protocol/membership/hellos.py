"""Judges a hello: who says it, and whether we admit it. Decides, and changes nothing.

FORGED      its record is not its signer's, or not that of the link's key            -> an error, and a penalty
UNEXPECTED  ours, or over a link that is none any more                               -> hang up
GRAYLISTED  its node id is refused just now, whatever key it brings                  -> refuse, and its key with it
WAITS       the use of its invite has to be on disk first                            -> no answer until it is
ASK_LIST    not admitted, but it knows a newer revocation list, which may say so     -> ask for that
REFUSED     not admitted, for `reason`                                               -> refuse
ADMITTED                                                                             -> a peer, if there is room
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from protocol.config import NOT_KEPT, Instant, Setup
from protocol.credentials.records import PeerRecord
from protocol.errors import RecordError
from protocol.events import Message
from protocol.identity import NodeId
from protocol.membership.directory import Directory
from protocol.membership.links import Links
from protocol.notices import GRAYLISTED
from protocol.wire.messages import Hello

Refuses = Callable[[NodeId, Instant], bool]


class Worth(Enum):
    """See the module's comment; a forged one raises."""

    UNEXPECTED = auto()
    GRAYLISTED = auto()
    WAITS = auto()
    ASK_LIST = auto()
    REFUSED = auto()
    ADMITTED = auto()


class Judged(NamedTuple):
    """A hello that was looked at: its signer's record, and why that is not admitted, where it is not."""

    worth: Worth
    record: PeerRecord
    hello: Hello
    reason: str = ""


def judge(message: Message, setup: Setup, directory: Directory, links: Links, refuses: Refuses, now: Instant) -> Judged:
    """Look at a hello.

    Raises:
        MessageError: it is malformed.
        RecordError: it is forged, or its record is of no use.
    """
    link, sender, hello = message.link, message.sender, Hello.decode(message.body)
    record = directory.read(hello.record, now)
    if record.node_id != sender or record.curve_key != link.key:
        raise RecordError("impostor", "the record is another node's or names another key")
    if links.live_node(link) not in (None, sender):
        raise RecordError("impostor", "the link's key is another live peer's")
    if sender == setup.identity.node_id or not links.expects(link):
        return Judged(Worth.UNEXPECTED, record, hello)
    if refuses(sender, now):
        return Judged(Worth.GRAYLISTED, record, hello, GRAYLISTED)
    reason = setup.gate.admits(record, now)
    if reason == NOT_KEPT:
        return Judged(Worth.WAITS, record, hello, reason)
    if reason and hello.revision > setup.gate.revision:
        return Judged(Worth.ASK_LIST, record, hello, reason)
    return Judged(Worth.REFUSED if reason else Worth.ADMITTED, record, hello, reason)
