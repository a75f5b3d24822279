"""Calls as their callers see them, over a control thread that answers when the test says."""

import threading
import time
from types import SimpleNamespace

import pytest

from collectives import Aborted, Communicator, CommunicatorClosed, DeadlineExceeded, Evicted, InDoubt
from collectives.agreement.events import CallVerdict, Finished, Install
from collectives.agreement.views import Member, OpId, View
from collectives.calls import MAX_IN_FLIGHT, HandlesInFlight, PendingCall, error_of, finish_call
from collectives.driver import GroupDriver, Status
from collectives.errors import BadArgument
from collectives.mesh.data_plane import DataPlane
from collectives.types import GroupTiming
from protocol.identity import Identity, NodeId

QUICK = GroupTiming(heartbeat=0.01, timeout=0.05)


class Answering:
    """A control thread that ends each call with `verdict`, as long after its deadline as the core may take."""

    def __init__(self, verdict: CallVerdict) -> None:
        self.timing = QUICK
        self.exchange = None
        self.status = Status()
        self.changed = threading.Condition()
        self.verdict = verdict

    def begin(self, begin):
        call = PendingCall(begin.tag, time.monotonic() + begin.deadline)
        late = begin.deadline + self.timing.settling + self.timing.heartbeat
        finished = Finished(OpId(b"the mark", 1, begin.tag, 0), self.verdict)
        threading.Timer(late, call.finish, [finished]).start()
        return call

    def stop(self, goodbye):
        pass


def test_admit_waits_for_its_verdict_as_long_as_the_core_may_take():
    comm = Communicator(Answering(CallVerdict.DOUBT), Identity.generate(), "tcp://127.0.0.1:1")
    with pytest.raises(InDoubt, match="what became of this call is unknown"):
        comm.admit(timeout=0.05)


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (CallVerdict.ABORT, Aborted),
        (CallVerdict.DEADLINE, DeadlineExceeded),
        (CallVerdict.DOUBT, InDoubt),
        (CallVerdict.EVICTED, Evicted),
        (CallVerdict.CLOSED, CommunicatorClosed),
    ],
)
def test_each_verdict_has_an_error_of_its_own(verdict, kind):
    assert type(error_of(Finished(OpId(b"the mark", 1, 0, 0), verdict))) is kind


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e12])
@pytest.mark.parametrize(
    "call",
    [
        lambda comm, timeout: comm.barrier(timeout),
        lambda comm, timeout: comm.admit(timeout),
        lambda comm, timeout: comm.wait_for(1, timeout),
        lambda comm, timeout: comm.run(lambda _: None, timeout=timeout),
        lambda _, timeout: Communicator.connect("test", timeout=timeout),
    ],
)
def test_a_time_that_no_wait_can_be_given_is_refused_before_anything_is_sent(call, timeout):
    answering = Answering(CallVerdict.DOUBT)
    answering.begin = pytest.fail
    comm = Communicator(answering, Identity.generate(), "tcp://127.0.0.1:1")
    with pytest.raises(BadArgument, match="timeout = "):
        call(comm, timeout)


def test_waiting_for_members_ends_in_time_though_somebody_waits_whom_the_others_do_not_admit():
    looks = []

    def look(reached, timeout):
        looks.append(timeout)
        assert len(looks) < 100, "it looks again and again, and its time is up"
        return reached(answering.status)

    answering = Answering(CallVerdict.DEADLINE)
    answering.status, answering.wait_changed = Status(pending=True), look
    comm = Communicator(answering, Identity.generate(), "tcp://127.0.0.1:1")
    with pytest.raises(DeadlineExceeded, match="0 of 3 members"):
        comm.wait_for(3, timeout=0.05)


def test_what_is_sent_to_a_member_of_a_new_view_waits_for_its_link():
    own, other = NodeId("a"), NodeId("b")
    view = View.of(b"group", 1, b"the mark", [Member(member, "", bytes(8)) for member in (own, other)])
    plane, mesh = DataPlane(own), SimpleNamespace(wake=lambda: None, linked=frozenset(), enter=lambda _: None)
    driver = GroupDriver(SimpleNamespace(own=own), mesh, plane, QUICK, None)
    driver._act(Install(view))
    port = plane.open(OpId(b"the mark", 1, 0, 0), view.ids, time.monotonic() + 60)
    port.send(other, 0, memoryview(b"x"))
    assert not port.inbox.lost_members


def test_operations_that_could_not_begin_are_not_in_flight():
    in_flight = HandlesInFlight()
    for _ in range(MAX_IN_FLIGHT + 1):
        with pytest.raises(ZeroDivisionError):
            in_flight.start(lambda: 1 / 0, timeout=0.0)


def test_ctrl_c_in_a_call_that_waits_tells_the_core_that_nobody_waits_any_more(monkeypatch):
    told = []
    runner = SimpleNamespace(give_up=lambda call: told.append(call.tag))

    def interrupted(_):
        raise KeyboardInterrupt

    call = PendingCall(7, time.monotonic() + 30)
    monkeypatch.setattr(call, "wait_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish_call(runner, call, 6.0, lambda start, port: None)
    assert told == [7]
