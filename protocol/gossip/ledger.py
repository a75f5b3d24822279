"""The ledger: one row for a peer and an item, with all that the two nodes said to each other of it.

A row has two phases, as both ends may hold chunks of an item that the other lacks: what the peer is to us, who may
lack the item (`Theirs`), and what we are to the peer (`Ours`). The tables say all that can change; what is in neither
changes nothing.

    Theirs
    NONE     nothing is known                        HAS      it has the item, or the chunks `LedgerRow.parts`
    ASKED    we said WANT                            BUSY     it has the item, and gives nothing for now
    SILENT   it answered nothing in time             LACKS    it said DONT_HAVE
    SENT     it sent us the item: it needs to be told nothing
    LIED     it gave a chunk that is none of the item's: it is asked no more for this one

    Ours
    NONE     nothing was said                        TOLD     we said HAVE
    SERVING  what it wants waits for its line        GIVEN    what it wanted was handed to its line
    DECLINED it said IDONTWANT

Rows are bounded, for each peer and in all; the one that changed longest ago goes first, but for those of what is
wanted.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import NamedTuple

from protocol.config import Limits
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId

ALL = -1  # as a set of chunks, a bit each
WHOLE = -1  # among the chunks that are asked for: the item itself, or its outline


class Place(NamedTuple):
    """A chunk of an item; or WHOLE, the item itself or its outline."""

    item: ItemId
    part: int


class Theirs(IntEnum):
    """The peer's part in an item that we may lack."""

    NONE = auto()
    HAS = auto()
    ASKED = auto()
    BUSY = auto()
    SILENT = auto()
    LACKS = auto()
    SENT = auto()
    LIED = auto()


class Ours(IntEnum):
    """Our part in an item that the peer may lack."""

    NONE = auto()
    TOLD = auto()
    SERVING = auto()
    GIVEN = auto()
    DECLINED = auto()


class Statement(IntEnum):
    """A statement about an item, by the peer (they) or by us."""

    THEY_HAVE = auto()
    THEY_GAVE = auto()  # the item, or the last chunk that we asked it for
    THEY_GAVE_ALL = auto()
    THEY_LACK = auto()
    THEY_LIED = auto()
    THEY_ARE_BUSY = auto()
    THEY_WANT = auto()
    THEY_CANCEL = auto()
    THEY_DECLINE = auto()
    WE_ASK = auto()
    WE_CANCEL = auto()
    NOTHING = auto()  # in time
    WE_HAVE = auto()
    WE_GAVE = auto()
    WE_KEPT = auto()  # what was to be pushed, as it asked for announcements only


_ALL_BUT_SENT = (Theirs.NONE, Theirs.HAS, Theirs.ASKED, Theirs.BUSY, Theirs.SILENT, Theirs.LACKS)

THEIRS: dict[tuple[Theirs, Statement], Theirs] = {
    (Theirs.NONE, Statement.THEY_HAVE): Theirs.HAS,
    (Theirs.LACKS, Statement.THEY_HAVE): Theirs.HAS,
    (Theirs.BUSY, Statement.THEY_HAVE): Theirs.HAS,
    (Theirs.HAS, Statement.WE_ASK): Theirs.ASKED,
    (Theirs.BUSY, Statement.WE_ASK): Theirs.ASKED,
    (Theirs.SILENT, Statement.WE_ASK): Theirs.ASKED,
    (Theirs.ASKED, Statement.THEY_GAVE): Theirs.HAS,
    (Theirs.BUSY, Statement.THEY_GAVE): Theirs.HAS,
    (Theirs.SILENT, Statement.THEY_GAVE): Theirs.HAS,
    (Theirs.ASKED, Statement.THEY_ARE_BUSY): Theirs.BUSY,
    (Theirs.ASKED, Statement.WE_CANCEL): Theirs.HAS,
    (Theirs.ASKED, Statement.NOTHING): Theirs.SILENT,
    **{(state, Statement.THEY_LACK): Theirs.LACKS for state in _ALL_BUT_SENT},
    **{(state, Statement.THEY_LIED): Theirs.LIED for state in _ALL_BUT_SENT},
    **{(state, Statement.THEY_GAVE_ALL): Theirs.SENT for state in _ALL_BUT_SENT},
}

OURS: dict[tuple[Ours, Statement], Ours] = {
    (Ours.NONE, Statement.WE_HAVE): Ours.TOLD,
    **{(state, Statement.THEY_WANT): Ours.SERVING for state in Ours},
    (Ours.SERVING, Statement.WE_GAVE): Ours.GIVEN,
    (Ours.SERVING, Statement.THEY_CANCEL): Ours.TOLD,
    (Ours.SERVING, Statement.WE_KEPT): Ours.NONE,
    **{(state, Statement.THEY_DECLINE): Ours.DECLINED for state in Ours},
}


@dataclass(slots=True)
class LedgerRow:
    """What is known of one peer and one item; see the module's comment."""

    theirs: Theirs = Theirs.NONE
    ours: Ours = Ours.NONE
    parts: int = ALL  # the chunks that it has, where it has any
    asked: dict[int, None] = field(default_factory=dict)  # the chunks, or WHOLE, that we wait for
    due: int = 0  # answers to what we asked and gave up, or asked of another, which may come yet
    since: float = 0.0  # when it was asked, or last said that it is busy
    until: float = 0.0  # when it may be asked again, if it was silent or busy
    silences: int = 0
    told: bool = False  # whether it was told that we have all of the item, or sent it

    def note(self, said: Statement) -> None:
        self.theirs = THEIRS.get((self.theirs, said), self.theirs)
        self.ours = OURS.get((self.ours, said), self.ours)

    @property
    def may_give(self) -> bool:
        """Whether it has the item, or some chunks of it, as far as we know."""
        return self.theirs in (Theirs.HAS, Theirs.ASKED, Theirs.BUSY, Theirs.SILENT)

    @property
    def has_all(self) -> bool:
        return self.theirs is Theirs.SENT or (self.may_give and self.parts == ALL)

    @property
    def is_news(self) -> bool:
        """Whether the peer is yet to be told of the item."""
        return not (self.told or self.has_all or self.ours is Ours.DECLINED)


class ItemLedger:
    """The rows of all live peers. `is_wanted` tells of an item whether its rows must stay."""

    def __init__(self, is_wanted: Callable[[ItemId], bool], limits: Limits) -> None:
        self._limits = limits
        self._rows: dict[NodeId, OrderedDict[ItemId, LedgerRow]] = {}
        self._is_wanted = is_wanted

    def up(self, node: NodeId) -> None:
        self._rows[node] = OrderedDict()

    def down(self, node: NodeId) -> None:
        self._rows.pop(node, None)

    def find(self, node: NodeId, item: ItemId) -> LedgerRow | None:
        rows = self._rows.get(node)
        return rows.get(item) if rows is not None else None

    def row(self, node: NodeId, item: ItemId) -> LedgerRow:
        """Return the row of a live peer, a new one if there is none."""
        rows = self._rows[node]
        row = rows.get(item)
        if row is None:
            row = rows[item] = LedgerRow()
            if len(rows) > self.room:
                self._make_room(rows)
        return row

    @property
    def room(self) -> int:
        """How many rows one peer may have."""
        limits = self._limits
        return max(limits.least_peer_rows, min(limits.max_peer_rows, limits.max_rows // max(1, len(self._rows))))

    def _make_room(self, rows: OrderedDict[ItemId, LedgerRow]) -> None:
        for _ in range(len(rows)):
            item = next(iter(rows))
            if not self._is_wanted(item):
                del rows[item]
                return
            rows.move_to_end(item)
