"""All-reduce and others in shared memory: the direct exchange, without sending anything.

    member i                                          owner j of slice j
      copies chunk k of slice j into its bay    ->      adds it up where it lies, in the members' order
      reads the result, slice j, in j's bay     <-      in its own bay

On commit each member copies the results from the owners' bays into its caller's buffer. Of S bytes between two members
each reads and writes 4.5 S in all: S for the contribution, 1.5 S for the sum, 2 S for the copy. gloo moves 5.5 S,
and the direct exchange over sockets 7.5 S.

**Small values** are shown to all: each member writes its own, counts, and reads everybody's (`Room.show`). There is one
wake-up, no port and no plan. A member's values lie in two places in turn. It shows the next but one only after all have
shown the next, so after all have read this one.

A `Room` does parts of it too. A reduce-scatter leaves the results in the owners' bays. Bytes that only move lie in
their giver's bay, in the place of results, until all who want them have copied them.

**Bounded memory without deadlock.** A bay has room for `window` chunks of each slice's contributions, and for all
results. A member gives chunk k of all slices when their owners have reduced chunk k - window. It reduces chunk r of
its own slice after it has given chunk r. Let m be a member whose r is least. A member that owes it chunk r has not
reduced its own chunk r, so it is about to give a chunk k <= r. There is room for that, since all owners have reduced
r - 1 chunks or more. So m's chunk comes, and some r grows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from collectives.errors import Aborted
from collectives.mesh.port import Port
from collectives.mesh.shared_memory import BAY_BYTES, COUNTS, HEAD_BYTES, SMALL_BYTES, Bay, Counter, saw
from collectives.reduce.codecs import BLOCK
from collectives.reduce.kernels import Reduction, Span, add_up, chunks, cut, finish
from protocol.identity import NodeId

LEAST_BYTES = 256 << 10  # below, waiting for each other costs what sending does
# A chunk stays in the cache of a core until it is added up. Smaller chunks of small slices wake the others more often
# than that saves: of 8 ranks with 4 MiB, chunks of an eighth of a slice took twice as long.
CHUNK_BYTES = 256 << 10
LEAST_WINDOW = 4
WINDOW_BYTES = 8 << 20
MOST_SHOWN_BYTES = 4 << 20  # that a member reads of small values: beyond, the owners' sums read less
LOOK_S = 0.05  # between looks whether the operation was called off


@dataclass(frozen=True, slots=True)
class BayLayout:
    """Where everything lies in the bays, the same at all members; lengths are in values, but for `results`."""

    slices: tuple[Span, ...]
    chunk: int
    window: int  # chunks of a slice's contributions that a bay has room for
    results: int  # where in a bay its member's results begin, in bytes
    size: int  # of what is used of a bay, in bytes


def _results_begin(members: int) -> int:
    """Return where in a bay its member's results begin, in bytes: the same for all operations, see `Room`."""
    return max(WINDOW_BYTES, (members - 1) * LEAST_WINDOW * CHUNK_BYTES)


def is_small(members: int, count: int) -> bool:
    """Tell whether `count` bytes of each member are shown to all, as `Room.show` does."""
    return 0 < count <= SMALL_BYTES and members * count <= MOST_SHOWN_BYTES


def can_show(members: int, count: int) -> bool:
    """Tell whether a member's bay has room for `count` bytes that it shows the others."""
    return _results_begin(members) + count <= BAY_BYTES - HEAD_BYTES


def plan(job: Reduction, count: int, *, evenly: bool = False) -> BayLayout:
    """Return how `count` values are reduced; `evenly`: all members own equally many."""
    members, item = len(job.order), job.dtype.itemsize
    each = count // members
    slices = tuple((i * each, (i + 1) * each) for i in range(members)) if evenly else tuple(cut(count, members))
    longest = max(end - first for first, end in slices)
    chunk = max(1, -(-min(CHUNK_BYTES // item, longest) // BLOCK)) * BLOCK
    window = min(-(-longest // chunk), max(LEAST_WINDOW, WINDOW_BYTES // (max(1, members - 1) * chunk * item)))
    results = _results_begin(members)
    return BayLayout(slices, chunk, window, results, results + longest * item)


def fits(job: Reduction, count: int) -> bool:
    """Tell whether a bay has room for the reduction of `count` values, and whether it needs no codec."""
    return job.coder is None and len(job.order) > 1 and plan(job, count).size <= BAY_BYTES - HEAD_BYTES


@dataclass(frozen=True, slots=True)
class Pieces:
    """A result that lies where its owners made it, until the operation's bays are given back."""

    parts: tuple[tuple[Span, torch.Tensor], ...]
    sent: int  # bytes that others read of this member's
    received: int


def all_reduce(port: Port, job: Reduction, values: torch.Tensor, bays: Mapping[NodeId, Bay]) -> Pieces:
    """Return the reduced values, with the same bits at every member as `direct` gives.

    Args:
        port: says when the operation was called off; nothing is sent.
        job: the same at every member, without a codec.
        values: this member's own, 1-D, of the tensor's type.
        bays: everybody's, that this operation has.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    exchange = _SharedExchange(port, job, values, bays)
    exchange.run()
    return exchange.pieces()


class Room:
    """Bays that a group uses for one operation after the other, without an agreement on each.

    Counters go on from where the operation before left them. A member writes no result before all have given values,
    and a member gives values only after it has copied the last results: so nobody loses what it still reads. A hash of
    the arguments lies beside the counters, for this operation and the one before: no member is more than one operation
    ahead of another.
    """

    def __init__(self, bays: Mapping[NodeId, Bay]) -> None:
        """Take everybody's bays, which nothing else uses."""
        self._bays = bays
        self._halves = {member: torch.from_numpy(bay.halves) for member, bay in bays.items()}
        self._shows = 0
        self._bases: dict[tuple[NodeId, str], int] = {}
        self._number = 0

    def all_reduce(self, port: Port, job: Reduction, values: torch.Tensor, asked: int) -> Pieces:
        """Do as `all_reduce`; weights are not 0. `asked` is a hash of 32 bits of what the caller asked for.

        Copy the result before the next call. After an error there is no next one.

        Raises:
            Aborted, DeadlineExceeded: as `all_reduce`; Aborted if a member asked for something else.
        """
        exchange = _SharedExchange(port, job, values, self._bays, self._bases, self._ask(port, asked))
        exchange.run()
        self._bases = exchange.reached()
        return exchange.pieces()

    def note(self, own: NodeId, number: int, asked: int) -> None:
        """Let others see what this member calls as the group's `number`-th operation, whichever way that goes."""
        bay = self._bays[own]
        bay.called_asked[number % 2] = asked
        bay.called.put(number)

    def show(
        self, own: NodeId, values: torch.Tensor, number: int, asked: int, check: Callable[[NodeId], None]
    ) -> dict[NodeId, torch.Tensor]:
        """Show all members a few bytes, and return what each of them shows; all call it with equally many.

        Args:
            own: this member.
            values: bytes, 1-D, at most `SMALL_BYTES`.
            number: of the operation in its group, for `note`.
            asked: a hash of 32 bits of what the caller asked for.
            check: of a member that is waited for: raises if the operation was called off.

        Returns:
            Bytes where they lie: read them before the next call.

        Raises:
            Aborted, DeadlineExceeded: as `check`; Aborted if a member asked for something else.
        """
        self._shows += 1
        half, count = self._shows % 2, values.numel()
        bay = self._bays[own]
        self._halves[own][half, :count].copy_(values)
        bay.shown_asked[half] = asked
        self.note(own, number, asked)
        bay.shown.write(self._shows)
        for member, bay in self._bays.items():
            if member != own:
                self._wait_shown(member, bay, number, asked, check)
        return {member: halves[half, :count] for member, halves in self._halves.items()}

    def _wait_shown(self, member: NodeId, bay: Bay, number: int, asked: int, check: Callable[[NodeId], None]) -> None:
        lost: Aborted | None = None
        while (seen := bay.shown.read()) != self._shows % COUNTS and (self._shows - seen) % COUNTS < COUNTS // 2:
            if lost is not None:
                raise lost
            bay.shown.wait(seen, LOOK_S)
            if bay.shown.read() == seen:
                if _calls_another(bay, number, asked):
                    raise _another_call(member)
                try:
                    check(member)
                except Aborted as error:
                    lost = error  # it may have shown its values just before it ended: look once more
        saw(bay)
        if int(bay.shown_asked[self._shows % 2]) != asked:
            raise _another_call(member)

    def reduce_scatter(self, port: Port, job: Reduction, parts: Sequence[torch.Tensor], asked: int) -> torch.Tensor:
        """Return this member's part of the reduced values; `parts` are its values, equally many for each member.

        As `all_reduce` besides.
        """
        asking = self._ask(port, asked)
        exchange = _SharedExchange(port, job, _RankParts(parts), self._bays, self._bases, asking, evenly=True)
        exchange.run()
        self._bases = exchange.reached()
        return exchange.own_slice()

    def move(
        self,
        port: Port,
        shown: torch.Tensor,
        wanted: Mapping[NodeId, torch.Tensor],
        lengths: Mapping[NodeId, int],
        asked: int,
    ) -> None:
        """Show all other members some bytes, and copy those that some of them show. Otherwise as `all_reduce`.

        Args:
            port: see `all_reduce`.
            shown: this member's own bytes, 1-D, as many as `can_show` allows.
            wanted: where the others' go that this member wants.
            lengths: how many bytes each member shows; the same at all.
            asked: see `all_reduce`.
        """
        move = _Move(port, self._bays, self._bases, self._ask(port, asked))
        move.run(shown, wanted, lengths)
        self._bases = move.reached(lengths)

    def _ask(self, port: Port, asked: int) -> tuple[int, int]:
        self._number += 1
        self._bays[port.own].calls[self._number % 2] = asked
        return self._number % 2, asked


def _another_call(member: NodeId) -> Aborted:
    return Aborted(f"member {member} has called another operation, or with other arguments", member)


def _calls_another(bay: Bay, number: int, asked: int) -> bool:
    """Tell whether a member's call of this number, in which it is, is not the one that was asked for."""
    if bay.called.read() != number % COUNTS:
        return False
    theirs = int(bay.called_asked[number % 2])
    return theirs != asked and bay.called.read() == number % COUNTS  # still: then it has not written over that yet


class _RankParts:
    """A flat tensor's stand-in, in equal parts: what is read of it is within one part."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts, self._each = parts, parts[0].numel()
        self.dtype, self.nbytes = parts[0].dtype, len(parts) * parts[0].nbytes

    def numel(self) -> int:
        return len(self._parts) * self._each

    def __getitem__(self, span: slice, /) -> torch.Tensor:
        part, first = divmod(span.start, self._each)
        return self._parts[part][first : first + span.stop - span.start]


class _BayTurn:
    """One operation's view of the bays: data, and counters that go on from where the operation before left them."""

    def __init__(
        self,
        port: Port,
        bays: Mapping[NodeId, Bay],
        bases: Mapping[tuple[NodeId, str], int] | None = None,
        asked: tuple[int, int] | None = None,
    ) -> None:
        self._port, self._bays = port, bays
        self._bases, self._asked = bases or {}, asked
        self._data = {member: torch.from_numpy(bay.data) for member, bay in bays.items()}
        self._others = [member for member in bays if member != port.own]
        self._seen: dict[tuple[NodeId, str], int] = {}

    def _count(self, name: str, chunks_done: int) -> None:
        counter: Counter = getattr(self._bays[self._port.own], name)
        counter.write(self._bases.get((self._port.own, name), 0) + chunks_done)

    def _has(self, member: NodeId, name: str, least: int) -> bool:
        """Tell whether a counter of another member has reached `least`."""
        if self._seen.get((member, name), 0) < least:
            counter: Counter = getattr(self._bays[member], name)
            self._seen[member, name] = (counter.read() - self._bases.get((member, name), 0)) % COUNTS
        return self._seen.get((member, name), 0) >= least

    def _wait(self, member: NodeId, name: str, least: int) -> None:
        """Wait until a counter of another member has reached `least`."""
        if least <= 0:
            return  # the member may not have begun
        lost: Aborted | None = None
        while not self._has(member, name, least):
            if lost is not None:
                raise lost
            try:
                self._port.check(member)
            except Aborted as error:
                lost = error  # it may have written what is awaited just before it ended: look once more
                continue
            counter: Counter = getattr(self._bays[member], name)
            counter.wait(self._seen[member, name] + self._bases.get((member, name), 0), LOOK_S)
        saw(self._bays[member])
        if self._asked is not None and int(self._bays[member].calls[self._asked[0]]) != self._asked[1]:
            raise _another_call(member)


class _Move(_BayTurn):
    """Members show bytes in their bays, each where its results lie, and others copy them."""

    def run(self, shown: torch.Tensor, wanted: Mapping[NodeId, torch.Tensor], lengths: Mapping[NodeId, int]) -> None:
        first = _results_begin(len(self._bays))
        self._count("given", 1)  # this member has copied what it read of the last results
        for member in self._others:
            self._wait(member, "given", 1)
        for k, (begin, end) in enumerate(chunks((0, shown.numel()), CHUNK_BYTES)):
            self._data[self._port.own][first + begin : first + end].copy_(shown[begin:end])
            self._count("reduced", k + 1)
        for member in self._others:
            for k, (begin, end) in enumerate(chunks((0, lengths[member]), CHUNK_BYTES)):
                self._wait(member, "reduced", k + 1)
                if member in wanted:
                    wanted[member][begin:end].copy_(self._data[member][first + begin : first + end])

    def reached(self, lengths: Mapping[NodeId, int]) -> dict[tuple[NodeId, str], int]:
        """Return where all counters are when all have carried it out."""
        ends = {(member, "given"): 1 for member in self._bays}
        ends |= {(member, "reduced"): -(-length // CHUNK_BYTES) for member, length in lengths.items()}
        return {name: self._bases.get(name, 0) + end for name, end in ends.items()}


class _SharedExchange(_BayTurn):
    def __init__(
        self,
        port: Port,
        job: Reduction,
        values: torch.Tensor | _RankParts,
        bays: Mapping[NodeId, Bay],
        bases: Mapping[tuple[NodeId, str], int] | None = None,
        asked: tuple[int, int] | None = None,
        *,
        evenly: bool = False,
    ) -> None:
        super().__init__(port, bays, bases, asked)
        self._job, self._values = job, values
        self._plan = plan(job, values.numel(), evenly=evenly)
        slices = dict(zip(job.order, self._plan.slices, strict=True))
        self._spans = {member: list(chunks(span, self._plan.chunk)) for member, span in slices.items()}
        self._first = {member: span[0] for member, span in slices.items()}

    def run(self) -> None:
        own, gives = self._spans[self._port.own], self._gives(self._port.own)
        given = reduced = 0
        while given < gives or reduced < len(own):
            ahead = given > reduced and reduced < len(own)
            if given < gives and (not ahead or (self._has_room(given) and not self._is_here(reduced))):
                self._give(given)
                given += 1
            else:
                self._reduce(reduced)
                reduced += 1
        for member in self._others:
            self._wait(member, "reduced", len(self._spans[member]))

    def reached(self) -> dict[tuple[NodeId, str], int]:
        """Return where all counters are when all have carried it out."""
        ends = {(member, "given"): self._gives(member) for member in self._job.order}
        ends |= {(member, "reduced"): len(self._spans[member]) for member in self._job.order}
        return {name: self._bases.get(name, 0) + end for name, end in ends.items()}

    def _gives(self, giver: NodeId) -> int:
        """Return how many chunks a member gives to each of the others, at most."""
        others = [len(spans) for member, spans in self._spans.items() if member != giver]
        return max(others) if self._job.weights[giver] else 0

    def _is_here(self, k: int) -> bool:
        """Tell whether all have given their values of the own chunk k."""
        return all(self._has(member, "given", k + 1) for member in self._others if self._job.weights[member])

    def _has_room(self, k: int) -> bool:
        """Tell whether chunk k of all slices can be given without waiting."""
        return all(self._has(member, "reduced", self._before(member, k)) for member in self._others)

    def _before(self, owner: NodeId, k: int) -> int:
        """Return how many chunks an owner must have reduced before chunk k can be given to it."""
        return k - self._plan.window + 1 if k < len(self._spans[owner]) else 0

    def _give(self, k: int) -> None:
        for member in self._others:
            spans = self._spans[member]
            if k < len(spans):
                self._wait(member, "reduced", self._before(member, k))
                self._contribution(self._port.own, member, k).copy_(self._values[slice(*spans[k])])
        self._count("given", k + 1)

    def _reduce(self, k: int) -> None:
        job, span = self._job, self._spans[self._port.own][k]
        for member in self._others:  # all, before anything is written: see `Room`
            if job.weights[member]:
                self._wait(member, "given", k + 1)
        into = self._result(self._port.own, span)
        work = into if job.work is job.dtype else torch.empty(into.numel(), dtype=job.work)
        add_up(job, lambda member: self._read(member, k), work)
        finish(job.op, work, job.total, into)
        self._count("reduced", k + 1)

    def _read(self, giver: NodeId, k: int) -> torch.Tensor:
        """Return a member's values of the own chunk k."""
        own = self._port.own
        if giver == own:
            return self._values[slice(*self._spans[own][k])]
        return self._contribution(giver, own, k)

    def _contribution(self, giver: NodeId, owner: NodeId, k: int) -> torch.Tensor:
        """Return where in the giver's bay its values of the owner's chunk k lie."""
        order, item = self._job.order, self._job.dtype.itemsize
        place = order.index(owner) - (order.index(owner) > order.index(giver))
        first = (place * self._plan.window + k % self._plan.window) * self._plan.chunk * item
        span = self._spans[owner][k]
        return self._data[giver][first : first + (span[1] - span[0]) * item].view(self._job.dtype)

    def _result(self, owner: NodeId, span: Span) -> torch.Tensor:
        """Return where in the owner's bay the result of a span of its slice lies."""
        item = self._job.dtype.itemsize
        first = self._plan.results + (span[0] - self._first[owner]) * item
        return self._data[owner][first : first + (span[1] - span[0]) * item].view(self._job.dtype)

    def own_slice(self) -> torch.Tensor:
        """Return the result of this member's own slice."""
        own = self._port.own
        return self._result(own, dict(zip(self._job.order, self._plan.slices, strict=True))[own])

    def pieces(self) -> Pieces:
        """Return the whole result."""
        own, item = self._port.own, self._job.dtype.itemsize
        spans = dict(zip(self._job.order, self._plan.slices, strict=True))
        parts = tuple((span, self._result(owner, span)) for owner, span in spans.items() if span[0] < span[1])
        length = {member: (end - first) * item for member, (first, end) in spans.items()}
        given = {member: sum(length.values()) if self._job.weights[member] else 0 for member in self._job.order}
        sent = (given[own] - length[own] if given[own] else 0) + len(self._others) * length[own]
        received = sum(length[own] for member in self._others if given[member]) + sum(length[m] for m in self._others)
        return Pieces(parts, sent, received)
