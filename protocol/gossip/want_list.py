"""Which announced items to ask for, of whom, and when to ask somebody else.

Rules
 1. An item is asked of one holder at a time. Each holder has a window of pulls in flight, which
    grows by one with what it delivers and halves when it stalls, as TCP's does: a slow line is
    asked for little, a liar for next to nothing.
 2. A holder stalls when it delivered nothing at all for `pull_patience` and the time that the
    item, or a chunk where it has more, takes on a slow line, or when it announces again what it was asked for: it could
    not send it. The holder asked least is next, those that owe us something last.
 3. Which items are asked for first is drawn by lot among the holders, then among the signers that one announced, and
    then among the signer's items: nobody is starved by whoever publishes most or by a link that brings the items of
    many keys, as keys are free and links are not, and two nodes that cannot take everything take different things. It
    is drawn from all that waits once in `announce_interval`, and between from what is new: announcements are free.
 4. An announcement is a promise for `PROMISE_LIFE_S`: what came after it may have pushed the item out since. A holder
    that was asked by then, delivered neither it nor anything else that it was asked for within `PROMISE_PATIENCE` times
    the patience, and has gone on announcing since, broke it; so did one that delivered others, be they copies, and not
    it within `MAX_QUEUE_S`: what is asked for waits behind what was, and announcements go first. One that broke
    `MAX_BROKEN` more than it kept is blamed; one slow reply, or a process that is blocked and says nothing, is not.
    Hanging up pays no debt: it stands for who comes back.
 5. What is asked for is wanted until it comes or stalls, however old the want is and however full the list: an
    answer to a pull of ours must not look like a push that nobody asked for. Everybody may answer as often as it was
    asked, whoever else brought the item meanwhile, be it wanted still or not, and whoever signed it once more, as it
    may have pushed it before.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile, zip_longest
from typing import NamedTuple

from protocol.config import Timing
from protocol.identity import NodeId
from protocol.lru import Recent
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import MAX_IDS, Entry, Pull

PULL_BYTES_PER_SECOND = 512 << 10  # a line of 4 Mbit/s
FIRST_WINDOW = 32
MAX_WINDOW = 64
MAX_PULL_BYTES_PER_PEER = 4 << 20  # a holder that says no more is found out within 10 s
MAX_WANTS = 8192
MAX_OFFERS = 2048  # wanted items of one holder: four can fill the table, one cannot
MAX_HOLDERS = 8  # remembered of one item; more are not needed to try
MAX_ASKS = 3  # of one holder for one item
WANT_LIFE_S = 60.0  # a round of most nodes: what demand did not reach by then, fresher items replace
MAX_FURTHER = 1024  # answers to come to pulls of items that came
MAX_DEPARTED = 256  # holders that left in debt
MAX_LOOKS = 256  # wants looked at each time: bounds the work where all holders are busy
LOOKS_EACH = 4  # for each item that may be asked for, some of whose holders are busy
SLACK = 2  # times its even share is looked at of each holder, as some offer less, or the same
# While bytes flow, a stalled item may wait this many times the patience, and a promise this long in all.
PROMISE_PATIENCE = 5
MAX_QUEUE_S = MAX_PULL_BYTES_PER_PEER / (16 << 10)  # the queue of one link on a 16th of a line of 2 Mbit/s
PROMISE_LIFE_S = 10.0  # a node that gets 3 MiB of items a second holds each for as long, by default
MAX_BROKEN = 8
MAX_CREDIT = MAX_WINDOW  # promises kept in advance of as many broken: all that were in flight when a line broke

_BySigner = dict[bytes, dict[ItemId, None]]


class _Debt(NamedTuple):
    asked_at: float
    is_promise: bool  # whether it was asked for while the announcement was one


@dataclass(slots=True)
class _Want:
    entry: Entry
    since: float
    holders: dict[NodeId, int]  # and how often each was asked
    asked: NodeId | None = None
    asked_at: float = 0.0
    is_promise: bool = True  # whether whoever is asked had promised it by then

    @property
    def answer_bytes(self) -> int:
        """What a pull brings at the most, whatever size the first who announced it said: of a large item an outline."""
        return min(self.entry.size, HEAD_BYTES + CHUNK_BYTES)


@dataclass(slots=True)
class _Holder:
    offers: dict[ItemId, float] = field(default_factory=dict)  # and when each was last announced
    waiting: _BySigner = field(default_factory=dict)  # those that are asked of nobody
    window: float = FIRST_WINDOW
    pulls: int = 0
    size: int = 0  # bytes in flight
    delivered: float = float("-inf")
    spoke: float = float("-inf")
    owed: dict[ItemId, _Debt] = field(default_factory=dict)  # stalled items
    broken: int = 0
    blameless_until: float = float("-inf")  # one bad moment is blamed once, however much was asked for in it
    narrowed: float = float("-inf")  # when the window was last halved

    @property
    def has_room(self) -> bool:
        """Whether it may be asked for one more, if that is small enough."""
        return self.pulls < int(self.window)

    def enlist(self, entry: Entry) -> None:
        """An item waits to be asked for."""
        self.waiting.setdefault(entry.signer, {})[entry.id] = None

    def unlist(self, entry: Entry) -> None:
        """An item waits no more."""
        items = self.waiting.get(entry.signer, {})
        items.pop(entry.id, None)
        if not items:
            self.waiting.pop(entry.signer, None)

    def leave(self) -> bool:
        """Keep only what it owes, enough for one blame; True if there is anything."""
        self.offers, self.waiting, self.pulls, self.size = {}, {}, 0, 0
        self.owed = dict(islice(self.owed.items(), MAX_BROKEN))
        self.broken = min(self.broken, MAX_BROKEN)
        return bool(self.owed) or self.broken > 0


class Pulls:
    """Wanted items, each delayed, waiting or asked of one holder; bounded in number and by holder."""

    def __init__(self, timing: Timing, rng: random.Random) -> None:
        self._patience = timing.pull_patience
        self._interval = timing.announce_interval
        self._rng = rng
        self._wants: dict[ItemId, _Want] = {}
        self._delayed: dict[ItemId, float] = {}  # all by the same delay: the first is due first
        self._fresh: dict[ItemId, None] = {}  # that wait, or have one holder more, since the last look
        self._next_look = float("-inf")  # at all that waits
        self._asked: dict[ItemId, None] = {}
        self._holders: dict[NodeId, _Holder] = {}
        self._departed: Recent[NodeId, _Holder] = Recent(MAX_DEPARTED)
        self._further: Recent[tuple[ItemId, NodeId], int] = Recent(MAX_FURTHER)  # answers that may come yet
        self._pushed: Recent[tuple[ItemId, NodeId], int] = Recent(MAX_FURTHER)  # by whoever signed it, and may come yet
        self._failed = 0  # pulls since the last check

    def __len__(self) -> int:
        return len(self._wants)

    @property
    def delayed(self) -> bool:
        """Whether an item waits for a push."""
        return bool(self._delayed)

    def offered(self, node: NodeId, entry: Entry, now: float, delay: float = 0.0) -> bool:
        """Note that `node` holds an item that we lack, to be asked for after `delay`; True if nobody held it before."""
        holder = self._holders.get(node)
        if holder is None:
            holder = self._holders[node] = self._departed.pop(node) or _Holder()
        holder.spoke = now
        want = self._wants.get(entry.id)
        new = want is None
        if want is None:
            self._make_room()
            want = self._wants[entry.id] = _Want(entry, now, {})
            if delay > 0:
                self._delayed[entry.id] = now + delay
        elif want.asked == node and now >= want.asked_at + self._patience / 2 and not self._stall(want, now):
            return False
        if node in want.holders:
            holder.offers[entry.id] = now
        elif len(want.holders) < MAX_HOLDERS:
            want.holders[node] = 0
            holder.offers[entry.id] = now
            if want.asked is None and entry.id not in self._delayed:
                holder.enlist(want.entry)  # whatever signer this one says
                self._fresh[entry.id] = None  # it may be free where the others are busy
            if len(holder.offers) > MAX_OFFERS:
                oldest = next(iter(holder.offers))
                self._withdraw(node, next((one for one in holder.offers if self._wants[one].asked != node), oldest))
        return new

    def holders(self, item_id: ItemId) -> list[NodeId]:
        """Return who is known to hold a wanted item."""
        want = self._wants.get(item_id)
        return list(want.holders) if want is not None else []

    def owes(self, node: NodeId) -> bool:
        """Tell whether a holder has not brought what it was asked for, in the time that this takes."""
        holder = self._holders.get(node)
        return holder is not None and bool(holder.owed)

    def is_asked(self, item_id: ItemId, node: NodeId) -> bool:
        """Tell whether the item was asked for, of `node` some time ago or of anybody."""
        want = self._wants.get(item_id)
        return (want is not None and want.asked is not None) or self._may_answer(item_id, node, want)

    def _may_answer(self, item_id: ItemId, node: NodeId, want: _Want | None) -> bool:
        """Tell whether `node` was asked for an item, which may be one that we `want`, and may answer yet."""
        holder = self._holders.get(node)
        is_owed = holder is not None and item_id in holder.owed
        is_further = self._further.get((item_id, node)) is not None
        return is_owed or is_further or (want is not None and bool(want.holders.get(node)))

    def arrived(self, item_id: ItemId, node: NodeId, now: float, signer: NodeId | None = None) -> bool:
        """The item came from `node`, for the first time or not; True if it may answer a pull, be that some time ago.

        So may what whoever signed it sends once more: it may have pushed it before.
        """
        want, holder = self._wants.get(item_id), self._holders.get(node)
        may_answer = self._may_answer(item_id, node, want)
        asked = may_answer or (want is not None and want.asked is not None)
        if holder is not None and may_answer:
            holder.delivered = now
        if holder is not None and (holder.owed.pop(item_id, None) is not None or (want and want.asked == node)):
            holder.window = min(MAX_WINDOW, holder.window + 1)
            holder.broken = max(-MAX_CREDIT, holder.broken - 1)
        if want is None or not want.holders.get(node):
            asked = self._is_further(item_id, node) or asked
        if want is not None:
            self._expect(want, node)
            if signer is not None and want.holders.get(signer):
                self._pushed.set((item_id, signer), 1)
            self._forget(want)
        return asked

    def _expect(self, want: _Want, brought_by: NodeId | None) -> None:
        """Note that whoever was asked may answer yet, but for the one answer that came."""
        for node, asks in want.holders.items():
            if (further := asks - (node == brought_by)) > 0:
                key = (want.entry.id, node)
                self._further.set(key, further + (self._further.get(key) or 0))

    def _is_further(self, item_id: ItemId, node: NodeId) -> bool:
        """Tell whether `node` was asked for an item once more than it has brought it; that is counted as brought."""
        key = (item_id, node)
        for memory in (self._further, self._pushed):
            if further := memory.get(key):
                memory.pop(key)
                if further > 1:
                    memory.set(key, further - 1)
                return True
        return False

    def lost(self, node: NodeId) -> int:
        """A holder is gone, and with it what it was asked for; return how many items that were."""
        holder = self._holders.get(node)
        if holder is None:
            return 0
        pulls = holder.pulls
        for item_id in list(holder.offers):
            self._withdraw(node, item_id)
        del self._holders[node]
        if holder.leave():
            self._departed.set(node, holder)
        return pulls

    def check(self, now: float, life: float = WANT_LIFE_S) -> tuple[int, list[NodeId]]:
        """Give up what stalls and what is wanted for `life` seconds.

        Returns how many pulls failed, and who broke its promises.
        """
        for want in list(takewhile(lambda want: want.since + life <= now, self._wants.values())):
            if want.asked is None:
                self._give_up(want)
        for item_id in list(self._asked):
            want = self._wants[item_id]
            if want.asked is not None and self._stalls(want, self._holders[want.asked], now):
                self._stall(want, now)
        failed, self._failed = self._failed, 0
        return failed, [node for node, holder in self._holders.items() if self._blame(holder, now)]

    def due(self, now: float, allowance: float) -> Iterator[tuple[NodeId, Pull]]:
        """Yield whom to send which pull now, of at most `allowance` items in all."""
        while self._delayed and next(iter(self._delayed.values())) <= now:
            item_id = next(iter(self._delayed))
            del self._delayed[item_id]
            self._wait(self._wants[item_id])
        if now >= self._next_look:
            self._next_look = now + self._interval
            waiting = [holder.waiting for holder in self._holders.values() if holder.waiting and holder.has_room]
        else:
            waiting = self._by_holder(self._fresh)
        self._fresh.clear()
        asks: defaultdict[NodeId, list[ItemId]] = defaultdict(list)
        for item_id in self._draw(waiting, allowance) if allowance >= 1 else ():
            want = self._wants[item_id]
            node = self._choose(want)
            if node is not None:
                self._ask(want, node, now)
                asks[node].append(item_id)
                allowance -= 1
                if allowance < 1:
                    break
        for node, ids in asks.items():
            for start in range(0, len(ids), MAX_IDS):
                yield node, Pull(tuple(ids[start : start + MAX_IDS]))

    def _draw(self, waiting: Sequence[_BySigner], allowance: float) -> Iterable[ItemId]:
        """Return some of what holders offer, enough for the allowance, one of each holder in turn, all by lot."""
        if not waiting:
            return ()
        looks = int(min(MAX_LOOKS, LOOKS_EACH * allowance))
        share = SLACK * -(-looks // len(waiting))
        drawn = [self._draw_of(offered, share) for offered in self._rng.sample(waiting, len(waiting))]
        return islice(dict.fromkeys(_in_turn(drawn)), looks)

    def _by_holder(self, ids: Iterable[ItemId]) -> list[_BySigner]:
        """Return these items as those of their holders that have room for one more offer them."""
        found: defaultdict[NodeId, _BySigner] = defaultdict(dict)
        for want in map(self._wants.__getitem__, ids):
            for node in want.holders:
                if self._holders[node].has_room:
                    found[node].setdefault(want.entry.signer, {})[want.entry.id] = None
        return list(found.values())

    def _draw_of(self, offered: _BySigner, count: int) -> Iterable[ItemId]:
        """Return some of what one holder offers, one of each signer in turn."""
        signers = self._rng.sample(list(offered.values()), min(count, len(offered)))
        each = -(-count // len(signers))
        return _in_turn([self._rng.sample(list(items), min(each, len(items))) for items in signers])

    def _choose(self, want: _Want) -> NodeId | None:
        free = [node for node in want.holders if self._may_ask(self._holders[node], want.answer_bytes)]
        if not free:
            return None
        holders = self._holders
        return min(free, key=lambda node: (want.holders[node], len(holders[node].owed), holders[node].size))

    def _may_ask(self, holder: _Holder, size: int) -> bool:
        fits = holder.pulls == 0 or holder.size + size <= MAX_PULL_BYTES_PER_PEER
        return fits and holder.has_room

    def _ask(self, want: _Want, node: NodeId, now: float) -> None:
        self._unwait(want)
        holder = self._holders[node]
        holder.pulls += 1
        holder.size += want.answer_bytes
        want.asked, want.asked_at = node, now
        want.is_promise = now <= holder.offers[want.entry.id] + PROMISE_LIFE_S
        want.holders[node] += 1
        self._asked[want.entry.id] = None

    def _stalls(self, want: _Want, holder: _Holder, now: float) -> bool:
        patience = self._patience + want.answer_bytes / PULL_BYTES_PER_SECOND
        silent = now >= max(want.asked_at, holder.delivered) + patience
        return silent or now >= want.asked_at + PROMISE_PATIENCE * patience

    def _stall(self, want: _Want, now: float) -> bool:
        """Hold it against who was asked that it did not deliver; False: nobody is left to ask."""
        assert want.asked is not None
        holder = self._holders[want.asked]
        holder.owed.setdefault(want.entry.id, _Debt(want.asked_at, want.is_promise))
        if now > holder.narrowed:
            holder.window, holder.narrowed = max(1.0, holder.window / 2), now
        self._failed += 1
        self._take_back(want)
        if min(want.holders.values()) >= MAX_ASKS:
            self._give_up(want)
            return False
        return True

    def _blame(self, holder: _Holder, now: float) -> bool:
        period = PROMISE_PATIENCE * self._patience
        for item_id in [one for one, debt in holder.owed.items() if self._is_overdue(debt, holder, now)]:
            debt = holder.owed.pop(item_id)
            holder.broken += debt.is_promise and holder.spoke > debt.asked_at
        if holder.broken < MAX_BROKEN or now < holder.blameless_until:
            return False
        holder.broken = 0
        holder.blameless_until = now + period
        return True

    def _is_overdue(self, debt: _Debt, holder: _Holder, now: float) -> bool:
        period = PROMISE_PATIENCE * self._patience
        return max(debt.asked_at, min(holder.delivered, debt.asked_at + MAX_QUEUE_S - period)) + period <= now

    def _make_room(self) -> None:
        if len(self._wants) >= MAX_WANTS:
            oldest = next(iter(self._wants.values()))
            self._give_up(next((want for want in self._wants.values() if want.asked is None), oldest))

    def _wait(self, want: _Want) -> None:
        for node in want.holders:
            self._holders[node].enlist(want.entry)
        self._fresh[want.entry.id] = None

    def _unwait(self, want: _Want) -> None:
        self._fresh.pop(want.entry.id, None)
        for node in want.holders:
            self._holders[node].unlist(want.entry)

    def _take_back(self, want: _Want) -> None:
        self._release(want)
        self._wait(want)

    def _release(self, want: _Want) -> None:
        if want.asked is not None:
            holder = self._holders[want.asked]
            holder.pulls -= 1
            holder.size -= want.answer_bytes
            want.asked = None
            del self._asked[want.entry.id]

    def _withdraw(self, node: NodeId, item_id: ItemId) -> None:
        """One holder less; without any, the item is forgotten."""
        want = self._wants[item_id]
        if want.asked == node:
            self._take_back(want)
        del want.holders[node]
        del self._holders[node].offers[item_id]
        self._holders[node].unlist(want.entry)
        if not want.holders:
            self._forget(want)

    def _give_up(self, want: _Want) -> None:
        """Want an item no more that did not come."""
        self._expect(want, None)
        self._forget(want)

    def _forget(self, want: _Want) -> None:
        self._release(want)
        self._unwait(want)
        self._delayed.pop(want.entry.id, None)
        for node in want.holders:
            del self._holders[node].offers[want.entry.id]
        del self._wants[want.entry.id]


def _in_turn(columns: Iterable[Iterable[ItemId]]) -> Iterator[ItemId]:
    """Return the first of each, then the second of each, and so on."""
    return (item_id for item_id in chain.from_iterable(zip_longest(*columns)) if item_id is not None)
