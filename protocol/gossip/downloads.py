"""Downloads: items larger than one chunk, fetched from all who hold them, each chunk proven as it comes.

Rules
 1. Such an item is never sent whole. A pull of it is answered with its **outline**: the header that its signer
    signed, and the hashes of its chunks, which the header's digest proves (see `protocol.wire.envelope`).
 2. Chunks are asked for, at most `WINDOW` of one holder at a time over all downloads: what is large waits its turn
    between small messages, and a link is never full of it.
 3. A holder that is gone, that delivers nothing for `patience` and the time that its chunks take on a slow line,
    or that announces again what it was asked for (it could not send it), is relieved of what it was asked: another
    is, and it goes last until it gives again. What has come stays, and what comes late is taken. Chunks wait behind
    small items on their line: a holder of whom items come has `PROMISE_PATIENCE` times as long, unless another is free;
    what that adds is counted for each item, and spent once.
 4. A chunk that is not what its hash says is blamed, and its sender asked no more for this item. One that is, and has
    not the size that the header states, is its signer's lie: an id does not depend on the size, so a signer can give
    one holder another header than us. Such an item is let go of.
 5. Downloads are begun as far as all that are in progress take `capacity` bytes, by what their signers say of their
    sizes; one that waits costs its outline. Given up is one in progress that nothing came to for `LIFE_S`, or, while
    others wait, for as long as a slow line takes for a window, once all its holders failed as in rule 3 and give
    nothing else; while small items come of one, for what rule 3 adds to that as well. No time passes while one that is
    not asked for it, and did not fail, gives others. One that nobody holds any more stays only if it is in progress,
    and while no other waits.
 6. One signer has one `SHARE`-th of the places for what one link brings; what other links bring of it counts apart, so
    that nobody keeps a signer's items away by giving one of them.
 7. Keys are free, links are not. A download is charged to that of its holders to which least is, of equals to the one
    that had no turn for longest. A link has one `SHARE`-th of the bytes, or a single item; what it has beyond, as
    others who held the same are gone, waits again while others' do. What waits and fits is begun in the order of its
    coming, or of its link's last turn, if that is later. Where all places are taken, who has most of those that wait
    gives one to who has fewer. So whatever keys a link brings, and however slowly it gives, others' items pass it.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from protocol.events import Item, Outline
from protocol.gossip.want_list import PROMISE_PATIENCE
from protocol.identity import NodeId
from protocol.lru import Recent
from protocol.wire.envelope import CHUNK_BYTES, ItemId, chunk_count
from protocol.wire.messages import ItemChunk, PullChunks

WINDOW = 4  # chunks of one holder in flight: half a MiB, 5 MB/s at a round trip of 100 ms
CHUNK_BYTES_PER_SECOND = 128 << 10  # a line of 1 Mbit/s
LIFE_S = 60.0
MAX_SOURCES = 8  # of one item
MAX_DOWNLOADS = 256  # in progress or waiting, with an outline of 4 KiB for 16 MiB
SHARE = 4  # one part in so many; a group of the largest size that a manifest names by default is two parts
MAX_LINKS = 1024  # whose last turn is remembered
MAX_LATE = 1024  # holders of items of whom chunks may come yet that are of no use any more
MAX_STRIKES = 3  # after which a source that was silent is asked for nothing of the item any more


class Took(Enum):
    """What became of a chunk that came."""

    TAKEN = "taken"
    UNASKED = "unasked"  # never asked for, or once too often
    LATE = "late"  # it was asked for, before its item came, was given up or put back, or its sender failed too often
    FALSE = "false"
    MISSIZED = "missized"  # it is proven, and its signer stated another size: the download has ended


@dataclass(slots=True)
class _Source:
    asked: dict[int, None] = field(default_factory=dict)
    since: float = 0.0  # of the last chunk, or of the asking
    strikes: int = 0  # times that it was relieved since it gave something
    late: Counter[int] = field(default_factory=Counter)  # what it was relieved of and may give yet, and how often

    def waits_its_turn(self, in_flight: int) -> bool:
        """Tell whether a holder is not asked for this item as it gives others: one that failed, if it has no room."""
        return not self.asked and (not self.strikes or in_flight >= WINDOW)

    def expect_late(self) -> None:
        """What it is asked for may come yet, though it is asked no more: a few times, as often as it was asked."""
        for index in self.asked:
            self.late[index] = min(MAX_STRIKES, self.late[index] + 1)


@dataclass(slots=True)
class _Download:
    outline: Outline
    touched: float
    sources: dict[NodeId, _Source]
    missing: dict[int, None]  # asked of nobody
    turn: int  # when it came
    link: NodeId  # the holder that it is charged to
    in_progress: bool = False
    chunks: dict[int, bytes] = field(default_factory=dict)
    spared: float = 0.0  # seconds that its chunks came later than a slow line brings them, as other items came
    expelled: set[NodeId] = field(default_factory=set)

    def stretched(self, patience: float) -> float:
        """Return how long that patience is for chunks which wait behind small items: rule 3."""
        return max(patience, PROMISE_PATIENCE * patience - self.spared)


class Downloads:
    """See the module's comment. `now` is steady, in seconds."""

    def __init__(self, capacity: int, patience: float) -> None:
        self._capacity = capacity
        self._patience = patience
        self._downloads: dict[ItemId, _Download] = {}  # those that wait as they came, the others as they were begun
        self._turns = count(1)
        self._last_turn: Recent[NodeId, int] = Recent(MAX_LINKS)
        self._delivered: Recent[NodeId, float] = Recent(MAX_LINKS)  # when a chunk last came of each
        self._heard: Recent[NodeId, float] = Recent(MAX_LINKS)  # when a chunk or another item last did
        self._late: Recent[tuple[NodeId, ItemId], int] = Recent(MAX_LATE)  # chunks that may come yet
        self._news = False  # since it was last tried to begin those that wait
        self._given_up = 0  # to make room for others, since the last check
        self._of_link: Counter[NodeId] = Counter()  # downloads
        self._of_signer: Counter[tuple[NodeId, bytes]] = Counter()  # by link and signer's key
        self._size_of_link: Counter[NodeId] = Counter()  # of those in progress

    def __len__(self) -> int:
        return len(self._downloads)

    def __contains__(self, item_id: ItemId) -> bool:
        return item_id in self._downloads

    @property
    def _size(self) -> int:
        return self._size_of_link.total()

    def begin(self, outline: Outline, holders: Iterable[NodeId], now: float) -> bool:
        """Fetch an item from `holders` as soon as there is room; False: there will be none."""
        size = outline.header.size
        if outline.id in self._downloads or size > self._capacity:
            return False
        sources = {node: _Source() for node in list(holders)[:MAX_SOURCES]}
        if not sources:
            return False
        link = min(sources, key=self._of_link.__getitem__)
        if self._of_signer[link, outline.header.public_key] >= MAX_DOWNLOADS // SHARE:
            return False
        if len(self._downloads) >= MAX_DOWNLOADS and not self._make_room(link):
            return False
        self._of_link[link] += 1
        self._of_signer[link, outline.header.public_key] += 1
        missing = dict.fromkeys(range(chunk_count(size)))
        self._downloads[outline.id] = _Download(outline, now, sources, missing, next(self._turns), link)
        self._news = True
        return True

    def signer(self, item_id: ItemId) -> NodeId | None:
        """Return who signed an item that is being fetched."""
        download = self._downloads.get(item_id)
        return download.outline.signer if download is not None else None

    def offered(self, node: NodeId, item_id: ItemId) -> None:
        """`node` announces an item that is being fetched: it holds it, and has sent none of what it was asked for."""
        download = self._downloads[item_id]
        source = download.sources.get(node)
        if source is not None:
            if source.asked:
                source.strikes = max(source.strikes, 1)
                source.expect_late()
            self._relieve(download, source)
        elif node not in download.expelled and len(download.sources) < MAX_SOURCES:
            download.sources[node] = _Source()
            self._news = True
            self._charge_one_that_stays(download)
            if not download.in_progress and self._of_link[node] + 1 < self._of_link[download.link]:
                self._charge(download, node)

    def arrived(self, node: NodeId, chunk: ItemChunk, now: float) -> Took:
        """A chunk came."""
        index = chunk.index
        download = self._downloads.get(chunk.id)
        source = download.sources.get(node) if download is not None else None
        if download is None or source is None or not (index in source.asked or index in source.late):
            return Took.LATE if self._was_late(node, chunk.id) else Took.UNASKED
        if not download.outline.proves(chunk):
            self._expel(download, node)
            return Took.FALSE
        if len(chunk.data) != download.outline.size_of(index):
            self._forget(chunk.id)
            return Took.MISSIZED
        if index in source.asked:
            del source.asked[index]
        else:
            source.late -= Counter([index])  # without it once it is zero
        self._heard.set(node, now)
        if index not in download.chunks:
            source.since, source.strikes = now, 0
            self._delivered.set(node, now)
            download.spared += max(0.0, now - download.touched - self._patience_for(WINDOW))
            download.touched = now
            download.missing.pop(index, None)
            download.chunks[index] = chunk.data
        return Took.TAKEN

    def finish(self, item_id: ItemId) -> Item | None:
        """Return a whole item, and forget it; None while something of it is missing."""
        download = self._downloads.get(item_id)
        if download is None or len(download.chunks) < chunk_count(download.outline.header.size):
            return None
        self._forget(item_id)
        return download.outline.fill(download.chunks[index] for index in range(len(download.chunks)))

    def forget_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Fetch nothing more that somebody signed for whom `is_by` holds."""
        for item_id, download in list(self._downloads.items()):
            if is_by(download.outline.signer):
                self._forget(item_id)

    def lost(self, node: NodeId) -> None:
        """A holder is gone."""
        for download in self._downloads.values():
            source = download.sources.pop(node, None)
            if source is not None:
                self._relieve(download, source)
                self._charge_one_that_stays(download)
        for item_id in [one for one in self._waiting() if not self._downloads[one].sources]:
            self._forget(item_id)
            self._given_up += 1

    def heard(self, node: NodeId, now: float) -> None:
        """An item came of `node`: behind that its chunks may wait for their turn on its line."""
        self._heard.set(node, now)

    def check(self, now: float) -> int:
        """Relieve those who are silent, and give up what nobody delivers; return how many items were given up."""
        progressing = [(item_id, one) for item_id, one in self._downloads.items() if one.in_progress]
        others_wait = len(progressing) < len(self._downloads)
        life = self._patience_for(WINDOW)
        gave = {node for node, when in self._delivered.items() if when + life > now}
        heard = {node for node, when in self._heard.items() if when + life > now}
        in_flight = self._in_flight()
        for _, one in progressing:
            if any(node in gave and it.waits_its_turn(in_flight[node]) for node, it in one.sources.items()):
                one.touched = now
        self._relieve_the_silent(in_flight, now)
        failed = {node for one in self._downloads.values() for node, source in one.sources.items() if source.strikes}
        for item_id, one in progressing:
            hopeless = others_wait and one.sources.keys() <= failed - gave
            longest = life if heard.isdisjoint(one.sources) else one.stretched(life)
            if one.touched + (longest if hopeless else LIFE_S) <= now or (others_wait and not one.sources):
                self._forget(item_id)
                self._given_up += 1
        self._put_back_what_is_beyond_a_share()
        given_up, self._given_up = self._given_up, 0
        return given_up

    def due(self, now: float) -> list[tuple[NodeId, PullChunks]]:
        """Return the chunks to ask for now, and of whom; the download that was begun first goes first."""
        self._begin_those_that_wait(now)
        asks: list[tuple[NodeId, PullChunks]] = []
        in_flight = self._in_flight()
        for item_id, download in self._downloads.items():
            if not download.in_progress:
                continue
            shared: dict[NodeId, list[int]] = {}
            free = {node: WINDOW - in_flight[node] for node in download.sources} if download.missing else {}
            while download.missing and any(count > 0 for count in free.values()):
                # The holder with the most room, and of those the one that failed least: the load is spread.
                node = max(free, key=lambda one: (free[one] > 0, -download.sources[one].strikes, free[one]))
                index = next(iter(download.missing))
                del download.missing[index]
                source = download.sources[node]
                if not source.asked:
                    source.since = now
                source.asked[index] = None
                shared.setdefault(node, []).append(index)
                free[node] -= 1
                in_flight[node] += 1
            asks += [(node, PullChunks(item_id, tuple(indices))) for node, indices in shared.items()]
        return asks

    def _make_room(self, link: NodeId) -> bool:
        """Let the link that has most places, and something waiting, give its newest; False: it has no more of them."""
        waiting = {one.link: item_id for item_id, one in self._downloads.items() if not one.in_progress}  # the newest
        most = max(waiting, key=self._of_link.__getitem__, default=link)
        if self._of_link[most] < self._of_link[link] + 2:
            return False
        self._forget(waiting[most])
        self._given_up += 1
        return True

    def _begin_those_that_wait(self, now: float) -> None:
        if self._news:
            self._news = False
            for item_id in sorted(self._waiting(), key=lambda one: self._turn(self._downloads[one])):
                self._begin(item_id, now)

    def _waiting(self) -> list[ItemId]:
        return [item_id for item_id, download in self._downloads.items() if not download.in_progress]

    def _turn(self, download: _Download) -> int:
        return max(download.turn, self._last_turn.get(self._lightest(download)) or 0)

    def _lightest(self, download: _Download) -> NodeId:
        """Return the holder with least in progress, or of equals the one that had no turn for longest."""
        sizes, turns = self._size_of_link, self._last_turn
        return min(download.sources, key=lambda node: (sizes[node], turns.get(node) or 0), default=download.link)

    def _begin(self, item_id: ItemId, now: float) -> None:
        download = self._downloads[item_id]
        size, link = download.outline.header.size, self._lightest(download)
        begun = self._size_of_link[link]
        if (not begun or begun + size <= self._capacity // SHARE) and self._size + size <= self._capacity:
            self._charge(download, link)
            self._last_turn.set(link, next(self._turns))
            download.in_progress, download.touched = True, now
            self._size_of_link[link] += size
            self._downloads[item_id] = self._downloads.pop(item_id)  # in the order of their beginnings

    def _end(self, download: _Download) -> None:
        """A download is in progress no longer."""
        download.in_progress = False
        self._last_turn.set(download.link, next(self._turns))
        self._size_of_link -= Counter({download.link: download.outline.header.size})

    def _charge(self, download: _Download, link: NodeId) -> None:
        """Let a download be another link's."""
        header = download.outline.header
        size = header.size if download.in_progress else 0
        self._of_link -= Counter([download.link])
        self._of_signer -= Counter([(download.link, header.public_key)])
        self._size_of_link -= Counter({download.link: size})
        self._of_link[link] += 1
        self._of_signer[link, header.public_key] += 1
        if size:
            self._size_of_link[link] += size
        download.link = link

    def _relieve_the_silent(self, in_flight: Counter[NodeId], now: float) -> None:
        """Relieve holders of what they do not give in time; who was silent too often holds the item no more."""
        for download in self._downloads.values():
            free = {one for one, it in download.sources.items() if not it.strikes and in_flight[one] < WINDOW}
            for node, source in list(download.sources.items()):
                heard = self._heard.get(node) or 0.0
                patience = self._patience_for(len(source.asked))
                is_silent = max(source.since, 0.0 if free - {node} else heard) + patience <= now
                if source.asked and (is_silent or source.since + download.stretched(patience) <= now):
                    source.expect_late()
                    self._relieve(download, source)
                    source.strikes += 1
                    if source.strikes >= MAX_STRIKES:
                        self._expel(download, node)

    def _patience_for(self, chunks: int) -> float:
        return self._patience + chunks * CHUNK_BYTES / CHUNK_BYTES_PER_SECOND

    def _put_back_what_is_beyond_a_share(self) -> None:
        """Let a link's downloads wait again that it has beyond its share, as others who held them are gone.

        Only while others wait for a link that has room in its own; of those that progressed least what they have goes.
        """
        waiting = {self._lightest(self._downloads[item_id]) for item_id in self._waiting()}
        share = self._capacity // SHARE
        for link in [one for one, size in self._size_of_link.items() if size > share and waiting - {one}]:
            of_link = [one for one in self._downloads.values() if one.in_progress and one.link == link]
            for download in sorted(of_link, key=lambda one: len(one.chunks))[:-1]:
                if self._size_of_link[link] > share:
                    self._put_back(download)

    def _put_back(self, download: _Download) -> None:
        """Let a download wait again, as if nothing of it had come."""
        self._end(download)
        download.chunks.clear()
        download.missing = dict.fromkeys(range(chunk_count(download.outline.header.size)))
        self._note_late(download, download.sources)
        for source in download.sources.values():
            source.asked.clear()
            source.late.clear()
        self._news = True

    def _charge_one_that_stays(self, download: _Download) -> None:
        """Whoever it was charged to may be gone: who still gives it takes the room."""
        if download.sources and download.link not in download.sources:
            self._charge(download, self._lightest(download))
            self._news = True

    def _in_flight(self) -> Counter[NodeId]:
        """Return how many chunks each holder was asked for, over all downloads: counted once, for there may be many."""
        in_flight: Counter[NodeId] = Counter()
        for download in self._downloads.values():
            for node, source in download.sources.items():
                in_flight[node] += len(source.asked)
        return in_flight

    def _relieve(self, download: _Download, source: _Source) -> None:
        lacking = {index: None for index in source.asked if index not in download.chunks}  # another may have been late
        download.missing = {**lacking, **download.missing}
        source.asked.clear()

    def _expel(self, download: _Download, node: NodeId) -> None:
        self._note_late(download, [node])
        self._relieve(download, download.sources.pop(node))
        download.expelled.add(node)
        self._charge_one_that_stays(download)

    def _forget(self, item_id: ItemId) -> None:
        download = self._downloads.pop(item_id)
        self._note_late(download, download.sources)
        if download.in_progress:
            self._end(download)
        self._of_link -= Counter([download.link])
        self._of_signer -= Counter([(download.link, download.outline.header.public_key)])
        self._news = True

    def _note_late(self, download: _Download, nodes: Iterable[NodeId]) -> None:
        """What these holders were asked for may come yet, and be of no use."""
        for node in nodes:
            source = download.sources[node]
            key, count = (node, download.outline.id), source.late.total() + len(source.asked)
            if count:
                self._late.set(key, count + (self._late.get(key) or 0))

    def _was_late(self, node: NodeId, item_id: ItemId) -> bool:
        key = (node, item_id)
        count = self._late.pop(key) or 0
        if count > 1:
            self._late.set(key, count - 1)
        return count > 0
