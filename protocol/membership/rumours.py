"""What is said about members' health, and what that is worth. After SWIM, for nodes with few links.

Rules
 1. A suspicion and a death are told to all peers by whoever finds out (see `protocol.membership.failure_detector`).
 2. Whoever has a link to the subject tells it, and nobody else: to us it is alive. If we know a
    larger incarnation of it than the rumour does, the rumour is void and its teller is shown.
 3. The subject raises its incarnation and shows its new record, which clears it wherever it
    comes. It does so once for each incarnation, and not for one that it never had.
 4. A death is told on by those to whom it is news: who knew the node and has no link to it.
 5. A rumour removes nobody. It makes others dial the subject, and speak of it, last.
 6. A peer may tell only so many rumours. What a liar makes others say is bounded too: a node
    tells on few deaths, and warns or defends a subject no more than twice in `suspicion_min`, in
    which nobody can be declared dead.
"""

from protocol.config import Instant, Setup
from protocol.errors import MessageError
from protocol.events import MembershipAction, Send
from protocol.identity import NodeId
from protocol.limits.rate_limits import TokenBucket
from protocol.membership.address_book import Book
from protocol.membership.directory import Directory, meant_for
from protocol.membership.failure_detector import Detector
from protocol.membership.links import Links
from protocol.wire.messages import News, Peers, Rumour, Status

# Deaths that a node tells on. At 11 other links this is one message a second, whatever is said; 32 dead at once are
# news to everybody, and of more it is enough that those who dial them find out.
RETOLD_PER_SECOND = 0.1
RETOLD_BURST = 32.0


class Rumours:
    """See the module's comment."""

    def __init__(
        self, setup: Setup, book: Book, directory: Directory, links: Links, detector: Detector, now: Instant
    ) -> None:
        self._setup = setup
        self._book = book
        self._directory = directory
        self._links = links
        self._detector = detector
        self._next_refutation = now.steady
        self._pause = setup.timing.suspicion_min / 2
        self._retold = TokenBucket(RETOLD_PER_SECOND, RETOLD_BURST, now.steady)

    def take(self, sender: NodeId, news: News, now: Instant) -> list[MembershipAction]:
        """Act on what a live peer says.

        Raises:
            MessageError: it says too much.
        """
        if not self._links.peers[sender].rumours.take(len(news.rumours), now.steady):
            raise MessageError("too_many_rumours")
        return [action for rumour in news.rumours for action in self._one(sender, rumour, now)]

    def _one(self, sender: NodeId, rumour: Rumour, now: Instant) -> list[MembershipAction]:
        node, incarnation, status = rumour
        if node == self._setup.identity.node_id:
            return self._refute(incarnation, now)
        peer = self._links.peers.get(node)
        if peer is not None:
            if incarnation < peer.record.incarnation:
                teller = self._links.peers[sender]
                return [Send(teller.link, Peers((r.encoded,))) for r in meant_for(teller.scope, [peer.record])]
            self._detector.confirmed(node, sender)
            if now.steady < peer.warned + self._pause:
                return []
            peer.warned = now.steady
            return [Send(peer.link, News((rumour,)))]
        if status is Status.DEAD and self._book.mark_dead(node, incarnation) and self._retold.take(1, now.steady):
            return self._links.tell_all(News((rumour,)), but=sender)
        return []

    def _refute(self, incarnation: int, now: Instant) -> list[MembershipAction]:
        if incarnation != self._directory.record.incarnation:
            return []
        if now.steady < self._next_refutation:
            return []  # whoever goes on suspecting us finds us by its probes
        self._next_refutation = now.steady + self._pause
        self._detector.suspected_ourselves()
        self._directory.renew(now, incarnation + 1)
        return self._directory.announce(self._links.peers.values())
