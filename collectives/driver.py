"""The one control thread of a member: it owns the mesh and the agreement core, and turns one into the other.

    sockets --> Mesh --> events --+                     +--> Send, Dial, Drop --> Mesh
    callers --> mailbox ----------+--> Agreement.handle +--> Perform, Finished --> the caller's `PendingCall`
    clock   --> Tick -------------+                     +--> Install, OutOfGroup --> `status`

Everybody else reads `status`, which is replaced whole, and leaves things in the mailbox. The thread
never runs a caller's code and never waits for one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace

from collectives.agreement.agreement import Agreement
from collectives.agreement.events import (
    Action,
    Begin,
    CallVerdict,
    Dial,
    Drop,
    Event,
    Finished,
    GiveUp,
    Heard,
    Install,
    Leave,
    Linked,
    OutOfGroup,
    Perform,
    Performed,
    Send,
    Tick,
    Unlinked,
)
from collectives.agreement.message_codec import decode, encode
from collectives.agreement.views import View
from collectives.calls import PendingCall
from collectives.errors import BadArgument, CollectiveError, CommunicatorClosed, DeadlineExceeded
from collectives.logs import Log
from collectives.mesh import mesh as links
from collectives.mesh.addresses import Address, BadAddress
from collectives.mesh.data_plane import DataPlane
from collectives.types import GroupTiming, Health
from protocol.errors import PeerError
from protocol.identity import NodeId

log = Log()

Observer = Callable[[Event | Action], None]  # told of everything on the control thread; it must be quick
TICKS_A_BEAT = 4  # the core asks for two
HAS_LEFT = "this member has left the group: connect again"
JOIN_S = 10.0  # longer than the thread waits for the streams'


@dataclass(frozen=True, slots=True)
class Status:
    """Where this member stands, as its owner may see it. `view` is None outside of the group."""

    view: View | None = None
    pending: bool = False
    outside: str = ""  # why it was left out
    closed: bool = False
    stay: int = 0  # how often it has come into the group
    unreached: tuple[NodeId, ...] = ()  # outside: members that there is no link with

    @property
    def size(self) -> int:
        """How many members there are, as far as this one knows."""
        return len(self.view.members) if self.view is not None else 0


class GroupDriver:
    """Runs from `start` to `stop`. All but the constructor is thread-safe."""

    def __init__(
        self,
        agreement: Agreement,
        mesh: links.Mesh,
        exchange: DataPlane,
        timing: GroupTiming,
        observer: Observer | None,
    ) -> None:
        self.exchange = exchange
        self.timing = timing
        self.status = Status()
        self.changed = threading.Condition()  # notified when `status` is replaced
        self._agreement = agreement
        self._mesh = mesh
        self._observer = observer
        self._mailbox: deque[tuple[Event, PendingCall | None]] = deque()
        self._to_meet: deque[Address] = deque()
        self._calls: dict[int, PendingCall] = {}
        self._questions: deque[Future[dict[NodeId, Health]]] = deque()
        self._over: deque[tuple[PendingCall, Finished]] = deque()
        self._stopping = False
        self._next_tick = 0.0
        self._thread = threading.Thread(target=self._run, name="gossamer-control", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self, begin: Begin) -> PendingCall:
        """Hand a call to the core; everything that becomes of it is told to the `PendingCall`."""
        call = PendingCall(begin.tag, time.monotonic() + begin.deadline)
        self._post(begin, call)
        return call

    def done(self, event: Performed) -> None:
        """Tell the core how carrying out an operation went."""
        self._post(event, None)

    def give_up(self, call: PendingCall) -> None:
        """Tell the core that nobody waits for a call any more."""
        self._post(GiveUp(call.tag), None)

    def health(self, timeout: float) -> dict[NodeId, Health]:
        """Return when each other member last gave a sign. Raises `DeadlineExceeded`, `CommunicatorClosed`."""
        question: Future[dict[NodeId, Health]] = Future()
        self._questions.append(question)
        self._mesh.wake()
        if self.status.closed:
            raise CommunicatorClosed(HAS_LEFT)
        try:
            return question.result(timeout)
        except (TimeoutError, CancelledError):
            raise DeadlineExceeded(f"the control thread did not answer in {timeout:g} s") from None

    def meet(self, addresses: Iterable[Address]) -> None:
        """See to it that the nodes at these addresses are linked."""
        self._to_meet.extend(addresses)
        self._mesh.wake()

    def wait_inside(self, timeout: float) -> None:
        """Wait until the group has let this member in.

        Raises:
            DeadlineExceeded: nobody did; the message says what is known of the reason.
        """
        with self.changed:
            if self.changed.wait_for(lambda: self.status.view is not None, timeout):
                return
        linked = self.linked()
        if linked and self.status.unreached:
            raise DeadlineExceeded(
                f"no connection with {', '.join(self.status.unreached[:4])} in {timeout:g} s, in either direction: "
                "let this one dial all others, or all others dial it (listen=)"
            )
        if linked:
            raise DeadlineExceeded(f"{linked} members know of this one, but none called admit() in {timeout:g} s")
        refusals = ", ".join(f"{reason} ({count})" for reason, count in self.refused().items())
        raise DeadlineExceeded(
            f"no seed answered in {timeout:g} s: check the addresses, the group's name and secret, and `protection`"
            + (f"; connections ended with: {refusals}" if refusals else "")
        )

    def wait_changed(self, reached: Callable[[Status], bool], timeout: float) -> bool:
        """Wait until `reached` of the status, or until the member left; return whether it is so."""
        with self.changed:
            self.changed.wait_for(lambda: self.status.closed or reached(self.status), timeout)
        if self.status.closed:
            raise CommunicatorClosed(HAS_LEFT)
        return reached(self.status)

    def linked(self) -> int:
        """Return how many nodes of the group there is a link with."""
        return len(self._mesh.linked)

    def refused(self) -> dict[str, int]:
        """Return how often connections ended, by reason."""
        return dict(self._mesh.refused)

    def stop(self, goodbye: bool) -> None:
        """End the thread, every connection and every call; with `goodbye` the others are told first."""
        if goodbye and self._thread.is_alive():
            self._post(Leave(), None)
        self._stopping = True
        self._mesh.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    # --- the thread ----------------------------------------------------------------------------

    def _post(self, event: Event, call: PendingCall | None) -> None:
        self._mailbox.append((event, call))
        if self.status.closed and call is not None:  # nobody will read it
            call.fail(CommunicatorClosed(HAS_LEFT))
        self._mesh.wake()

    def _run(self) -> None:
        beat = self.timing.heartbeat / TICKS_A_BEAT
        try:
            while not self._stopping:
                for event in self._mesh.poll(max(0.0, self._next_tick - time.monotonic())):
                    self._take(event)
                self._read_mailbox()
                if time.monotonic() >= self._next_tick:
                    self._next_tick = time.monotonic() + beat
                    self._feed(Tick())
            self._read_mailbox()
        finally:
            self._close()

    def _close(self) -> None:
        self._mesh.close()
        self.exchange.close()
        self._publish(Status(closed=True))
        waiting: list[PendingCall | None] = [*self._calls.values()]
        while self._mailbox:  # others may still append: `_post` fails what comes after this
            waiting.append(self._mailbox.popleft()[1])
        for call in filter(None, waiting):
            call.fail(CommunicatorClosed(HAS_LEFT))

    def _examine(self) -> dict[NodeId, Health]:
        now = time.monotonic()
        return {
            member: Health(*(None if at is None else now - at for at in (*signs, self.exchange.moved(member))))
            for member, signs in self._agreement.last_signs().items()
        }

    def _read_mailbox(self) -> None:
        while self._questions:
            self._questions.popleft().set_result(self._examine())
        while self._to_meet:
            self._mesh.want(self._to_meet.popleft())
        while self._mailbox:
            event, call = self._mailbox.popleft()
            if call is not None and isinstance(event, Begin):
                if event.tag in self._calls:
                    remedy = f"tag {event.tag} is in use by a call that is not over: wait for it, or use another tag"
                    call.fail(BadArgument(remedy))
                    continue
                self._calls[event.tag] = call
            self._feed(event, call)

    def _take(self, event: links.MeshEvent) -> None:
        """Translate what the mesh says."""
        match event:
            case links.LinkMade(member, address):
                if self.status.view is not None and member in self.status.view.ids:
                    self.exchange.link(member)
                self._feed(Linked(member, address))
            case links.LinkLost(member):
                self.exchange.drop(member, f"the connection with member {member} is lost: call it again")
                self._feed(Unlinked(member))
            case links.FrameReceived(member, body):
                try:
                    message = decode(body)
                except PeerError:
                    return
                self._feed(Heard(member, message))

    def _feed(self, event: Event, call: PendingCall | None = None) -> None:
        """Handle one event. A defect that it runs into is logged; the thread goes on."""
        try:
            self._observe(event)
            for action in self._agreement.handle(event, time.monotonic()):
                self._observe(action)
                self._act(action)
            while self._over:  # told last, so that whoever wakes up sees the view that this led to
                over, finished = self._over.popleft()
                over.finish(finished)
        except BadArgument as error:  # of the owner's call, which changed nothing
            if call is not None and isinstance(event, Begin):
                self._calls.pop(event.tag, None)
                call.fail(error)
        except Exception as error:  # one item must not end the only control thread, whatever is wrong with us
            log.exception("internal error", event_type=type(event).__name__)
            if call is not None and isinstance(event, Begin):
                self._calls.pop(event.tag, None)
                call.fail(CollectiveError(f"internal error, which is a defect: {error}"))
        core = self._agreement
        now = replace(self.status, pending=core.pending, unreached=core.unreached)
        if now != self.status:
            self._publish(now)

    def _observe(self, what: Event | Action) -> None:
        if self._observer is not None:
            self._observer(what)

    def _act(self, action: Action) -> None:
        match action:
            case Send(member, message):
                self._mesh.send(member, encode(message))
            case Perform(op, _, view, _):
                call = self._calls[op.tag]
                call.start(action, self.exchange.open(op, view.ids, call.deadline))
            case Finished(op):
                call = self._calls.pop(op.tag)
                if call.port is not None:
                    late = action.verdict is CallVerdict.DEADLINE
                    self.exchange.close_port(call.port, action.reason or "the operation is over", late=late)
                else:
                    self.exchange.forget(op)
                self._over.append((call, action))
            case Install(view):
                self._leave_behind(view)
                stay = self.status.stay + (self.status.view is None)
                self._publish(replace(self.status, view=view, outside="", stay=stay))
            case OutOfGroup(reason):
                self._open_lanes(frozenset(), "this member was left out of the group: call it again")
                self.exchange.begin_view(reason)
                self._publish(replace(self.status, view=None, outside=reason))
            case Dial(member, address):
                self._dial(member, address)
            case Drop(member, reason):
                self._mesh.drop(member, reason)

    def _leave_behind(self, view: View) -> None:
        """Drop what came for the view before. A member that is out of it may be stopped: nothing waits in its
        streams.
        """
        before = self.status.view
        lost = sorted(before.ids - view.ids) if before is not None else []
        self._open_lanes(view.ids, "it was left out of the group")
        who = ", ".join(f"member {member}" for member in lost[:4])
        self.exchange.begin_view(f"the group changed: {who} failed" if lost else "the group changed")

    def _open_lanes(self, members: frozenset[NodeId], reason: str) -> None:
        """Let there be data streams with these and nobody else."""
        before = self.status.view
        for member in before.ids - members if before is not None else ():
            self.exchange.drop(member, f"member {member}: {reason}")
        for member in members - {self._agreement.own}:  # what is sent before there is a link waits for it
            self.exchange.link(member)
        self._mesh.enter(members)

    def _dial(self, member: NodeId | None, text: str) -> None:
        try:
            address = Address.parse(text)
        except BadAddress:
            return
        self._mesh.want(address if member is None else replace(address, member=member))

    def _publish(self, status: Status) -> None:
        with self.changed:
            self.status = status
            self.changed.notify_all()
