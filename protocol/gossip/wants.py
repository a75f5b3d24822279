"""Which items to ask for, of whom, and when to ask somebody else. `ledger` defines the rows.

Rules
 1. A want lives until its item comes or is stale, whichever holders fail. A small item, or the outline of a large one,
    is asked of one holder at a time. Chunks are asked of all holders that have them, the rarest first (see `chunks`).
 2. At most `window_bytes` are on their way from one holder, and from all what our own line brings in some seconds (see
    `pace`). So a crowded line is asked for little, and its peers fetch from each other meanwhile. A holder
    that said that it is busy tells nothing of our line by answering late.
 3. Every WANT is answered: by the item, by DONT_HAVE, or by BUSY, again and again until the item comes. A holder that
    does not answer a want within `patience` is silent. Then another is asked; who was silent or busy is asked last, the
    silent one after a pause that doubles. A silent holder pays if it announced something once it had `pull_patience` to
    answer: a process that is blocked cannot. It pays once in `suspicion` seconds: a process that loads a model is awake
    now and then. A holder that announced what it does not have pays, too. At most `max_holders` are remembered of an
    item. The one that was silent or busy most often gives way to one that was so less often. Without this, one
    attacker's keys could take all places and give nothing.
 4. While all that comes is late, our own line is probably full, and another holder would be no faster. So a busy holder
    is waited for, for `LONG_S` at most. A silent one is waited for until all that we asked for could have come over
    half of a line of 1 Mbit/s, as its answer may wait behind that. Our line has room if nothing comes for `LULL_S`, or
    if the last thing came within `PROMPT_S` of being asked for. Then an idle holder is asked instead of a busy one.
 5. Lots decide what is asked for first: a lot among the networks of the holders (see `counts_as`), then among the
    holders of that network, the signers that the holder announced, and that signer's items. So neither a node that
    publishes most nor a network that brings items of many keys over many links starves others: keys and links are free,
    and networks are not. And two nodes that cannot take everything take different things.
    Announcements are free, so each draw looks at `max_looks` wants at most.
 6. Items that the node wants beside the others have a second lot, and an allowance of their own for it.
 7. Where the demand has a bound, a want that was not asked for within `UNASKED_S` is forgotten: fresher items replace
    it.
 8. Partial items have `max_partials` places and `held_bytes`, counted by the sizes that their signers state. The nodes
    of one network (see `counts_as`) fill a quarter of both with the outlines that they give. Where another item has no
    room, one that got nothing for `STALL_S` gives way: the one of the same network, or else of all, that waited
    longest. Its chunks are dropped, and it is wanted anew if somebody has it.
"""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, islice, takewhile, zip_longest

from protocol.events import Item, Outline, Send
from protocol.gossip.chunks import Partial
from protocol.gossip.ledger import ALL, WHOLE, ItemLedger, LedgerRow, Statement, Theirs
from protocol.gossip.pace import DOWNLINK_QUICK_S, LOST_S, Lines, LineWindow
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.limits.timing import Timing
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, chunk_count
from protocol.wire.messages import ITEM_OVERHEAD_BYTES, MAX_CHUNKS, MAX_IDS, Cancel, Entry, ItemChunk, Want, WantedPart

PROMPT_S = 1.0  # ten round trips of 100 ms
LULL_S = 4.0  # a chunk on a line of 256 kbit/s
LONG_S = 120.0  # a line of 1 Mbit/s takes 47 s for three chunks to each of 15 others
DOWNLINK_BYTES = 8 * CHUNK_BYTES  # under way at first: 8 s of a line of 1 Mbit/s, or of eight others on slower ones
LEAST_COST = 1 << 10  # bytes that a smaller item takes of a window
SLOW_BYTES_PER_SECOND = 64 << 10  # half a line of 1 Mbit/s: a chunk takes two seconds, which add to the patience
MAX_PAUSE = 5  # doublings of the pause after silences
UNASKED_S = 60.0  # about one round
SLACK = 2  # a draw looks at twice the even share of each holder, as some offer less, or the same
STALL_S = 10.0  # a chunk on a sixteenth of a line of 2 Mbit/s
NETWORK_PART = 4  # one network fills a quarter of the room for partial items: 64 MiB, which is four of the largest
ALL_NETWORKS = ""
LONG_AGO = float("-inf")  # before this process began: never

_BySigner = dict[bytes, dict[ItemId, None]]


@dataclass(slots=True)
class _Asked:
    """Of whom a part was asked, and when."""

    node: NodeId
    at: float
    size: int  # bytes under way; 0 once they do not count any more


class Took(Enum):
    """The outcome of a chunk, or an outline, that came."""

    TAKEN = "taken"
    LATE = "late"  # it was asked for, but is no longer needed
    UNASKED = "unasked"
    NO_ROOM = "no room"
    FALSE = "false"
    MISSIZED = "missized"  # it is proven, and its signer stated another size: the item is wanted no more


@dataclass(slots=True)
class _Wanted:
    entry: Entry
    since: float
    is_beside: bool
    holders: dict[NodeId, LedgerRow] = field(default_factory=dict)
    asked: dict[int, _Asked] = field(default_factory=dict)  # of whom each chunk is asked, or WHOLE
    asked_at: float = LONG_AGO  # when somebody was last asked for the whole, or the outline
    asked_beside: bool = False  # whether the second lot drew it: rule 6

    @property
    def is_large(self) -> bool:
        return self.entry.size > HEAD_BYTES + CHUNK_BYTES

    def cost(self, part: int) -> int:
        """Return what asking for a part takes of a holder's window."""
        if part != WHOLE:
            return CHUNK_BYTES
        return LEAST_COST if self.is_large else max(LEAST_COST, self.entry.size)


@dataclass(slots=True)
class _Room:
    """The places and bytes that the partial items of one network, or all, take."""

    places: int = 0
    size: int = 0
    none_stalls_until: float = LONG_AGO  # so not each of 256 wants in a draw looks at 256 partial items


@dataclass(slots=True)
class _Holder:
    voice: str  # as whom it counts
    downlink: LineWindow
    everything: _BySigner = field(default_factory=dict)
    beside: _BySigner = field(default_factory=dict)  # the part of `everything` that is wanted beside the others
    offers: int = 0  # how many items are in `everything`
    missed: bool = False  # whether it announced more than there was room for
    asked: Counter[ItemId] = field(default_factory=Counter)  # how many parts of each
    in_flight: int = 0  # bytes
    spoke: float = LONG_AGO  # when it last announced something
    busy: float = LONG_AGO  # when it last said that all that it was asked for waits
    paid: float = LONG_AGO  # when it last paid for a silence

    def add(self, want: _Wanted) -> None:
        for lot in (self.everything, self.beside)[: 1 + want.is_beside]:
            lot.setdefault(want.entry.signer, {})[want.entry.id] = None
        self.offers += 1

    def remove(self, want: _Wanted) -> None:
        for lot in (self.everything, self.beside)[: 1 + want.is_beside]:
            del lot[want.entry.signer][want.entry.id]
            if not lot[want.entry.signer]:
                del lot[want.entry.signer]
        self.offers -= 1


class Wants:
    """Wanted items, bounded in number and by holder. `now` is steady, in seconds."""

    def __init__(self, ledger: ItemLedger, timing: Timing, limits: Limits, rng: random.Random) -> None:
        self._ledger = ledger
        self._limits = limits
        self._loading_s = timing.suspicion
        self._answer_s = timing.pull_patience  # twice as long as who lives takes to say that it is busy
        self._patience = self._answer_s + CHUNK_BYTES / SLOW_BYTES_PER_SECOND
        self._rng = rng
        # Both in the order in which they were announced. The oldest go first, and a `dict` that loses those would walk
        # over the places of all that it lost.
        self._wants: OrderedDict[ItemId, _Wanted] = OrderedDict()
        self._unasked: OrderedDict[ItemId, None] = OrderedDict()  # those that nobody was asked for yet
        self._partials: dict[ItemId, Partial] = {}  # in the order of their beginnings
        self._rooms: dict[str, _Room] = {}  # by voice, of those that have partial items
        self._downlinks = Lines(DOWNLINK_BYTES, DOWNLINK_QUICK_S)
        self._under_way: deque[_Asked] = deque()  # oldest first, with some that were answered
        self._late = LONG_AGO  # when something last came late, if nothing came quickly since
        self._holders: dict[NodeId, _Holder] = {}
        self._cancels: defaultdict[NodeId, dict[ItemId, list[int]]] = defaultdict(dict)
        self.partial: Callable[[ItemId], Partial | None] = self._partials.get

    def __len__(self) -> int:
        return len(self._wants)

    def __contains__(self, item_id: ItemId) -> bool:
        return item_id in self._wants

    @property
    def partials(self) -> Collection[ItemId]:
        """The items of which something is here."""
        return self._partials

    def topic(self, item_id: ItemId) -> bytes:
        """Return the topic that a wanted item is said to have."""
        return self._wants[item_id].entry.topic

    def up(self, node: NodeId, voice: str = "") -> None:
        self._holders[node] = _Holder(voice or node, self._downlinks.to(voice))

    def lost(self, node: NodeId) -> None:
        """Forget a peer that is gone, and what it was asked for."""
        for item_id in [item for items in self._holders[node].everything.values() for item in items]:
            self._withdraw(self._wants[item_id], node)
        del self._holders[node]
        self._cancels.pop(node, None)

    # What peers say

    def have(self, node: NodeId, entry: Entry, now: float, *, is_beside: bool = False) -> None:
        """Note that `node` holds an item that we lack."""
        holder, want = self._holders[node], self._wants.get(entry.id)
        holder.spoke = now
        parts = int.from_bytes(entry.parts, "little") if entry.parts else ALL
        if want is not None and node in want.holders:
            want.holders[node].parts |= parts
            return
        if holder.offers >= self._most_offers:
            holder.missed = True
            return
        row = self._ledger.row(node, entry.id)
        row.note(Statement.HAVE)
        if row.theirs is not Theirs.HAS:
            return
        if want is None:
            if len(self._wants) >= self._limits.max_wants:
                oldest = self._wants[next(iter(self._unasked or self._wants))]
                for other in oldest.holders:
                    self._holders[other].missed = True
                self._forget(oldest)
            want = self._wants[entry.id] = _Wanted(entry, now, is_beside)
            self._unasked[entry.id] = None
        elif len(want.holders) >= self._limits.max_holders:
            worst = max(want.holders, key=lambda holder: want.holders[holder].failures)
            if want.holders[worst].failures <= row.failures:
                return
            self._withdraw(want, worst)
        row.parts = parts
        want.holders[node] = row
        holder.add(want)

    @property
    def _most_offers(self) -> int:
        return min(self._limits.max_offers, self._ledger.room // 2)

    def missed(self) -> list[NodeId]:
        """Return who announced more than there was room for, once there is room for half as much again."""
        if 2 * len(self._wants) > self._limits.max_wants:
            return []
        nodes = [
            node for node, holder in self._holders.items() if holder.missed and 2 * holder.offers <= self._most_offers
        ]
        for node in nodes:
            self._holders[node].missed = False
        return nodes

    def owes(self, node: NodeId, item_id: ItemId) -> bool:
        """Tell whether `node` was asked for the item, or for a part of it, and may still answer."""
        row = self._ledger.find(node, item_id)
        return row is not None and row.due > 0

    def arrived(self, item_id: ItemId, node: NodeId, now: float) -> bool:
        """Note that the item itself came from `node`; True if it was asked for it."""
        want, row, is_owed = self._wants.get(item_id), self._ledger.row(node, item_id), self.owes(node, item_id)
        row.due = max(0, row.due - 1)
        if want is not None:
            if (asked := want.asked.get(WHOLE)) is not None and asked.node == node:
                self._gave(row, node, want, WHOLE, now)
            self._forget(want, brought_by=node)
        row.note(Statement.GAVE_ALL)
        return is_owed

    def outlined(self, node: NodeId, outline: Outline, now: float) -> Took:
        row, want = self._ledger.find(node, outline.id), self._wants.get(outline.id)
        if row is None or row.due == 0:
            return Took.UNASKED
        row.due -= 1
        self._gave(row, node, want, WHOLE, now)
        if want is None or outline.id in self._partials:
            return Took.LATE
        self._settle(want, WHOLE)
        size, voice = outline.header.size, self._holders[node].voice
        if not self._make_room_for(size, voice, now):
            row.until = now + self._patience
            return Took.NO_ROOM
        self._partials[outline.id] = Partial.begin(outline, now, voice)
        self._count(voice, 1, size)
        return Took.TAKEN

    def chunk_arrived(self, node: NodeId, chunk: ItemChunk, now: float) -> Took:
        row, want, partial = self._ledger.find(node, chunk.id), self._wants.get(chunk.id), self._partials.get(chunk.id)
        index = chunk.index
        if row is None or row.due == 0:
            return Took.UNASKED
        row.due -= 1
        self._gave(row, node, want, index, now)
        if want is None or partial is None or index in partial.chunks or index >= chunk_count(partial.size):
            return Took.LATE
        if not partial.outline.proves(chunk):
            if node in want.holders:
                self._withdraw(want, node)
            row.note(Statement.LACK)
            return Took.FALSE
        if len(chunk.data) != partial.outline.size_of(index):
            self._forget(want)
            return Took.MISSIZED
        self._settle(want, index)
        partial.add(chunk, now)
        row.failures = 0
        return Took.TAKEN

    def finish(self, item_id: ItemId) -> Item | None:
        """Return a whole item, whose last chunk came, and forget it; None while something is missing."""
        partial = self._partials.get(item_id)
        if partial is None or not partial.is_whole:
            return None
        self._forget(self._wants[item_id])
        return partial.item()

    def lack(self, node: NodeId, ids: Iterable[ItemId]) -> int:
        """Note that a peer does not have these; return how many of them we were waiting for, which it had announced."""
        lies = 0
        for item_id in ids:
            row, want = self._ledger.find(node, item_id), self._wants.get(item_id)
            if row is None:
                continue
            if want is not None and node in want.holders:
                lies += any(asked.node == node for asked in want.asked.values())
                self._withdraw(want, node)
            row.note(Statement.LACK)
        return lies

    def busy(self, node: NodeId, ids: Sequence[ItemId], now: float) -> None:
        """Note that a peer gives none of these items for now; another may be asked.

        Without ids, all that it was asked for waits for its line: see rule 4.
        """
        holder = self._holders[node]
        if not ids:
            holder.busy = now
        is_free = self._is_free(now)
        for item_id in [asked for asked in ids or holder.asked if asked in holder.asked]:
            want = self._wants[item_id]
            row = want.holders[node]
            may_move = is_free or now >= row.since + LONG_S
            if ids or (may_move and self._has_idle_holder(want, now)):
                row.failures += 1
                row.until = now + self._patience
                self._release(want, node, says_so=not ids)

    def _is_free(self, now: float) -> bool:
        """Tell whether our own line has room, as far as is known: nothing comes, or it comes quickly."""
        return now >= self._late + LULL_S

    def unheard(self, node: NodeId, now: float) -> None:
        """Treat a peer as busy: our messages to it have no room, so it may not hear what it is asked for."""
        self.busy(node, tuple(self._holders[node].asked), now)

    def _has_idle_holder(self, want: _Wanted, now: float) -> bool:
        return any(self._holders[node].in_flight == 0 and row.may_be_asked(now) for node, row in want.holders.items())

    def forget_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Stop fetching items for whose signer `is_by` holds."""
        for item_id in [partly for partly, partial in self._partials.items() if is_by(partial.outline.signer)]:
            self._forget(self._wants[item_id])

    # What time brings

    def check(self, now: float, *, bounded: bool) -> list[NodeId]:
        """Give up wants that are stale, and stop waiting for silent holders; return those to blame."""
        while self._under_way and self._under_way[0].at + LOST_S <= now:
            self._ends(self._under_way.popleft())
        unasked = map(self._wants.__getitem__, self._unasked)
        late = takewhile(lambda want: want.since + UNASKED_S <= now, unasked if bounded else ())
        stale = takewhile(lambda want: want.since + self._limits.max_item_age_s <= now, self._wants.values())
        for item_id in {want.entry.id: None for want in (*late, *stale)}:
            self._forget(self._wants[item_id])
        patience = self._patience if self._is_free(now) else self._longest_wait()
        return [node for node, holder in self._holders.items() if self._expect_no_more(node, holder, patience, now)]

    def _longest_wait(self) -> float:
        """Return how long an answer may take that waits behind all that was asked for."""
        in_flight = sum(holder.in_flight for holder in self._holders.values())
        return min(LONG_S, self._patience + in_flight / SLOW_BYTES_PER_SECOND)

    def _expect_no_more(self, node: NodeId, holder: _Holder, patience: float, now: float) -> bool:
        """Stop waiting for what a holder does not answer; True if it pays, as it announced something meanwhile."""
        to_blame = False
        for item_id in list(holder.asked):
            want = self._wants[item_id]
            row = want.holders[node]
            heard = max(row.since, holder.busy)
            if heard + patience <= now:
                to_blame = to_blame or holder.spoke > heard + self._answer_s
                row.failures += 1
                row.until = now + self._patience * 2.0 ** min(MAX_PAUSE, row.failures)
                self._release(want, node)
        if not to_blame or now < holder.paid + self._loading_s:
            return False
        holder.paid = now
        return True

    def draw(self, now: float, allowance: float, beside: float = 0.0) -> list[Send]:
        """Cancel what need not be given any more; ask for some of what holders offer, by lot.

        Then at most `allowance` items that were asked for within `patience` are on their way, and at most `beside` more
        that the second lot drew. If items that a holder is busy with counted, one holder could stop us.
        """
        asks: defaultdict[NodeId, dict[ItemId, list[int]]] = defaultdict(dict)
        free = [holder for holder in self._holders.values() if self._has_room(holder, LEAST_COST)]
        wants = (self._wants[item_id] for holder in self._holders.values() for item_id in holder.asked)
        under_way = Counter(
            want.asked_beside for want in wants if WHOLE in want.asked and now < want.asked_at + self._patience
        )
        for is_beside, most in ((True, beside), (False, allowance)):
            room = most - under_way[is_beside]
            networks: defaultdict[str, list[_BySigner]] = defaultdict(list)
            for holder in free if room >= 1 else ():
                if lot := holder.beside if is_beside else holder.everything:
                    networks[holder.voice].append(lot)
            for item_id in self._look(list(networks.values())):
                want = self._wants[item_id]
                node = self._choose(want, now)
                if node is not None:
                    want.asked_at, want.asked_beside = now, is_beside
                    self._unasked.pop(item_id, None)
                    self._ask(want, node, WHOLE, now)
                    asks[node][item_id] = []
                    room -= 1
                    if room < 1:
                        break
        cancels = [send for node in list(self._cancels) for send in self._take_cancels(node)]
        return cancels + [send for node, items in asks.items() for send in naming(Want, node, items)]

    def _has_room(self, holder: _Holder, size: int) -> bool:
        """Tell whether a holder may be asked for so many bytes more."""
        fits = holder.in_flight == 0 or holder.in_flight + size <= self._limits.window_bytes
        line = holder.downlink  # small items are not held up by chunks
        return fits and line.under_way < line.window * (1 if size == CHUNK_BYTES else 2)

    def _take_cancels(self, node: NodeId) -> list[Send]:
        """Return the messages that cancel what a holder need not give; send them before it is asked again."""
        return naming(Cancel, node, self._cancels.pop(node, {}))

    def _look(self, networks: Sequence[Sequence[_BySigner]]) -> Iterable[ItemId]:
        """Return some of what the holders of each network offer, one of each network in turn, all by lot."""
        if not networks:
            return ()
        share = SLACK * -(-self._limits.max_looks // len(networks))
        drawn = [
            _in_turn([self._look_at(lot, -(-share // len(lots))) for lot in self._rng.sample(lots, len(lots))])
            for lots in self._rng.sample(networks, len(networks))
        ]
        return islice(dict.fromkeys(_in_turn(drawn)), self._limits.max_looks)

    def _look_at(self, lot: _BySigner, count: int) -> Iterable[ItemId]:
        """Return some of what one holder offers, one of each signer in turn."""
        signers = self._rng.sample(list(lot.values()), min(count, len(lot)))
        each = -(-count // len(signers))
        return _in_turn([self._rng.sample(list(items), min(each, len(items))) for items in signers])

    def _choose(self, want: _Wanted, now: float) -> NodeId | None:
        """Return the holder to ask: the one that failed least often, and of those the one that has least to do."""
        if WHOLE in want.asked or want.entry.id in self._partials:
            return None
        ranks = [
            (row.failures, self._holders[node].in_flight, place, node)
            for place, (node, row) in enumerate(want.holders.items())
            if row.may_be_asked(now) and self._has_room(self._holders[node], want.cost(WHOLE))
        ]
        node = min(ranks)[-1] if ranks else None
        if node is None or not want.is_large or self._make_room_for(want.entry.size, self._holders[node].voice, now):
            return node
        return None

    def fill_all(self, now: float) -> list[Send]:
        """Ask all holders for as many chunks as they have room for."""
        return [send for node in self._holders for send in self.fill(node, now)] if self._partials else []

    def fill(self, node: NodeId, now: float) -> list[Send]:
        """Ask a holder for as many chunks as it has room for."""
        holder, sends, asks = self._holders[node], self._take_cancels(node), dict[ItemId, list[int]]()
        for item_id, partial in self._partials.items():
            if not self._has_room(holder, CHUNK_BYTES):
                break
            want = self._wants[item_id]
            row = want.holders.get(node)
            if row is None or not row.may_be_asked(now):
                continue
            while self._has_room(holder, CHUNK_BYTES) and (mask := partial.missing & row.parts):
                chunk = self._rarest(want, mask)
                self._ask(want, node, chunk, now)
                asks.setdefault(item_id, []).append(chunk)
        return sends + naming(Want, node, asks)

    def _rarest(self, want: _Wanted, mask: int) -> int:
        """Return one of the chunks in `mask` that few holders have, by lot."""
        for row in want.holders.values():
            mask = mask & ~row.parts or mask
        return self._rng.choice([index for index in range(mask.bit_length()) if mask >> index & 1])

    def _make_room_for(self, size: int, voice: str, now: float) -> bool:
        """Let the item that stalls give way, if one of so many bytes has no room; True if it can be begun now."""
        for crowd in (voice, ALL_NETWORKS):
            if not self._fits(size, crowd):
                self._end_what_stalls(crowd, now)
        return self._fits(size, voice) and self._fits(size, ALL_NETWORKS)

    def _end_what_stalls(self, crowd: str, now: float) -> None:
        """Let the item of a network, or of all, give way that got nothing for longest, if it stalls."""
        room = self._rooms.get(crowd)
        if room is None or now < room.none_stalls_until:
            return
        begun = [item_id for item_id, partial in self._partials.items() if crowd in (ALL_NETWORKS, partial.voice)]
        stalled = min(begun, key=lambda item_id: self._partials[item_id].touched)
        room.none_stalls_until = self._partials[stalled].touched + STALL_S
        if room.none_stalls_until <= now:
            want = self._wants[stalled]
            if want.holders:
                self._let_go(want)
            else:
                self._forget(want)

    def _fits(self, size: int, crowd: str) -> bool:
        """Tell whether a network, or all, may begin another item of so many bytes."""
        limits, room = self._limits, self._rooms.get(crowd, _Room())
        if crowd == ALL_NETWORKS:
            return room.size + size <= limits.held_bytes and room.places < limits.max_partials
        most = max(limits.held_bytes // NETWORK_PART, limits.max_item_bytes + ITEM_OVERHEAD_BYTES)
        return room.size + size <= most and room.places < limits.max_partials // NETWORK_PART

    def _count(self, voice: str, places: int, size: int) -> None:
        """Count a partial item that begins or, below zero, ends."""
        for crowd in (voice, ALL_NETWORKS):
            room = self._rooms.setdefault(crowd, _Room())
            room.places += places
            room.size += size
            if not room.places:
                del self._rooms[crowd]

    # The life of a want

    def _ask(self, want: _Wanted, node: NodeId, part: int, now: float) -> None:
        holder, row = self._holders[node], want.holders[node]
        holder.in_flight += want.cost(part)
        holder.downlink.under_way += want.cost(part)
        holder.asked[want.entry.id] += 1
        row.due += 1
        row.since = now
        asked = want.asked[part] = _Asked(node, now, want.cost(part))
        self._under_way.append(asked)
        if part != WHOLE:
            self._partials[want.entry.id].missing &= ~(1 << part)

    def _settle(self, want: _Wanted, part: int) -> None:
        """Wait no longer for an answer, if we do. It may still come."""
        asked = want.asked.pop(part, None)
        if asked is None:
            return
        holder = self._holders[asked.node]
        holder.in_flight -= want.cost(part)
        self._ends(asked)
        holder.asked[want.entry.id] -= 1
        if not holder.asked[want.entry.id]:
            del holder.asked[want.entry.id]
        if part != WHOLE:
            self._partials[want.entry.id].missing |= 1 << part

    def _ends(self, asked: _Asked) -> None:
        """Count what was asked for as under way no more."""
        if asked.size:
            self._holders[asked.node].downlink.under_way -= asked.size
            asked.size = 0

    def _release(self, want: _Wanted, node: NodeId, *, says_so: bool = False) -> None:
        """Let what a holder was asked for of an item be asked of others; if it `says_so`, cancel it at the holder."""
        parts = [part for part, asked in want.asked.items() if asked.node == node]
        if says_so and parts:
            self._cancels[node].setdefault(want.entry.id, []).extend(part for part in parts if part != WHOLE)
        for part in parts:
            self._settle(want, part)

    def _gave(self, row: LedgerRow, node: NodeId, want: _Wanted | None, part: int, now: float) -> None:
        row.until = 0.0
        asked = want.asked.get(part) if want is not None else None
        if want is not None and asked is not None and asked.node == node:
            holder, took = self._holders[node], now - asked.at
            self._late = LONG_AGO if took <= PROMPT_S else now
            if took <= PROMPT_S or holder.busy < asked.at:
                holder.downlink.answered(want.cost(part), took, now)
        else:
            self._late = now

    def _withdraw(self, want: _Wanted, node: NodeId) -> None:
        """Remove a holder of an item. Without any other, the item is forgotten unless some chunks are here."""
        self._release(want, node)
        del want.holders[node]
        self._holders[node].remove(want)
        partial = self._partials.get(want.entry.id)
        if not want.holders and (partial is None or not partial.chunks):
            self._forget(want)

    def _let_go(self, want: _Wanted, brought_by: NodeId | None = None) -> None:
        """Stop asking for an item, and drop the chunks of it that came."""
        for node in want.holders:
            self._release(want, node, says_so=node != brought_by)
        if (partial := self._partials.pop(want.entry.id, None)) is not None:
            self._count(partial.voice, -1, -partial.size)

    def _forget(self, want: _Wanted, brought_by: NodeId | None = None) -> None:
        self._let_go(want, brought_by)
        for node in want.holders:
            self._holders[node].remove(want)
        del self._wants[want.entry.id]
        self._unasked.pop(want.entry.id, None)


def naming(kind: type[Want], node: NodeId, items: Mapping[ItemId, Sequence[int]]) -> list[Send]:
    """Return as many messages as it takes to name these chunks, or the item itself where none are given."""
    named = [
        WantedPart(item_id, tuple(chunks[i : i + MAX_CHUNKS]))
        for item_id, chunks in items.items()
        for i in range(0, max(1, len(chunks)), MAX_CHUNKS)
    ]
    return [Send(node, kind(tuple(named[i : i + MAX_IDS]))) for i in range(0, len(named), MAX_IDS)]


def _in_turn(columns: Iterable[Iterable[ItemId]]) -> Iterator[ItemId]:
    """Return the first of each, then the second of each, and so on."""
    return (item_id for item_id in chain.from_iterable(zip_longest(*columns)) if item_id is not None)
