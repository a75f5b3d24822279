"""The data plane that an operation's algorithm sees: numbered payloads between members, for one attempt.

An attempt is one operation between its start and its verdict. Within it, (source, slot) names
one payload; slots below 2^31 are the algorithm's own to number, as it likes, and both ends must
agree on each slot's length. Payloads may overtake each other: order comes from slots only.

    ticket = port.expect(left, slot, into)    # first say where it goes: it is then read straight to there
    port.send(right, slot, payload)           # queued; the caller goes on
    port.wait(ticket)                         # `into` is filled
    port.flush()                              # every payload has left: its buffer may change

A payload that comes before it is expected is held, up to a bound; above that the link waits. So expect early. A port
that is cancelled (abort, deadline, a lost member) wakes every wait with an error. **Once `cancel` has returned, nothing
is received to the port's buffers.** A thread may still be sending from them, so others must not use what comes: they
know that the attempt is over.

For state transfer there are questions and answers. Every member that has something to give calls
`serve(handler)` and goes on serving, by itself, until the verdict closes the port; a fetcher calls
`request` and waits for the ticket. A source that dies or refuses costs that ticket only.
"""

from collections.abc import Callable
from typing import Protocol

from collectives.errors import Aborted
from protocol.identity import NodeId

MAX_SLOT = 2**31 - 1  # of the algorithm's own; above are answers to requests
MAX_REQUEST_BYTES = 256  # a question names what is wanted, and many are held; answers are as large as `into`

Handler = Callable[[NodeId, bytes], memoryview | bytes | None]  # (who asks, question) -> answer; None refuses


class SourceLost(Aborted):
    """The member that was asked cannot answer: it died, refused, or sent another length. Ask another."""


class PendingReceive(Protocol):
    """A payload that is to come."""

    def done(self) -> bool:
        """Tell whether `wait` would return, or raise, at once."""


class Port(Protocol):
    """One attempt's way to the other members. Thread-safe; every wait ends by the attempt's deadline."""

    @property
    def own(self) -> NodeId:
        """The member that this port belongs to."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the links so far."""

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far, answers included."""

    def send(self, to: NodeId, slot: int, payload: memoryview) -> None:
        """Queue `payload` (contiguous) for a member; it must not change until `flush`, or the port's end.

        May block when much is queued.

        Raises:
            Aborted, DeadlineExceeded: the port was cancelled, or its time is up.
        """

    def expect(self, source: NodeId, slot: int, into: memoryview) -> PendingReceive:
        """Say where (contiguous, writable) the payload goes that `source` sends in `slot`."""

    def wait(self, ticket: PendingReceive) -> None:
        """Block until the payload is in its place.

        Raises:
            Aborted, DeadlineExceeded: the port was cancelled, or its time is up.
            SourceLost: of a `request` only; the port goes on.
        """

    def flush(self) -> None:
        """Block until everything sent so far has left. Raises as `send`."""

    def check(self, member: NodeId) -> None:
        """Return while it makes sense to wait for something else of `member`, such as a change of its memory.

        Raises:
            Aborted, DeadlineExceeded: the port was cancelled, its time is up, or the connection with `member` is lost.
        """

    def serve(self, handler: Callable[[NodeId, bytes], memoryview | bytes | None]) -> None:
        """Answer others' requests with `handler`, on a thread of the port, until the verdict.

        Requests that came before are answered too. A handler may be called for several askers at once.
        """

    def request(self, source: NodeId, question: bytes, into: memoryview) -> PendingReceive:
        """Ask a serving member; its answer, of exactly `into`'s length, goes to `into`.

        Several may be under way, to one source or to many.
        """

    def cancel(self, reason: str) -> None:
        """End the attempt: every wait, now and later, raises `Aborted(reason)`, and no ticket's `into` changes."""
