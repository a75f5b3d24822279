"""The ledger: one row for a peer and an item, with all that the two nodes said to each other of it.

    Theirs    the peer's part in an item that we may lack
    NONE      nothing is known, or it said DONT_HAVE
    HAS       it has the item, or the chunks `LedgerRow.parts`; we may ask it once `LedgerRow.until` has passed
    SENT      it sent us the item: we announce the item to it no more

The table `THEIRS` has every change of this part; what is not in the table changes nothing. The number of rows is
bounded, for each peer and in all. The oldest row of a peer goes first; rows of wanted items stay.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple

from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.lru import Recent
from protocol.wire.envelope import ItemId

ALL = -1  # all chunks, in a set that has a bit for each
WHOLE = -1  # in place of a chunk's number: the item itself, or its outline


class Place(NamedTuple):
    """A chunk of an item; or WHOLE, the item itself or its outline."""

    item: ItemId
    part: int


class Theirs(IntEnum):
    """The peer's part in an item; see the module's comment."""

    NONE = auto()
    HAS = auto()
    SENT = auto()


class Statement(IntEnum):
    """What a peer did about an item."""

    HAVE = auto()
    GAVE_ALL = auto()
    LACK = auto()


THEIRS: dict[tuple[Theirs, Statement], Theirs] = {
    (Theirs.NONE, Statement.HAVE): Theirs.HAS,
    (Theirs.NONE, Statement.GAVE_ALL): Theirs.SENT,
    (Theirs.HAS, Statement.GAVE_ALL): Theirs.SENT,
    (Theirs.HAS, Statement.LACK): Theirs.NONE,
}


@dataclass(slots=True)
class LedgerRow:
    """What is known of one peer and one item."""

    theirs: Theirs = Theirs.NONE
    parts: int = ALL  # the chunks that it has, where it has any
    due: int = 0  # how many answers it still owes us, those included that we wait for no longer
    since: float = 0.0  # when it was last asked
    until: float = 0.0  # when it may be asked again, if it was silent or busy
    failures: int = 0  # how often it was silent or busy when it was asked, since it last gave a chunk
    told: bool = False  # whether it was told that we have all of the item, or is sent it
    taken: int = 0  # the chunks that it acknowledged to have from us

    def note(self, said: Statement) -> None:
        self.theirs = THEIRS.get((self.theirs, said), self.theirs)

    def may_be_asked(self, now: float) -> bool:
        return self.theirs is Theirs.HAS and now >= self.until

    @property
    def has_all(self) -> bool:
        return ALL in (self.held, self.taken)

    @property
    def held(self) -> int:
        """The chunks that it has by its own word, or because it sent us the item."""
        match self.theirs:
            case Theirs.SENT:
                return ALL
            case Theirs.HAS:
                return self.parts
        return 0


class ItemLedger:
    """The rows of all live peers. `is_wanted` tells of an item whether its rows must stay."""

    def __init__(self, is_wanted: Callable[[ItemId], bool], limits: Limits) -> None:
        self._limits = limits
        self._rows: dict[NodeId, OrderedDict[ItemId, LedgerRow]] = {}
        self._is_wanted = is_wanted
        self._departed: Recent[ItemId, int] = Recent(limits.max_held)  # the chunks that peers had when they left

    def up(self, node: NodeId) -> None:
        self._rows[node] = OrderedDict()

    def down(self, node: NodeId) -> None:
        for item, row in self._rows.pop(node, {}).items():
            if held := row.held | row.taken:
                self._departed.set(item, held | (self._departed.get(item) or 0))

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

    def lacks(self, node: NodeId, item: ItemId) -> bool:
        """Tell whether a peer may lack some of the item, as far as we know."""
        row = self.find(node, item)
        return row is None or not row.has_all

    def is_elsewhere(self, item: ItemId, chunks: int) -> bool:
        """Tell whether peers have all `chunks` of an item, one of them or some together; or had when they left."""
        whole, held = (1 << chunks) - 1, self._departed.get(item) or 0
        for row in filter(None, (rows.get(item) for rows in self._rows.values())):
            held |= row.held | row.taken
        return held & whole == whole

    def is_news(self, node: NodeId, item: ItemId) -> bool:
        """Tell whether a peer may lack some of the item and was not told that we have all of it."""
        row = self.find(node, item)
        return row is None or not (row.told or row.has_all)

    def untell(self, node: NodeId) -> None:
        """Note that a peer may not know what it was told."""
        for row in self._rows[node].values():
            row.told = False

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
