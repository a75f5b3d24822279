"""`python -m collectives.simulator.large_view`: one view change among as many members as a view may have, at its cost.

Every member is a whole agreement core that hears and says bytes. The processor time of decoding, handling and encoding
passes for that member in virtual time, as if it had a processor to itself, and what comes meanwhile waits. (The
records' encryption and the sockets are not in it.) Then one dies: do the time-outs hold?

Exit status 1: the others are not in one view without it, and nobody else was left out, in time.
"""

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from collectives.agreement.agreement import Agreement
from collectives.agreement.events import Action, Begin, Event, Heard, Install, Linked, Send, Tick, Unlinked
from collectives.agreement.fields import MAX_MEMBERS
from collectives.agreement.message_codec import decode, encode
from collectives.agreement.messages import Apply, Propose, Welcome
from collectives.agreement.views import Member, View
from collectives.simulator.network import SimulatedNetwork
from collectives.types import LAN, WAN, GroupTiming
from protocol.identity import NODE_ID_BYTES, NodeId, id_of_bytes

SETTLED_BEATS = 2  # heartbeats before the one dies, and again while their cost is measured
GROUP = b"the simulated group"


@dataclass
class BusyMember:
    """One member: `inbox` is what it has not come to yet, until `free_at`."""

    number: int
    core: Agreement
    inbox: deque[Any] = field(default_factory=deque)
    free_at: float = 0.0
    working: bool = False
    spent: float = 0.0  # of processor time (s)
    heard: int = 0  # bytes


@dataclass(frozen=True)
class MeasuredChange:
    """The outcome; times in seconds, of the proposer from its first Propose to the view that it entered."""

    views: frozenset[View | None]
    took: float  # from the death until all are in the next view
    proposer_took: float
    proposer_spent: float
    proposer_heard: int  # bytes
    steady: float  # the part of a processor that a member takes when nothing happens


class LargeView:
    """`members` in one view, each with `calls` operations outstanding and `slowness` times as slow as this machine."""

    def __init__(self, members: int, *, timing: GroupTiming = LAN, calls: int = 16, slowness: float = 1.0) -> None:
        self.timing = timing
        self.slowness = slowness
        self.network = SimulatedNetwork(Random("a large view"), 0.0, self._deliver, self._linked, self._unlinked)
        self.ids = tuple(sorted(id_of_bytes(number.to_bytes(NODE_ID_BYTES, "big")) for number in range(1, members + 1)))
        self.numbers = {member: number for number, member in enumerate(self.ids)}
        self.dead: int | None = None
        self.last_install = 0.0
        self.proposed: tuple[BusyMember, float, float, int] | None = None  # who, when, and what it had spent and heard
        self.entered: tuple[float, float, int] | None = None  # the same of its entry into the next view
        self.nodes = [
            BusyMember(
                number,
                Agreement(member, str(number), GROUP, Random(number), 0.0, seeds=["none"], timing=timing),
            )
            for number, member in enumerate(self.ids)
        ]
        self._enter_all(calls)

    def _enter_all(self, calls: int) -> None:
        """Let all be in one view, as if they had just been welcomed, and make their calls but for one member's."""
        sessions = {}
        for node in self.nodes:
            other = self.ids[node.number - 1]
            for action in node.core.handle(Linked(other), 0.0):
                if isinstance(action, Send) and isinstance(action.message, Apply):
                    sessions[node.number] = action.message.session
            node.core.handle(Unlinked(other), 0.0)
        roster = [Member(member, str(number), sessions[number]) for member, number in self.numbers.items()]
        view = View.of(GROUP, 2, b"the mark", roster)
        for node in self.nodes:
            for lesser in range(node.number):
                self.network.connect(lesser, node.number)
            welcome = Heard(self.ids[node.number - 1], Welcome(sessions[node.number], view))
            self._carry_out(node, node.core.handle(welcome, 0.0))
        self.network.run(0.1)
        for node in self.nodes[:-1]:
            for tag in range(calls):
                self._take(node, Begin(tag, "reduce", 60.0, (("count", 1),)))
        phase = Random("phases")
        for node in self.nodes:
            self.network.at(self.network.now + phase.uniform(0.0, self.timing.heartbeat / 2), self._tick, node)

    def change(self, dies: int, *, silently: bool) -> MeasuredChange:
        """Let one die, and the others find out; `silently`, as when its machine loses power."""
        network = self.network
        settled = SETTLED_BEATS * self.timing.heartbeat
        network.run(network.now + settled)
        spent = sum(node.spent for node in self.nodes)
        network.run(network.now + settled)
        steady = (sum(node.spent for node in self.nodes) - spent) / settled / len(self.nodes)
        self.dead, died = dies, network.now
        network.vanish(dies, range(len(self.nodes)), silently=silently)
        live = [node for node in self.nodes if node.number != dies]
        limit = died + self.timing.settling
        while network.now < limit and any(node.core.view is None or node.core.view.epoch == 2 for node in live):
            network.run(network.now + self.timing.heartbeat / 4)
        network.run(network.now + self.timing.heartbeat)  # and none is left out afterwards
        views = frozenset(node.core.view for node in live)
        if self.proposed is None or self.entered is None:
            return MeasuredChange(views, network.now - died, 0.0, 0.0, 0, steady)
        _, *before = self.proposed
        at, cost, heard = (after - first for after, first in zip(self.entered, before, strict=True))
        return MeasuredChange(views, self.last_install - died, at, cost, int(heard), steady)

    # --- what a member takes its time for ---

    def _take(self, node: BusyMember, what: Event | tuple[NodeId, bytes]) -> None:
        if node.number == self.dead:
            return
        node.inbox.append(what)
        if not node.working:
            node.working = True
            self.network.at(max(self.network.now, node.free_at), self._work, node)

    def _work(self, node: BusyMember) -> None:
        network = self.network
        while node.inbox and node.number != self.dead:
            what = node.inbox.popleft()
            began = time.thread_time()
            event = Heard(what[0], decode(what[1])) if isinstance(what, tuple) else what
            actions = node.core.handle(event, network.now)
            said = [
                (self.numbers[action.member], encode(action.message)) for action in actions if isinstance(action, Send)
            ]
            cost = self.slowness * (time.thread_time() - began)
            node.spent += cost
            node.free_at = max(network.now, node.free_at) + cost
            node.heard += len(what[1]) if isinstance(what, tuple) else 0
            for action in actions:
                self._note(node, action)
            for to, data in said:
                network.at(node.free_at, network.send, node.number, to, data)
            if node.inbox and node.free_at > network.now:
                network.at(node.free_at, self._work, node)
                return
        node.working = False

    def _note(self, node: BusyMember, action: Action) -> None:
        match action:
            case Send(_, Propose()) if self.proposed is None:
                self.proposed = (node, node.free_at, node.spent, node.heard)
            case Install():
                self.last_install = node.free_at
                if self.proposed is not None and self.proposed[0] is node:
                    self.entered = (node.free_at, node.spent, node.heard)

    def _carry_out(self, node: BusyMember, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.network.send(node.number, self.numbers[action.member], encode(action.message))

    def _tick(self, node: BusyMember) -> None:
        if node.number != self.dead:
            self._take(node, Tick())
            self.network.at(self.network.now + self.timing.heartbeat / 2, self._tick, node)

    def _deliver(self, source: int, to: int, data: bytes) -> None:
        self._take(self.nodes[to], (self.ids[source], data))

    def _linked(self, end: int, far: int) -> None:
        self._take(self.nodes[end], Linked(self.ids[far], str(far)))

    def _unlinked(self, end: int, far: int) -> None:
        self._take(self.nodes[end], Unlinked(self.ids[far]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collectives.simulator.large_view",
        description="Let one of many members die, and see what the view change costs the others.",
        epilog="example: python -m collectives.simulator.large_view --members 256",
    )
    parser.add_argument("--members", type=int, default=MAX_MEMBERS, help=f"how many, 3 to {MAX_MEMBERS} (the default)")
    parser.add_argument("--calls", type=int, default=16, help="operations that each has called and that wait (16)")
    parser.add_argument("--timing", choices=["lan", "wan"], default="lan", help="which time-outs (lan)")
    parser.add_argument("--slowness", type=float, default=1.0, help="how many times as slow as this machine (1)")
    parser.add_argument("--silently", action="store_true", help="as at a power failure: its links do not close")
    options = parser.parse_args(arguments)
    if not 3 <= options.members <= MAX_MEMBERS or not 0 <= options.calls <= MAX_MEMBERS:
        parser.error(f"--members takes 3 to {MAX_MEMBERS}, --calls 0 to {MAX_MEMBERS}")
    timing = LAN if options.timing == "lan" else WAN
    group = LargeView(options.members, timing=timing, calls=options.calls, slowness=options.slowness)
    change = group.change(0, silently=options.silently)  # the coordinator
    whole = [view for view in change.views if view is not None and len(view.members) == options.members - 1]
    print(f"{options.members} members, {options.calls} calls outstanding; each uses {change.steady:.1%} of a processor")
    print(f"in one view without the dead one after {change.took:.2f} s (time-out {timing.timeout:g} s)")
    print(
        f"its proposer: {change.proposer_took:.2f} s from Propose to the next view, {change.proposer_spent:.2f} s of "
        f"processor time, {change.proposer_heard / 1e6:.1f} MB of messages"
    )
    if len(change.views) != 1 or not whole:
        print(f"not in one view: {sorted(len(view.members) if view else 0 for view in change.views)} members")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
