"""Which items to ask for, of whom, and when to ask somebody else. `ledger` defines the rows.

Rules
 1. A want lives until its item comes or is stale, whoever fails. A small item, and the outline of a large one, is
    asked of one holder at a time; the chunks of a large one of all that have them, the rarest first (see `chunks`).
 2. A holder has a window of bytes on their way. It grows with what comes within `QUICK_S`, halves with what takes
    longer, down to three chunks, and further when the holder is silent. So a line that many use is asked for little,
    and what they ask for may come from each other meanwhile; a liar is asked for next to nothing.
 3. Every WANT has an answer: the item, DONT_HAVE or BUSY. A holder is silent if it answers nothing for `patience`, or
    not this want in `OTHERS` times that while it answers others. Then another is asked, and the silent one last, after
    a pause that doubles. It pays if it went on announcing meanwhile; a process that is blocked says nothing at all. A
    holder that announced what it does not have pays, too.
 4. A busy holder is waited for, unless another has nothing to do.
 5. Which items are asked for first is drawn by lot among the holders, then among the signers that one announced, and
    then among the signer's items: nobody is starved by whoever publishes most or by a link that brings the items of
    many keys, as keys are free and links are not, and two nodes that cannot take everything take different things. It
    is drawn from all that waits once in `announce_interval`, and between from what is new: announcements are free.
 6. Items that the node wants beside the others are asked for in the same way, apart from these and the newest first.
 7. Where the demand has a bound, what it did not reach in `UNASKED_S` is forgotten: fresher items replace it.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, islice, takewhile, zip_longest

from protocol.config import Limits, Timing
from protocol.events import Item, Outline
from protocol.gossip.chunks import Partial, Partials
from protocol.gossip.ledger import ALL, WHOLE, ItemLedger, LedgerRow, Statement, Theirs
from protocol.identity import NodeId
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import MAX_CHUNKS, MAX_IDS, Cancel, Entry, ItemChunk, Want, WantedPart

QUICK_S = 1.0  # ten round trips of 100 ms
BUSY_S = 0.25  # seconds between two BUSY without ids that count of one peer; an honest one says it twice a patience
LEAST_COST = 1 << 10  # what a small item counts for in a window: as many as it holds are asked for at once
SLOW_BYTES_PER_SECOND = 64 << 10  # a chunk takes two seconds more on half a line of 1 Mbit/s
OTHERS = 5  # patiences that an answer may take which others overtake, as small items overtake large ones
MAX_PAUSE = 5  # doublings of the pause after a silence
UNASKED_S = 60.0  # a round of most nodes
LOOKS_EACH = 4  # for each item that may be asked for, some of whose holders are busy
SLACK = 2  # times its even share is looked at of each holder, as some offer less, or the same

_BySigner = dict[bytes, dict[ItemId, None]]
Asks = list[tuple[NodeId, Want]]


class Took(Enum):
    """The outcome of a chunk that came."""

    TAKEN = "taken"
    LATE = "late"  # it was asked for, and is of no use any more
    UNASKED = "unasked"
    FALSE = "false"
    MISSIZED = "missized"  # it is proven, and its signer stated another size: the item is wanted no more


@dataclass(slots=True)
class _Wanted:
    entry: Entry
    since: float
    holders: dict[NodeId, None] = field(default_factory=dict)
    asked_of: NodeId | None = None  # for the whole, or the outline
    was_asked: bool = False

    @property
    def is_large(self) -> bool:
        return self.entry.size > HEAD_BYTES + CHUNK_BYTES

    def cost(self, part: int) -> int:
        """Return what asking for a part takes of a holder's window."""
        if part != WHOLE:
            return CHUNK_BYTES
        return LEAST_COST if self.is_large else max(LEAST_COST, self.entry.size)


@dataclass(slots=True)
class _Holder:
    window: int  # bytes
    offers: dict[ItemId, None] = field(default_factory=dict)
    waiting: _BySigner = field(default_factory=dict)  # those that are asked of nobody
    asked: dict[ItemId, None] = field(default_factory=dict)  # of it, the one that waits longest first
    in_flight: int = 0  # bytes
    answered: float = 0.0  # when it last gave or said something of what it was asked, or was asked after a pause
    spoke: float = float("-inf")  # when it last announced something
    busy_at: float = float("-inf")  # when it last said that all waits for its line

    def has_room(self, size: int = LEAST_COST) -> bool:
        """Tell whether it may be asked for so many bytes more."""
        return self.in_flight == 0 or self.in_flight + size <= self.window

    def enlist(self, entry: Entry) -> None:
        self.waiting.setdefault(entry.signer, {})[entry.id] = None

    def unlist(self, entry: Entry) -> None:
        items = self.waiting.get(entry.signer, {})
        items.pop(entry.id, None)
        if not items:
            self.waiting.pop(entry.signer, None)


class Wants:
    """Wanted items, bounded in number and by holder. `now` is steady, in seconds."""

    def __init__(self, ledger: ItemLedger, timing: Timing, limits: Limits, rng: random.Random) -> None:
        self._ledger = ledger
        self._limits = limits
        self._patience = timing.pull_patience + CHUNK_BYTES / SLOW_BYTES_PER_SECOND
        self._interval = timing.announce_interval
        self._life = limits.max_item_age_s
        self._rng = rng
        self._wants: dict[ItemId, _Wanted] = {}
        self._partials = Partials(limits)
        self._delayed: dict[ItemId, float] = {}  # all by the same delay: the first is due first
        self._fresh: dict[ItemId, None] = {}  # that wait, or have one holder more, since the last look
        self._next_look = float("-inf")  # at all that waits
        self._beside: defaultdict[NodeId, dict[ItemId, None]] = defaultdict(dict)  # the newest of each holder
        self._holders: dict[NodeId, _Holder] = {}
        self._cancels: defaultdict[NodeId, dict[ItemId, list[int]]] = defaultdict(dict)
        self._failed = 0  # items that were asked for and did not come, since the last check
        self.partial: Callable[[ItemId], Partial | None] = self._partials.get

    def __len__(self) -> int:
        return len(self._wants)

    def __contains__(self, item_id: ItemId) -> bool:
        return item_id in self._wants

    @property
    def partials(self) -> int:
        return len(self._partials)

    @property
    def delayed(self) -> bool:
        return bool(self._delayed)

    def up(self, node: NodeId) -> None:
        self._holders[node] = _Holder(self._limits.first_window_bytes)

    # What peers say

    def have(self, node: NodeId, entry: Entry, now: float, delay: float = 0.0) -> bool:
        """Note that `node` holds an item that we lack, to be asked for after `delay`; True if nobody held it before."""
        holder, want = self._holders[node], self._wants.get(entry.id)
        holder.spoke = now
        new = want is None
        if want is None:
            self._make_room()
            want = self._wants[entry.id] = _Wanted(entry, now)
            if delay > 0:
                self._delayed[entry.id] = now + delay
        row = self._ledger.row(node, entry.id)
        row.note(Statement.THEY_HAVE)
        if not row.may_give:
            return new
        parts, partial = int.from_bytes(entry.parts, "little") if entry.parts else ALL, self._partials.get(entry.id)
        if node in want.holders:
            if partial is not None:
                partial.held(parts & ~row.parts, 1)
            row.parts |= parts
        elif len(want.holders) < self._limits.max_holders:
            row.parts = parts
            want.holders[node] = holder.offers[entry.id] = None
            if partial is not None:
                partial.held(parts, 1)
            elif want.asked_of is None and entry.id not in self._delayed:
                holder.enlist(want.entry)  # whatever signer this one says
            if len(holder.offers) > min(self._limits.max_offers, self._ledger.room // 2):
                oldest = next(iter(holder.offers))
                self._withdraw(node, next((one for one in holder.offers if one not in holder.asked), oldest))
        if want.asked_of is None and partial is None and entry.id not in self._delayed and entry.id in self._wants:
            self._fresh[entry.id] = None  # it may be free where the others are busy
        return new

    def arrived(self, item_id: ItemId, node: NodeId, now: float) -> bool:
        """The item itself came from `node`; True if it answers a WANT, be that some time ago or of another peer."""
        want, row, holder = self._wants.get(item_id), self._ledger.find(node, item_id), self._holders.get(node)
        is_answer = row is not None and (WHOLE in row.asked or row.due > 0)
        if holder is not None and row is not None and is_answer:
            self._gave(holder, row, LEAST_COST if want is None else want.cost(WHOLE), now)
        if row is not None and WHOLE not in row.asked and row.due > 0:
            row.due -= 1
        asked = is_answer or (want is not None and want.asked_of is not None)
        if want is not None:
            self._forget(want, brought_by=node)
        if row is not None:
            row.note(Statement.THEY_GAVE_ALL)
        return asked

    def outlined(self, node: NodeId, outline: Outline, now: float) -> bool:
        """The outline of an item came that we asked for; False if there is no room to fetch it."""
        want, row, holder = self._wants[outline.id], self._ledger.row(node, outline.id), self._holders[node]
        self._gave(holder, row, LEAST_COST, now)
        if want.asked_of is not None:
            self._settle(want, want.asked_of, WHOLE, late=want.asked_of != node)
            want.asked_of = None
        else:
            self._unwait(want)
        self._delayed.pop(outline.id, None)
        row.note(Statement.THEY_GAVE)
        gone = self._partials.begin(outline, now)
        if gone is None:
            row.until = now + self._patience
            self._wait(want)
            return False
        for item_id in gone:
            self._give_way(self._wants[item_id])
        partial = self._partials.get(outline.id)
        assert partial is not None
        for one in want.holders:
            partial.held(self._ledger.row(one, outline.id).parts, 1)
        return True

    def was_asked(self, item_id: ItemId, node: NodeId) -> bool:
        """Tell whether `node` was asked for the item, or its outline, and may answer yet."""
        row = self._ledger.find(node, item_id)
        return row is not None and (WHOLE in row.asked or row.due > 0)

    def is_asked(self, item_id: ItemId, node: NodeId) -> bool:
        """Tell whether the item was asked for, of `node` some time ago or of anybody."""
        want = self._wants.get(item_id)
        return (want is not None and want.asked_of is not None) or self.was_asked(item_id, node)

    def late(self, item_id: ItemId, node: NodeId) -> None:
        """An answer came that was asked for, and is of no use any more."""
        row = self._ledger.row(node, item_id)
        row.due = max(0, row.due - 1)

    def topic(self, item_id: ItemId) -> bytes:
        """Return the topic that a wanted item is said to have."""
        return self._wants[item_id].entry.topic

    def chunk_arrived(self, node: NodeId, chunk: ItemChunk, now: float) -> Took:
        row, want, partial = self._ledger.find(node, chunk.id), self._wants.get(chunk.id), self._partials.get(chunk.id)
        index = chunk.index
        if row is None or not (index in row.asked or row.due > 0):
            return Took.UNASKED
        is_asked = index in row.asked
        row.due -= not is_asked
        self._gave(self._holders[node], row, CHUNK_BYTES, now)
        if want is None or partial is None or index >= partial.count:
            return Took.LATE
        if not partial.outline.proves(chunk):
            if node in want.holders:
                self._withdraw(node, chunk.id)
            row.note(Statement.THEY_LIED)
            return Took.FALSE
        if len(chunk.data) != partial.outline.size_of(index):
            self._forget(want)
            return Took.MISSIZED
        if index in partial.chunks:
            return Took.LATE
        asked_of = partial.asked.pop(index, None)
        if asked_of is not None:
            self._settle(want, asked_of, index, late=asked_of != node)
        if not row.asked or row.theirs is not Theirs.ASKED:
            row.note(Statement.THEY_GAVE)
        row.silences = 0
        partial.chunks[index] = chunk.data
        partial.missing &= ~(1 << index)
        partial.touched = now
        return Took.TAKEN

    def finish(self, item_id: ItemId, node: NodeId) -> Item | None:
        """Return a whole item, whose last chunk `node` brought, and forget it; None while something is missing."""
        partial = self._partials.get(item_id)
        if partial is None or not partial.is_whole:
            return None
        item = partial.item()
        self._forget(self._wants[item_id])
        if (row := self._ledger.find(node, item_id)) is not None:
            row.note(Statement.THEY_GAVE_ALL)
        return item

    def lack(self, node: NodeId, ids: Iterable[ItemId], now: float) -> int:
        """A peer does not have these; return how many of them it had announced and was asked for."""
        lies, holder = 0, self._holders[node]
        for item_id in ids:
            row = self._ledger.find(node, item_id)
            if row is None:
                continue
            if row.asked:
                lies += 1
                holder.answered = now
                self._failed += WHOLE in row.asked
            if item_id in self._wants and node in self._wants[item_id].holders:
                self._withdraw(node, item_id, late=False)
            row.note(Statement.THEY_LACK)
        return lies

    def busy(self, node: NodeId, ids: Sequence[ItemId], now: float) -> bool:
        """A peer gives nothing of these for now, or without any: all that it was asked for waits for its line.

        True if something is to be asked of another.
        """
        holder, is_free = self._holders[node], False
        if not ids and now < holder.busy_at + BUSY_S:
            return False
        holder.busy_at = holder.busy_at if ids else now
        holder.answered = now
        for item_id in list(ids or holder.asked):
            want, row = self._wants.get(item_id), self._ledger.find(node, item_id)
            if want is None or row is None or not row.asked:
                continue
            row.since = now
            holder.asked[item_id] = holder.asked.pop(item_id, None)
            row.until = now + self._patience
            if ids:
                row.note(Statement.THEY_ARE_BUSY)
                self._failed += WHOLE in row.asked
                self._release(want, node, late=False)
                is_free = True
            elif any(self._is_idle(one, item_id) for one in want.holders if one != node):
                self._cancels[node].setdefault(item_id, []).extend(row.asked)
                row.note(Statement.THEY_ARE_BUSY)
                self._release(want, node, late=True)
                is_free = True
        return is_free

    def unheard(self, node: NodeId, now: float) -> None:
        """What is said to a peer has no room: what it was asked for it may not hear of, and is not to blame.

        It is asked of another, or later again; an answer may come yet.
        """
        for item_id in list(self._holders[node].asked):
            row = self._ledger.row(node, item_id)
            row.until = now + self._patience
            row.note(Statement.THEY_ARE_BUSY)
            self._failed += WHOLE in row.asked
            self._release(self._wants[item_id], node, late=True)

    def have_beside(self, node: NodeId, item_id: ItemId) -> None:
        """A wanted item, which `node` has announced, is one of those that the node wants beside the others."""
        if item_id in self._wants:
            newest = self._beside[node]
            newest[item_id] = None
            if len(newest) > self._limits.max_beside:
                del newest[next(iter(newest))]

    def lost(self, node: NodeId) -> None:
        """A peer is gone, and with it what it was asked for."""
        holder = self._holders.get(node)
        if holder is None:
            return
        self._failed += sum(self._wants[item_id].asked_of == node for item_id in holder.asked)
        for item_id in list(holder.offers):
            self._withdraw(node, item_id)
        del self._holders[node]
        self._cancels.pop(node, None)
        self._beside.pop(node, None)

    def forget_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Fetch nothing more that somebody signed for whom `is_by` holds."""
        for item_id in [one for one, partial in self._partials.items() if is_by(partial.outline.signer)]:
            self._forget(self._wants[item_id])

    # What time brings

    def take_failed(self) -> int:
        """Return how many items were asked for and did not come, each once."""
        failed, self._failed = self._failed, 0
        return failed

    def check(self, now: float, *, bounded: bool) -> list[NodeId]:
        """Give up waiting for who is silent, and what is stale; return who is to blame."""
        life = UNASKED_S if bounded else self._life
        for want in list(takewhile(lambda want: want.since + life <= now, self._wants.values())):
            if want.since + self._life <= now or not (want.was_asked or want.entry.id in self._partials):
                self._forget(want)
        return [node for node, holder in self._holders.items() if self._expect_no_more(node, holder, now)]

    def _expect_no_more(self, node: NodeId, holder: _Holder, now: float) -> bool:
        """Give up what a holder does not answer; True if it went on announcing meanwhile."""
        is_silent, to_blame = holder.in_flight > 0 and holder.answered + self._patience <= now, False
        for item_id in list(holder.asked):
            row, want = self._ledger.row(node, item_id), self._wants[item_id]
            if not is_silent and row.since + OTHERS * self._patience > now:
                break
            to_blame = to_blame or holder.spoke > row.since
            row.note(Statement.NOTHING)
            row.silences = min(MAX_PAUSE, row.silences + 1)
            row.until = now + self._patience * 2.0**row.silences
            self._failed += WHOLE in row.asked
            self._release(want, node, late=True)
            holder.window = max(1, holder.window // 2)
        return to_blame

    def due(self, now: float, allowance: float) -> Asks:
        """Return whom to ask for what now, of at most `allowance` items in all, and what to cancel."""
        while self._delayed and next(iter(self._delayed.values())) <= now:
            item_id = next(iter(self._delayed))
            del self._delayed[item_id]
            self._wait(self._wants[item_id])
        if now >= self._next_look:
            self._next_look = now + self._interval
            waiting = [holder.waiting for holder in self._holders.values() if holder.waiting and holder.has_room()]
        else:
            waiting = self._by_holder(self._fresh)
        self._fresh.clear()
        return self._ask_some(waiting, now, allowance) + self.take_cancels()

    def due_beside(self, now: float, allowance: float) -> Asks:
        """Return whom to ask for what now of the items that are wanted beside the others, `allowance` at most."""
        if allowance < 1:
            return []
        ids = [
            one
            for one in dict.fromkeys(chain.from_iterable(self._beside.values()))
            if self._wants[one].asked_of is None and one not in self._delayed and one not in self._partials
        ]
        return self._ask_some(self._by_holder(ids), now, allowance) if ids else []

    def _ask_some(self, waiting: Sequence[_BySigner], now: float, allowance: float) -> Asks:
        """Ask for some of what holders offer, by lot."""
        asks: defaultdict[NodeId, dict[ItemId, list[int]]] = defaultdict(dict)
        for item_id in self._draw(waiting, allowance) if allowance >= 1 else ():
            want = self._wants[item_id]
            node = self._choose(want, now)
            if node is not None:
                self._ask(want, node, WHOLE, now)
                asks[node][item_id] = [WHOLE]
                allowance -= 1
                if allowance < 1:
                    break
        return [message for node, items in asks.items() for message in _messages(Want, node, items)]

    def fill_all(self, now: float) -> Asks:
        """Ask all holders for as many chunks as they have room for."""
        return [ask for node in self._holders for ask in self.fill(node, now)] if len(self._partials) else []

    def fill(self, node: NodeId, now: float) -> Asks:
        """Ask a holder for as many chunks as it has room for."""
        holder, asks = self._holders[node], dict[ItemId, list[int]]()
        for item_id, partial in self._partials.items() if holder.has_room(CHUNK_BYTES) else ():
            want = self._wants[item_id]
            if not partial.missing or node not in want.holders:
                continue
            row = self._ledger.row(node, item_id)
            while holder.has_room(CHUNK_BYTES) and _is_free(row, now) and (mask := partial.missing & row.parts):
                chunk = self._rarest(partial, mask)
                self._ask(want, node, chunk, now)
                asks.setdefault(item_id, []).append(chunk)
            if not holder.has_room(CHUNK_BYTES):
                break
        return _messages(Want, node, asks)

    def _rarest(self, partial: Partial, mask: int) -> int:
        """Return one of the chunks in `mask` that fewest holders have, by lot."""
        found = [index for index in range(mask.bit_length()) if mask >> index & 1]
        least = min(partial.holders[index] for index in found)
        return self._rng.choice([index for index in found if partial.holders[index] == least])

    def take_cancels(self) -> Asks:
        """Return what nobody need give any more, each once."""
        cancels = [message for node, items in self._cancels.items() for message in _messages(Cancel, node, items)]
        self._cancels.clear()
        return cancels

    # The lot

    def _draw(self, waiting: Sequence[_BySigner], allowance: float) -> Iterable[ItemId]:
        """Return some of what holders offer, enough for the allowance, one of each holder in turn, all by lot."""
        if not waiting:
            return ()
        looks = int(min(self._limits.max_looks, LOOKS_EACH * allowance))
        share = SLACK * -(-looks // len(waiting))
        drawn = [self._draw_of(offered, share) for offered in self._rng.sample(waiting, len(waiting))]
        return islice(dict.fromkeys(_in_turn(drawn)), looks)

    def _by_holder(self, ids: Iterable[ItemId]) -> list[_BySigner]:
        """Return these items as those of their holders that have room for one more offer them."""
        found: defaultdict[NodeId, _BySigner] = defaultdict(dict)
        for want in map(self._wants.__getitem__, ids):
            for node in want.holders:
                if self._holders[node].has_room():
                    found[node].setdefault(want.entry.signer, {})[want.entry.id] = None
        return list(found.values())

    def _draw_of(self, offered: _BySigner, count: int) -> Iterable[ItemId]:
        """Return some of what one holder offers, one of each signer in turn."""
        signers = self._rng.sample(list(offered.values()), min(count, len(offered)))
        each = -(-count // len(signers))
        return _in_turn([self._rng.sample(list(items), min(each, len(items))) for items in signers])

    def _choose(self, want: _Wanted, now: float) -> NodeId | None:
        """Return the holder to ask: one that was not silent, and of those the one that has least to do."""
        if want.is_large and not self._partials.has_room(want.entry.size, now):
            return None
        best: tuple[int, int] | None = None
        chosen, size = None, want.cost(WHOLE)
        for node in want.holders:
            holder, row = self._holders[node], self._ledger.row(node, want.entry.id)
            rank = row.silences, holder.in_flight
            if holder.has_room(size) and _is_free(row, now) and (best is None or rank < best):
                best, chosen = rank, node
        return chosen

    def _is_idle(self, node: NodeId, item_id: ItemId) -> bool:
        return self._holders[node].in_flight == 0 and self._ledger.row(node, item_id).theirs is Theirs.HAS

    # The life of a want

    def _ask(self, want: _Wanted, node: NodeId, part: int, now: float) -> None:
        holder, row = self._holders[node], self._ledger.row(node, want.entry.id)
        if not holder.in_flight:
            holder.answered = now
        holder.in_flight += want.cost(part)
        holder.asked[want.entry.id] = holder.asked.pop(want.entry.id, None)
        row.note(Statement.WE_ASK)
        row.since, row.asked[part] = now, None
        want.was_asked = True
        if part == WHOLE:
            self._unwait(want)
            want.asked_of = node
        elif (partial := self._partials.get(want.entry.id)) is not None:
            partial.asked[part] = node
            partial.missing &= ~(1 << part)

    def _settle(self, want: _Wanted, node: NodeId, part: int, *, late: bool) -> None:
        """Wait no longer for an answer, which may come yet if it is `late`."""
        holder, row = self._holders[node], self._ledger.row(node, want.entry.id)
        del row.asked[part]
        row.due += late
        holder.in_flight -= want.cost(part)
        if not row.asked:
            holder.asked.pop(want.entry.id, None)

    def _release(self, want: _Wanted, node: NodeId, *, late: bool) -> None:
        """Let all that a holder was asked for of an item be asked of others."""
        row, partial = self._ledger.row(node, want.entry.id), self._partials.get(want.entry.id)
        for part in list(row.asked):
            self._settle(want, node, part, late=late)
            if part == WHOLE:
                want.asked_of = None
                self._wait(want)
            elif partial is not None:
                del partial.asked[part]
                partial.missing |= 1 << part
        if row.theirs is Theirs.ASKED:
            row.note(Statement.WE_CANCEL)

    def _gave(self, holder: _Holder, row: LedgerRow, size: int, now: float) -> None:
        holder.answered = now
        if now <= row.since + QUICK_S:
            holder.window = min(self._limits.max_window_bytes, holder.window + size)
        else:
            holder.window = max(self._limits.first_window_bytes, holder.window // 2)

    def _make_room(self) -> None:
        if len(self._wants) >= self._limits.max_wants:
            oldest = next(iter(self._wants.values()))
            self._forget(next((want for want in self._wants.values() if not want.was_asked), oldest))

    def _wait(self, want: _Wanted) -> None:
        for node in want.holders:
            self._holders[node].enlist(want.entry)
        self._fresh[want.entry.id] = None

    def _unwait(self, want: _Wanted) -> None:
        self._fresh.pop(want.entry.id, None)
        for node in want.holders:
            self._holders[node].unlist(want.entry)

    def _give_way(self, want: _Wanted) -> None:
        """A partial item is gone: its chunks are asked of nobody, and it waits as if nothing had come."""
        for node in want.holders:
            row = self._ledger.row(node, want.entry.id)
            if row.asked:
                self._cancels[node].setdefault(want.entry.id, []).extend(row.asked)
                self._release(want, node, late=True)
        self._wait(want)

    def _withdraw(self, node: NodeId, item_id: ItemId, *, late: bool = True) -> None:
        """One holder less; without any, the item is forgotten unless some of it is there."""
        want, partial = self._wants[item_id], self._partials.get(item_id)
        self._release(want, node, late=late)
        if partial is not None:
            partial.held(self._ledger.row(node, item_id).parts, -1)
        del want.holders[node]
        del self._holders[node].offers[item_id]
        self._holders[node].unlist(want.entry)
        if not want.holders and (partial is None or not partial.chunks):
            self._forget(want)

    def _forget(self, want: _Wanted, brought_by: NodeId | None = None) -> None:
        item_id = want.entry.id
        for node in want.holders:
            row = self._ledger.row(node, item_id)
            if row.asked and node != brought_by:
                self._cancels[node].setdefault(item_id, []).extend(row.asked)
            for part in list(row.asked):
                self._settle(want, node, part, late=node != brought_by or part != WHOLE)
            if row.theirs is Theirs.ASKED:
                row.note(Statement.WE_CANCEL)
            self._holders[node].offers.pop(item_id, None)
        want.asked_of = None
        self._partials.pop(item_id)
        self._unwait(want)
        self._delayed.pop(item_id, None)
        for newest in self._beside.values():
            newest.pop(item_id, None)
        del self._wants[item_id]


def _messages(kind: type[Want], node: NodeId, items: dict[ItemId, list[int]]) -> Asks:
    """Return what names these chunks, or WHOLE, of these items in messages of their bounded size."""
    named = [
        WantedPart(item_id, tuple(chunks[i : i + MAX_CHUNKS]))
        for item_id, parts in items.items()
        for chunks in ([one for one in parts if one != WHOLE],)
        for i in range(0, max(1, len(chunks)), MAX_CHUNKS)
    ]
    return [(node, kind(tuple(named[i : i + MAX_IDS]))) for i in range(0, len(named), MAX_IDS)]


def _is_free(row: LedgerRow, now: float) -> bool:
    """Tell whether a holder may be asked: it has the item, and was not silent or busy just now."""
    return row.theirs in (Theirs.HAS, Theirs.ASKED) or (row.may_give and now >= row.until)


def _in_turn(columns: Iterable[Iterable[ItemId]]) -> Iterator[ItemId]:
    """Return the first of each, then the second of each, and so on."""
    return (item_id for item_id in chain.from_iterable(zip_longest(*columns)) if item_id is not None)
