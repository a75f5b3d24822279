"""All-reduce in shared memory: the direct exchange, without sending anything.

    member i                                          owner j of slice j
      copies chunk k of slice j into its bay    ->      adds it up where it lies, in the members' order
      reads the result, slice j, in j's bay     <-      in its own bay

On commit each member copies the results from the owners' bays into its caller's buffer. Of S bytes between two members
each reads and writes 4.5 S in all: S for the contribution, 1.5 S for the sum, 2 S for the copy. gloo moves 5.5 S,
and the direct exchange over sockets 7.5 S.

**Bounded memory without deadlock.** A bay has room for `window` chunks of each slice's contributions, and for all
results. A member gives chunk k of all slices when their owners have reduced chunk k - window. It reduces chunk r of
its own slice after it has given chunk r. Let m be a member whose r is least. A member that owes it chunk r has not
reduced its own chunk r, so it is about to give a chunk k <= r. There is room for that, since all owners have reduced
r - 1 chunks or more. So m's chunk comes, and some r grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from collectives.errors import Aborted
from collectives.mesh.port import Port
from collectives.mesh.shared_memory import BAY_BYTES, COUNTS, HEAD_BYTES, Bay, Counter, saw
from collectives.reduce.codecs import BLOCK
from collectives.reduce.kernels import Reduction, Span, add_up, chunks, cut, finish
from collectives.reduce.staging import Values
from protocol.identity import NodeId

LEAST_BYTES = 256 << 10  # below, waiting for each other costs what sending does
# Stays in the cache of a core until it is added up. Smaller chunks of small slices wake the others more often than that
# saves: of 8 ranks with 4 MiB, chunks of an eighth of a slice took twice as long.
CHUNK_BYTES = 256 << 10
LEAST_WINDOW = 4
WINDOW_BYTES = 8 << 20
LOOK_S = 0.05  # between looks whether the operation was called off


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies in the bays, the same at all members; lengths are in values, but for `results`."""

    slices: tuple[Span, ...]
    chunk: int
    window: int  # chunks of a slice's contributions that a bay has room for
    results: int  # where in a bay its member's results begin, in bytes
    size: int  # of what is used of a bay, in bytes


def plan(job: Reduction, count: int) -> Plan:
    """Return how `count` values are reduced."""
    members, item = len(job.order), job.dtype.itemsize
    slices = tuple(cut(count, [1.0] * members))
    longest = max(end - first for first, end in slices)
    chunk = max(1, -(-min(CHUNK_BYTES // item, longest) // BLOCK)) * BLOCK
    window = min(-(-longest // chunk), max(LEAST_WINDOW, WINDOW_BYTES // (max(1, members - 1) * chunk * item)))
    results = max(WINDOW_BYTES, (members - 1) * LEAST_WINDOW * CHUNK_BYTES)  # the same for all: see `Room`
    return Plan(slices, chunk, window, results, results + longest * item)


def fits(job: Reduction, count: int) -> bool:
    """Tell whether a bay has room for the reduction of `count` values, and whether it needs no codec."""
    return job.coder is None and len(job.order) > 1 and plan(job, count).size <= BAY_BYTES - HEAD_BYTES


@dataclass(frozen=True, slots=True)
class Pieces:
    """A result that lies where its owners made it, until the operation's bays are given back."""

    parts: tuple[tuple[Span, torch.Tensor], ...]
    sent: int  # bytes that others read of this member's
    received: int


def all_reduce(port: Port, job: Reduction, values: Values, bays: Mapping[NodeId, Bay]) -> Pieces:
    """Return the reduced values, with the same bits at every member as `direct` gives.

    Args:
        port: says when the operation was called off; nothing is sent.
        job: the same at every member, without a codec.
        values: this member's own, 1-D, of the tensor's type.
        bays: everybody's, that this operation has.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    return _Exchange(port, job, values, bays).run()


class Room:
    """Bays that the members of a group have for one reduction after the other, without an agreement.

    Counters go on from where the reduction before left them. A member writes no result before all have given values,
    and a member gives values when it has copied the results before: so nobody loses what it still reads. A hash of the
    arguments lies beside the counters, for this reduction and the one before: no member is further ahead of another.
    """

    def __init__(self, bays: Mapping[NodeId, Bay]) -> None:
        """Take everybody's bays, which nothing else uses."""
        self._bays = bays
        self._bases: dict[tuple[NodeId, str], int] = {}
        self._number = 0

    def all_reduce(self, port: Port, job: Reduction, values: Values, asked: int) -> Pieces:
        """Do as `all_reduce`; weights are not 0. `asked` is a hash of 32 bits of what the caller asked for.

        Copy the result before the next call. After an error there is no next one.

        Raises:
            Aborted, DeadlineExceeded: as `all_reduce`; Aborted if a member asked for something else.
        """
        self._number += 1
        self._bays[port.own].calls[self._number % 2] = asked
        exchange = _Exchange(port, job, values, self._bays, self._bases, (self._number % 2, asked))
        pieces = exchange.run()
        self._bases = exchange.reached()
        return pieces


class _Exchange:
    def __init__(
        self,
        port: Port,
        job: Reduction,
        values: Values,
        bays: Mapping[NodeId, Bay],
        bases: Mapping[tuple[NodeId, str], int] | None = None,
        asked: tuple[int, int] | None = None,
    ) -> None:
        self._port, self._job, self._values, self._bays = port, job, values, bays
        self._bases, self._asked = bases or {}, asked
        self._plan = plan(job, values.numel())
        self._data = {member: torch.from_numpy(bay.data) for member, bay in bays.items()}
        slices = dict(zip(job.order, self._plan.slices, strict=True))
        self._spans = {member: list(chunks(span, self._plan.chunk)) for member, span in slices.items()}
        self._others = [member for member in job.order if member != port.own]
        self._first = {member: span[0] for member, span in slices.items()}
        self._seen: dict[tuple[NodeId, str], int] = {}

    def run(self) -> Pieces:
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
        return self._pieces()

    def reached(self) -> dict[tuple[NodeId, str], int]:
        """Return where all counters are when all have carried it out."""
        ends = {(member, "given"): self._gives(member) for member in self._job.order}
        ends |= {(member, "reduced"): len(self._spans[member]) for member in self._job.order}
        return {name: self._bases.get(name, 0) + end for name, end in ends.items()}

    def _gives(self, giver: NodeId) -> int:
        """Return how many chunks a member gives to each of the others, at most."""
        others = [len(spans) for member, spans in self._spans.items() if member != giver]
        return max(others) if self._job.weights[giver] else 0

    def _count(self, name: str, chunks_done: int) -> None:
        counter: Counter = getattr(self._bays[self._port.own], name)
        counter.write(self._bases.get((self._port.own, name), 0) + chunks_done)

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

    def _has(self, member: NodeId, name: str, least: int) -> bool:
        """Tell whether a counter of another member has reached `least`."""
        if self._seen.get((member, name), 0) < least:
            counter: Counter = getattr(self._bays[member], name)
            self._seen[member, name] = (counter.read() - self._bases.get((member, name), 0)) % COUNTS
        return self._seen.get((member, name), 0) >= least

    def _wait(self, member: NodeId, name: str, least: int) -> None:
        """Wait until it has."""
        if least <= 0:
            return  # the member may not have begun
        while not self._has(member, name, least):
            self._port.check(member)
            counter: Counter = getattr(self._bays[member], name)
            counter.wait(self._seen[member, name] + self._bases.get((member, name), 0), LOOK_S)
        saw(self._bays[member])
        if self._asked is not None and int(self._bays[member].calls[self._asked[0]]) != self._asked[1]:
            raise Aborted(f"member {member} has called another operation, or with other arguments", member)

    def _pieces(self) -> Pieces:
        own, item = self._port.own, self._job.dtype.itemsize
        spans = dict(zip(self._job.order, self._plan.slices, strict=True))
        parts = tuple((span, self._result(owner, span)) for owner, span in spans.items() if span[0] < span[1])
        length = {member: (end - first) * item for member, (first, end) in spans.items()}
        given = {member: sum(length.values()) if self._job.weights[member] else 0 for member in self._job.order}
        sent = (given[own] - length[own] if given[own] else 0) + len(self._others) * length[own]
        received = sum(length[own] for member in self._others if given[member]) + sum(length[m] for m in self._others)
        return Pieces(parts, sent, received)
