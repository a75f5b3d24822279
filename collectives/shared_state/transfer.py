"""Bringing a member's state up to the one that holds: from every member that has it, at once.

Only the chunks that differ travel. Each source has a thread here that keeps a few requests under way and takes the next
chunk from one common list, so a fast source gives more than a slow one. A source that dies, refuses or sends what its
hash does not bear out is left, and its chunks go back to the list; so do those of one that stalls. Parts that arrived
and are right stay with the state when the operation is called off, and the next attempt goes on from there.

Nothing touches the caller's tensors before the group has committed: `SyncOutcome.publish` does.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random

import torch

from collectives.errors import Aborted, CollectiveError, Mismatch
from collectives.mesh.port import Port, SourceLost
from collectives.reduce.tensors import MOVED, memory, publish
from collectives.shared_state.fetch import WantedAnswer, gather
from collectives.shared_state.selection import HASH_BYTES, Share, ShareError, StateChoice, choose, decode_all
from collectives.shared_state.state import (
    Contents,
    SharedState,
    StateEntry,
    check_layout,
    chunk_count,
    chunks_of,
    decode_table,
    digest_of,
    sha256,
)
from collectives.types import SyncStrategy
from protocol.identity import NodeId
from protocol.wire.encoding import is_uint, pack, unpack

MAX_SOURCES = 8  # that one member fetches from; more would spread the same bytes thinner, with a thread each
TABLE_PAGE = 1 << 20
MOST_TIMES, MOST_MORE = 4, 1 << 20  # a table longer by this factor and these bytes is not fetched to say what differs

_TABLE, _HASHES, _CHUNK = range(3)  # what a question is about


class SyncOutcome:
    """The result of a synchronisation; `publish` puts it into the state once the group has committed.

    Args:
        state: the caller's.
        answers: what this member serves, and what it had.
        choice: the state that holds.
        fetched: for each tensor to be replaced (its place in the table) the hashes of its chunks.
        received: bytes of tensors that came from each member.
    """

    def __init__(
        self,
        state: SharedState,
        answers: "Answers",
        choice: StateChoice,
        fetched: Mapping[int, Sequence[bytes]],
        received: Counter[NodeId],
    ) -> None:
        self._state = state
        self._answers = answers
        self._fetched = fetched
        self.replaced = bool(fetched)
        self.revision = choice.revision
        self.bytes_received = received.total()
        self.source = max(sorted(received), key=received.__getitem__) if received else None

    @property
    def bytes_sent(self) -> int:
        """Bytes of tensors that others have been given so far; final once the operation has ended."""
        return self._answers.bytes_sent

    def publish(self) -> None:
        """Write what was fetched into the caller's tensors; to be called on commit, and then only."""
        state, contents = self._state, self._answers.contents
        for tensor, hashes in self._fetched.items():
            before, entry = contents.values[tensor], contents.entries[tensor]
            scratch = torch.empty(len(before), dtype=torch.uint8)
            for wanted, into, old in zip(hashes, chunks_of(memory(scratch)), chunks_of(before), strict=True):
                into[:] = memory(state.arrived[wanted]) if wanted in state.arrived else old
            publish(scratch.view(MOVED[entry.dtype]), state.tensors[entry.name])
        state.revision = state.synced = self.revision
        state.arrived.clear()
        state.contents = None


class Answers:
    """What this member tells those that ask: its table, its chunk hashes, its chunks. Thread-safe."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self._sent: list[int] = []  # appending is atomic

    @property
    def bytes_sent(self) -> int:
        """Bytes of chunks handed out."""
        return sum(self._sent)

    def answer(self, _: NodeId, question: bytes) -> memoryview | bytes | None:
        """Return what was asked for, None for what makes no sense."""
        try:
            fields = unpack(question, 3, error=ShareError)
        except ShareError:
            return None
        if not all(is_uint(field) for field in fields):
            return None
        kind, first, second = fields
        contents = self.contents
        if kind == _TABLE:
            return contents.table[first * TABLE_PAGE : (first + 1) * TABLE_PAGE] or None
        if first >= len(contents.entries) or contents.entries[first].own:
            return None
        if kind == _HASHES:
            return contents.chunks[first]
        chunks = chunks_of(contents.values[first])
        if kind != _CHUNK or second >= len(chunks):
            return None
        self._sent.append(len(chunks[second]))
        return chunks[second]


def sync(
    port: Port, own: NodeId, shares: Mapping[NodeId, bytes], state: SharedState, strategy: SyncStrategy
) -> SyncOutcome:
    """Find the state that holds and fetch what this member lacks of it; others are served until the verdict.

    Args:
        port: of this attempt.
        own: this member.
        shares: what `share_of` gave at each member.
        state: this member's, as it was when its share was made.
        strategy: this member's, as in its share.

    Raises:
        Mismatch: tensors, revisions or SEND_ONLY contents that cannot go together; at every member.
        NotEnoughPeers: nobody offers a state.
        Aborted, DeadlineExceeded: the operation was called off, or no source is left.
    """
    contents = state.contents
    if contents is None:
        raise CollectiveError("the state was not hashed for this call: call sync_state again")
    answers = Answers(contents)
    port.serve(answers.answer)
    read = decode_all(shares)
    _check_layouts(port, own, read, contents)
    choice = choose(read)
    if contents.content == choice.content:
        return SyncOutcome(state, answers, choice, {}, Counter())
    sources = _sources(own, choice)
    theirs = _table(port, sources, read)
    differing = {at: entry for at, entry in enumerate(theirs) if entry.digest != contents.entries[at].digest}
    hashes = _chunk_hashes(port, sources, differing)
    received = _fetch(port, sources, state, hashes)
    return SyncOutcome(state, answers, choice, hashes, received)


def _check_layouts(port: Port, own: NodeId, shares: Mapping[NodeId, Share], contents: Contents) -> None:
    """Raise the `Mismatch` of the first member whose tensors are not ours, with what differs."""
    for member in sorted(shares):
        share = shares[member]
        if member == own or (share.layout == contents.layout and share.table_bytes == len(contents.table)):
            continue
        if share.layout == contents.layout or share.table_bytes > MOST_TIMES * len(contents.table) + MOST_MORE:
            raise Mismatch(member, "length of the table of tensors", share.table_bytes, len(contents.table))
        try:
            table = _table(port, [member], shares)
        except Aborted:
            # The others knew sooner and called it off: layouts differ, but in which tensor is unknown.
            raise Mismatch(member, "layout", share.layout.hex()[:12], contents.layout.hex()[:12]) from None
        check_layout(member, table, contents.entries)


def _sources(own: NodeId, choice: StateChoice) -> list[NodeId]:
    """Return whom to fetch from: different members for different fetchers, where there are many."""
    holders = list(choice.holders)
    Random(f"{own} {choice.content.hex()}").shuffle(holders)
    return holders[:MAX_SOURCES]


def _table(port: Port, sources: Sequence[NodeId], shares: Mapping[NodeId, Share]) -> tuple[StateEntry, ...]:
    """Return the table that `sources` have in common; it can be checked as a whole only, so one gives all of it."""
    for source in sources:
        share = shares[source]
        with suppress(ShareError, SourceLost):
            return decode_table(share.table or _table_pages(port, source, share.table_bytes), share)
    raise SourceLost("no member gave the table of the state: call it again")


def _table_pages(port: Port, source: NodeId, length: int) -> bytes:
    table = torch.empty(length, dtype=torch.uint8)
    starts = {
        WantedAnswer(pack([_TABLE, at, 0]), min(TABLE_PAGE, length - start), lambda _: True): start
        for at, start in enumerate(range(0, length, TABLE_PAGE))
    }

    def arrived(piece: WantedAnswer, page: torch.Tensor) -> None:
        table[starts[piece] :][: piece.length] = page

    gather(port, [source], list(starts), arrived)
    return bytes(memory(table))


def _chunk_hashes(port: Port, sources: Sequence[NodeId], entries: Mapping[int, StateEntry]) -> dict[int, list[bytes]]:
    """Return, for each tensor that differs, the hashes of the chunks that it should have."""
    found: dict[int, list[bytes]] = {}
    asked: dict[WantedAnswer, int] = {}
    for tensor, entry in entries.items():

        def right(answer: memoryview, entry: StateEntry = entry) -> bool:
            return digest_of(entry.name, entry.dtype, entry.shape, bytes(answer)) == entry.digest

        asked[WantedAnswer(pack([_HASHES, tensor, 0]), HASH_BYTES * chunk_count(entry.nbytes), right)] = tensor

    def arrived(piece: WantedAnswer, answer: torch.Tensor) -> None:
        data = bytes(memory(answer))
        found[asked[piece]] = [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]

    gather(port, sources, list(asked), arrived)
    return found


def _fetch(
    port: Port, sources: Sequence[NodeId], state: SharedState, hashes: Mapping[int, Sequence[bytes]]
) -> Counter[NodeId]:
    """Fetch the chunks that are neither right already nor here from an attempt before this one."""
    contents = state.contents
    assert contents is not None
    wanted_here = {wanted for part in hashes.values() for wanted in part}
    state.arrived = {wanted: chunk for wanted, chunk in state.arrived.items() if wanted in wanted_here}
    pieces: dict[WantedAnswer, bytes] = {}
    for tensor, wanted_chunks in hashes.items():
        before = contents.chunks[tensor]
        for chunk, (wanted, data) in enumerate(zip(wanted_chunks, chunks_of(contents.values[tensor]), strict=True)):
            if wanted == before[chunk * HASH_BYTES :][:HASH_BYTES] or wanted in state.arrived:
                continue

            def right(answer: memoryview, wanted: bytes = wanted) -> bool:
                return sha256(answer) == wanted

            pieces[WantedAnswer(pack([_CHUNK, tensor, chunk]), len(data), right)] = wanted

    def arrived(piece: WantedAnswer, chunk: torch.Tensor) -> None:
        state.arrived[pieces[piece]] = chunk

    return gather(port, sources, list(pieces), arrived)
