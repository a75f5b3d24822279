"""Asks several members for the pieces of one thing: a fast source gives more, one that fails is left.

    todo -> asked of a source -> checked -> here
              |                    |
              '--- the source is lost, or wrong: back to todo, and this source is asked no more
              '--- it stalls: a second source is asked as well, and the first answer counts

One thread a source keeps `WINDOW` requests under way. The caller waits for the last piece, not for
the threads: one that still waits for a stalled source ends with the attempt.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from collectives.errors import CollectiveError
from collectives.mesh.port import PendingReceive, Port, SourceLost
from collectives.reduce.tensors import memory
from protocol.identity import NodeId

WINDOW = 4  # requests under way to one source: hides a round trip of up to three chunks' time
STALL = 1.0  # seconds until a piece is asked of a second source: what 1 MiB takes at 8 Mbit/s
MAX_ASKED = 2  # sources asked for one piece at a time


@dataclass(frozen=True, eq=False, slots=True)
class WantedAnswer:
    """One answer that is wanted: the question, the answer's length in bytes, and the check of an answer."""

    question: bytes
    length: int
    check: Callable[[memoryview], bool]


@dataclass(slots=True)
class _Asked:
    since: float
    sources: set[NodeId] = field(default_factory=set)


def gather(
    port: Port,
    sources: Sequence[NodeId],
    pieces: Sequence[WantedAnswer],
    arrived: Callable[[WantedAnswer, torch.Tensor], None],
) -> Counter[NodeId]:
    """Get every piece from `sources`, and return how many bytes each of them gave.

    Args:
        port: of the attempt.
        sources: members that serve; each that fails is left out from then on.
        pieces: what to ask for, in the order of asking.
        arrived: told of each piece once, with its bytes (uint8), by one thread at a time.

    Raises:
        SourceLost: no source is left.
        Aborted, DeadlineExceeded: the attempt was called off.
    """
    if not pieces:
        return Counter()
    gathering = _Gathering(port, pieces, arrived)
    for source in sources:
        gathering.ask(source)
    return gathering.wait()


class _Gathering:
    def __init__(
        self, port: Port, pieces: Sequence[WantedAnswer], arrived: Callable[[WantedAnswer, torch.Tensor], None]
    ) -> None:
        self._port = port
        self._arrived = arrived
        self._todo = deque(pieces)
        self._asked: dict[WantedAnswer, _Asked] = {}
        self._missing = len(pieces)
        self._sources = 0
        self._error: CollectiveError | None = None
        self._received: Counter[NodeId] = Counter()
        self._changed = threading.Condition()

    def ask(self, source: NodeId) -> None:
        """Begin to ask one more source, on a thread of its own."""
        with self._changed:
            self._sources += 1
        threading.Thread(target=self._work, args=(source,), name="fetch", daemon=True).start()

    def wait(self) -> "Counter[NodeId]":
        """Block until all is here or nothing more can come; the port ends every wait below in time."""
        with self._changed:
            while self._missing and self._error is None and self._sources:
                self._changed.wait()
            if self._missing:
                raise self._error or SourceLost("no member that has the state can give it any more: call it again")
            return self._received.copy()

    def _work(self, source: NodeId) -> None:
        window: deque[tuple[WantedAnswer, torch.Tensor, PendingReceive]] = deque()
        try:
            while (piece := self._next(source, block=not window)) or window:
                if piece:
                    buffer = torch.empty(piece.length, dtype=torch.uint8)
                    window.append((piece, buffer, self._port.request(source, piece.question, memory(buffer))))
                if not piece or len(window) == WINDOW:
                    piece, buffer, ticket = window[0]
                    self._port.wait(ticket)
                    if not piece.check(memory(buffer)):
                        raise SourceLost(f"member {source} sent what its hash does not bear out")
                    self._store(piece, buffer, source)
                    window.popleft()
        except SourceLost:
            pass  # this source only
        except CollectiveError as error:
            self._fail(error)
        finally:
            self._leave(source)

    def _next(self, source: NodeId, *, block: bool) -> WantedAnswer | None:
        """Take a piece for `source`; None when there is none now and it has others under way, or at the end."""
        with self._changed:
            while self._missing and self._error is None:
                piece = self._todo.popleft() if self._todo else self._stalled(source)
                if piece:
                    self._asked.setdefault(piece, _Asked(time.monotonic())).sources.add(source)
                    return piece
                if not block:
                    return None
                self._changed.wait(STALL / 4)
            return None

    def _stalled(self, source: NodeId) -> WantedAnswer | None:
        now = time.monotonic()
        for piece, asked in self._asked.items():
            if now - asked.since > STALL and source not in asked.sources and len(asked.sources) < MAX_ASKED:
                return piece
        return None

    def _store(self, piece: WantedAnswer, buffer: torch.Tensor, source: NodeId) -> None:
        with self._changed:
            if self._asked.pop(piece, None) is None:
                return  # another was faster
            self._arrived(piece, buffer)
            self._received[source] += piece.length
            self._missing -= 1
            self._changed.notify_all()

    def _fail(self, error: CollectiveError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _leave(self, source: NodeId) -> None:
        """Give back what `source` still owed."""
        with self._changed:
            self._sources -= 1
            for piece, asked in list(self._asked.items()):
                asked.sources.discard(source)
                if not asked.sources:
                    del self._asked[piece]
                    self._todo.appendleft(piece)
            self._changed.notify_all()
