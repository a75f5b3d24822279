"""How the revocation list travels between two peers: who is asked, who is answered, and whose hello waits for it.

A list has up to 24 KiB and a signature to check, so a link has an allowance of lists that it brings or asks for.
A hello that we would not admit waits for the list that its sender knows and we do not: it may say that who signed
its grant may. It waits for `LIST_WAIT_S` and is judged then without one: to ask is an answer, and whoever was answered
keeps its connection. Promises are free and addresses are not: where as many wait as may, the oldest of the network that
has most places is judged at once for one of a network that has fewer.
"""

from collections import Counter
from typing import NamedTuple

from protocol.config import Gate, Instant
from protocol.errors import MessageError
from protocol.events import Link, Message, Send
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.membership.links import MAX_PROVEN
from protocol.wire.messages import AskRevocations, Revocations

LIST_S, LISTS = 10.0, 4  # a link may bring, and ask for, so many at once, and one in 10 s
LIST_WAIT_S = 10.0  # as long as a stranger has for its hello
MAX_WAITING = 64  # hellos that wait for a disk, or as many for a list


class Brought(NamedTuple):
    """A list that came, None if it is ours, and the hello that waited for it."""

    encoded: bytes | None
    hello: Message | None


class _Waiting(NamedTuple):
    hello: Message
    until: float
    network: str


class RevocationExchange:
    """See the module's comment. The list itself, and what it means, is the gate's."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._waiting: dict[Link, _Waiting] = {}
        self._budgets: Recent[Link, TokenBucket] = Recent(MAX_PROVEN)

    def ask(self, link: Link) -> Send:
        """Ask for a list newer than ours."""
        return Send(link, AskRevocations(self._gate.revision))

    def displaced_by(self, hello: Message, network: str) -> Message | None:
        """Return who is to be judged now, that a hello of `network` may wait; None: there is room, or none for it."""
        if hello.link in self._waiting or len(self._waiting) < MAX_WAITING:
            return None
        places = Counter(waiting.network for waiting in self._waiting.values())
        ((crowd, most),) = places.most_common(1)
        if places[network] + 1 >= most:
            return None
        return next(waiting.hello for waiting in self._waiting.values() if waiting.network == crowd)

    def ask_first(self, hello: Message, network: str, now: Instant) -> Send | None:
        """Let a hello wait for its sender's list, and ask for that; None: too many wait.

        To say it again prolongs nothing.
        """
        waiting = self._waiting.get(hello.link)
        if waiting is None and len(self._waiting) >= MAX_WAITING:
            return None
        until = now.steady + LIST_WAIT_S if waiting is None else waiting.until
        self._waiting[hello.link] = _Waiting(hello, until, network)
        return self.ask(hello.link)

    def late(self, now: Instant) -> list[Message]:
        """Return the hellos that have waited for long enough; they are to be judged as they are."""
        return [waiting.hello for waiting in self._waiting.values() if waiting.until <= now.steady]

    def awaits(self, link: Link) -> bool:
        """Tell whether who is not yet a peer may send a list over this link."""
        return link in self._waiting

    def forget(self, link: Link) -> None:
        """The link is gone, or its hello was judged."""
        self._waiting.pop(link, None)

    def answer(self, message: Message, now: Instant) -> list[Send]:
        """Send our list to who asks, if it is newer than theirs.

        Raises:
            MessageError: the body is malformed, or the link asks too often.
        """
        if AskRevocations.decode(message.body).revision >= self._gate.revision:
            return []
        self._spend(message.link, now)
        return [Send(message.link, Revocations(self._gate.revocations))]

    def take(self, message: Message, now: Instant) -> Brought:
        """Return what a peer sent, and what waited for it. Raises as `answer`."""
        encoded = Revocations.decode(message.body).encoded
        waiting = self._waiting.get(message.link)
        hello = waiting.hello if waiting is not None else None
        if encoded == self._gate.revocations:
            return Brought(None, hello)
        self._spend(message.link, now)
        return Brought(encoded, hello)

    def _spend(self, link: Link, now: Instant) -> None:
        budget = self._budgets.get(link) or TokenBucket(1 / LIST_S, LISTS, now.steady)
        self._budgets.set(link, budget)
        if not budget.take(1, now.steady):
            raise MessageError("too_many_lists")
