"""Which announced items to ask for, of whom, and when to ask somebody else."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.envelope import ItemId
from protocol.gossip_events import SendPull
from protocol.identity import NodeId
from protocol.messages import MAX_IDS

# How long a holder may take for all it was asked for: a pause of its process, and a line of 4 Mbit/s.
PULL_PATIENCE_S = 2.0
PULL_BYTES_PER_SECOND = 512 << 10
MAX_PULLS_PER_PEER = 64
MAX_PULL_BYTES_PER_PEER = 4 << 20  # a holder that says no more is found out within 10 s
MAX_WANTS = 8192
MAX_HOLDERS = 8  # remembered of one item; more are not needed to try
MAX_ASKS = 3  # of one holder for one item


@dataclass(slots=True)
class _Want:
    size: int
    due: float  # when to ask; once asked, when to stop waiting
    holders: dict[NodeId, int]  # and how often each was asked
    asked: NodeId | None = None


@dataclass(slots=True)
class _Load:
    pulls: int = 0
    size: int = 0


class Pulls:
    """Wanted items, each waiting to be asked for or asked of one holder; bounded in number and by peer."""

    def __init__(self) -> None:
        self._wants: dict[ItemId, _Want] = {}
        self._loads: defaultdict[NodeId, _Load] = defaultdict(_Load)

    def __len__(self) -> int:
        return len(self._wants)

    def offered(self, node: NodeId, item_id: ItemId, size: int, due: float) -> None:
        """Note that `node` holds an item that we lack; ask for it from `due` on."""
        want = self._wants.get(item_id)
        if want is not None:
            if node not in want.holders and len(want.holders) < MAX_HOLDERS:
                want.holders[node] = 0
        elif len(self._wants) < MAX_WANTS:  # beyond that, holders announce again what is newest
            self._wants[item_id] = _Want(size, due, {node: 0})

    def arrived(self, item_id: ItemId) -> None:
        """The item came, from whomever."""
        want = self._wants.pop(item_id, None)
        if want is not None:
            self._release(want)

    def lost(self, node: NodeId) -> None:
        """A holder is gone, and with it what it was asked for."""
        for item_id, want in list(self._wants.items()):
            if want.holders.pop(node, None) is not None:
                if want.asked == node:
                    self._take_back(want)
                if not want.holders:
                    del self._wants[item_id]
        self._loads.pop(node, None)

    def due(self, now: float) -> Iterator[SendPull]:
        """Yield the pulls to send now; for what did not come in time, the holder that was asked least is next."""
        for item_id, want in list(self._wants.items()):
            if want.asked is not None and want.due <= now:
                self._take_back(want)
                if min(want.holders.values()) >= MAX_ASKS:
                    del self._wants[item_id]
        asks: defaultdict[NodeId, list[ItemId]] = defaultdict(list)
        for item_id, want in self._wants.items():
            if want.asked is None and want.due <= now:
                holder = min(want.holders, key=lambda node: (want.holders[node], self._loads[node].size))
                if self._may_ask(holder, want.size):
                    load = self._loads[holder]
                    load.pulls += 1
                    load.size += want.size
                    want.asked = holder
                    want.holders[holder] += 1
                    want.due = now + PULL_PATIENCE_S + load.size / PULL_BYTES_PER_SECOND
                    asks[holder].append(item_id)
        for node, ids in asks.items():
            for start in range(0, len(ids), MAX_IDS):
                yield SendPull(node, tuple(ids[start : start + MAX_IDS]))

    def _may_ask(self, node: NodeId, size: int) -> bool:
        load = self._loads[node]
        return load.pulls < MAX_PULLS_PER_PEER and (load.pulls == 0 or load.size + size <= MAX_PULL_BYTES_PER_PEER)

    def _take_back(self, want: _Want) -> None:
        self._release(want)
        want.asked, want.due = None, 0.0

    def _release(self, want: _Want) -> None:
        if want.asked is not None:
            load = self._loads[want.asked]
            load.pulls -= 1
            load.size -= want.size
