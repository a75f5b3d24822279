"""How the revocation list travels between two peers: who is asked, and who is answered.

A list has up to 24 KiB and a signature to check, so a link has an allowance of lists that it brings or asks for.
"""

from protocol.config import Gate, Instant
from protocol.errors import MessageError
from protocol.events import Link, Message, Send
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.membership.links import MAX_PROVEN
from protocol.wire.messages import AskRevocations, Revocations

LIST_S, LISTS = 10.0, 4  # a link may bring, and ask for, so many at once, and one in 10 s
LIST_WAIT_S = 10.0  # as long as a stranger has for its hello


class RevocationExchange:
    """See the module's comment. The list itself, and what it means, is the gate's."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._asked: Recent[Link, None] = Recent(MAX_PROVEN)  # before they were taken in
        self._budgets: Recent[Link, TokenBucket] = Recent(MAX_PROVEN)

    def ask(self, link: Link) -> Send:
        """Ask for a list newer than ours."""
        return Send(link, AskRevocations(self._gate.revision))

    def ask_first(self, link: Link) -> Send:
        """As `ask`, of somebody who is not admitted by ours."""
        self._asked.set(link, None)
        return self.ask(link)

    def awaits(self, link: Link) -> bool:
        """Tell whether who is not yet a peer was asked for a list over this link."""
        return link in self._asked

    def forget(self, link: Link) -> None:
        """The link is gone."""
        self._asked.pop(link)

    def answer(self, message: Message, now: Instant) -> list[Send]:
        """Send our list to who asks, if it is newer than theirs.

        Raises:
            MessageError: the body is malformed, or the link asks too often.
        """
        if AskRevocations.decode(message.body).revision >= self._gate.revision:
            return []
        self._spend(message.link, now)
        return [Send(message.link, Revocations(self._gate.revocations))]

    def take(self, message: Message, now: Instant) -> bytes:
        """Return the list that came, empty if it is ours. Raises as `answer`."""
        encoded = Revocations.decode(message.body).encoded
        if encoded == self._gate.revocations:
            return b""
        self._spend(message.link, now)
        return encoded

    def _spend(self, link: Link, now: Instant) -> None:
        budget = self._budgets.get(link) or TokenBucket(1 / LIST_S, LISTS, now.steady)
        self._budgets.set(link, budget)
        if not budget.take(1, now.steady):
            raise MessageError("too_many_lists")
