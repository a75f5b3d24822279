"""Whom this member can work with: links, silence, and what the others say about that.

A member of the view is *missing* in one of three cases. Nothing was heard of it for `GroupTiming.silence`. Its link
closed and did not come back within the grace. Or it is *gone*: it said goodbye, it speaks from a later view without
this node, or it was started anew and remembers nothing.

The view must change when somebody is missing here or elsewhere, when a link that operations go
over broke (what was on it is lost), or when somebody stays in another view for a timeout.
"""

from dataclasses import dataclass, field

from collectives.agreement.messages import Beat
from collectives.agreement.views import View
from collectives.types import GroupTiming
from protocol.identity import NodeId


@dataclass
class FailureDetector:
    """What is known of every node with which there is or should be a link."""

    own: NodeId
    timing: GroupTiming
    linked: dict[NodeId, str] = field(default_factory=dict)  # to the address it says it can be dialled at
    heard: dict[NodeId, float] = field(default_factory=dict)
    cut: dict[NodeId, float] = field(default_factory=dict)  # members of the view without a link, and since when
    gone: set[NodeId] = field(default_factory=set)
    outside: set[NodeId] = field(default_factory=set)  # linked nodes that last said that they are in no view
    torn: set[NodeId] = field(default_factory=set)  # links that closed in this view
    astray: dict[NodeId, float] = field(default_factory=dict)  # members that speak from another view, and since when
    complaints: dict[NodeId, frozenset[NodeId]] = field(default_factory=dict)  # whom each member misses
    called: dict[NodeId, float] = field(default_factory=dict)  # when each member's last known call was made
    last: float = 0.0  # when anything was handled

    def wake(self, now: float) -> None:
        """Note that this process runs. Where it did not for long, others' silence is its own doing."""
        lapse = now - self.last
        if lapse > self.timing.timeout / 2:
            for times in (self.heard, self.cut, self.astray):
                for member in times:
                    times[member] += lapse
        self.last = now

    def enter(self, view: View, now: float) -> None:
        """Begin with a new view: everybody in it has a timeout to be heard."""
        others = [member for member in view.members if member != self.own]
        late = now + self.timing.timeout - self.timing.grace
        self.heard = {member: at for member, at in self.heard.items() if member in self.linked}
        self.heard.update(dict.fromkeys(others, now))
        self.cut = {member: late for member in others if member not in self.linked}
        self.gone, self.torn, self.astray, self.complaints = set(), set(), {}, {}
        self.called = {}

    def link(self, member: NodeId, address: str, now: float) -> None:
        """A link came up."""
        self.linked[member] = address
        self.heard[member] = now
        self.cut.pop(member, None)

    def unlink(self, member: NodeId, view: View | None, now: float) -> None:
        """A link closed."""
        self.linked.pop(member, None)
        self.outside.discard(member)
        if view is None or member not in view.ids:
            self.heard.pop(member, None)
            return
        self.cut.setdefault(member, now)
        if view.coordinator in (self.own, member):
            self.torn.add(member)

    def beat(self, member: NodeId, beat: Beat, view: View, now: float) -> None:
        """Take in what a member of the view says of itself and of others."""
        self.complaints[member] = view.ids.intersection(beat.missing) - {self.own, member}
        if beat.mark == view.mark:
            self.astray.pop(member, None)
        else:
            self.astray.setdefault(member, now)

    def missing(self, view: View, now: float) -> frozenset[NodeId]:
        """Return the members of `view` that this one cannot work with."""
        return frozenset(
            member
            for member in view.members
            if member != self.own
            and (
                member in self.gone
                or now - self.heard.get(member, now) > self.timing.silence
                or now - self.cut.get(member, now) >= self.timing.grace
            )
        )

    def disturbed(self, view: View, missing: frozenset[NodeId], now: float) -> bool:
        """Tell whether the view must change."""
        return bool(
            missing
            or any(member in self.linked for member in self.torn)
            or any(now - since > self.timing.timeout for since in self.astray.values())
            or any(self.complaints.get(member) for member in view.members)
        )
