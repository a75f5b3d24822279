"""Proof of other views (witnesses): whose word counts about a view that this node is not in.

A node goes out of its view, and its calls end, when another view outranks it (see `dispatch`). So nobody may be able to
make up such a notice. Every notice comes over a link whose handshake proved who speaks; nobody can show a view on
behalf of somebody else. What it proves:

1. *One that this node was in a view with* is believed: members let it in, and members do not lie.
2. *A node that was in no view with anybody* believes whoever speaks: it has no group to lose.
3. Else a view is believed when more than half of its members, each over its own link, have shown the very same one.

Why that is enough: a view that a group of s >= 2 members goes out for has s members or more, so by rule 3
more than s / 2 nodes that may join have to conspire; one never suffices, however many members it makes up.
Where anybody may join, who makes up keys can do that, and do worse as a member: so a group has a secret, or a
predicate of who may join. An alternative not taken is a certificate, signatures of its members that travel with each
view: it would let one witness speak for many, and proves no more.

A ballot, too, counts only from a node that is, or was, in a view with this one. A node that was in the group and
applies again is welcomed only by such a node, as long as any of them speaks from a view: no stranger welcomes it to
another group.
"""

from dataclasses import dataclass, field

from collectives.agreement.views import View
from protocol.identity import NodeId

MAX_KNOWN = 1024  # four views of the largest size with nobody in common


@dataclass
class Witnesses:
    """Whom this node was in a view with, and what those who never were have shown of theirs."""

    own: NodeId
    known: dict[NodeId, None] = field(default_factory=dict)  # the ones of the latest view last
    shown: dict[NodeId, View] = field(default_factory=dict)  # by nodes that are linked and not known

    def enter(self, view: View) -> None:
        """This node is in `view`."""
        for member in view.members:
            if member != self.own:
                self.known.pop(member, None)
                self.known[member] = None
                self.shown.pop(member, None)
        for member in list(self.known)[: max(0, len(self.known) - MAX_KNOWN)]:
            del self.known[member]

    def knows(self, member: NodeId) -> bool:
        """Tell whether this node is to believe `member` by rule 1 or 2."""
        return member in self.known or not self.known

    def convinced(self, member: NodeId, view: View) -> bool:
        """Take in that `member` is in `view`, as it says itself. Returns whether that view is to be believed in."""
        if self.knows(member):
            return True
        self.shown[member] = view
        return 2 * sum(self.shown.get(name) == view for name in view.members) > len(view.members)

    def unlinked(self, member: NodeId) -> None:
        """Its link closed: what it says next time, it has to say again."""
        self.shown.pop(member, None)
