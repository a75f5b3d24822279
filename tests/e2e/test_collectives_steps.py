"""`Communicator.run` and `wait_for` over real sockets: members that take steps together, whatever happens between."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from collectives import Communicator, DeadlineExceeded, Mismatch, Op, SharedState
from collectives.agreement.events import Begin
from collectives.errors import BadArgument
from collectives.types import LAN
from tests.groups import group, together
from tests.waiting import wait_until

LIMIT_S = 30.0


def summed(comm, value=1.0, count=3):
    """A step of one reduction."""
    return comm.all_reduce(np.full(count, value), op=Op.SUM).value


def test_members_that_wait_for_each_other_find_each_other():
    comms = [Communicator.connect("test")]

    def come():
        comm = Communicator.connect("test", seeds=[comms[0].address])
        comms.append(comm)
        comm.wait_for(4)

    try:
        assert together(lambda: comms[0].wait_for(4), come, come, come) == [None] * 4
        assert {comm.world_size for comm in comms} == {4}
        results = together(*(lambda c=c: c.run(summed) for c in comms))
        assert {(result.number, result.members) for result in results} == {(1, comms[0].members)}
        assert [result.value.tolist() for result in results] == [[4.0] * 3] * 4
    finally:
        for comm in comms:
            comm.leave()


def test_a_founder_that_should_have_joined_is_told_so():
    with Communicator.connect("test") as lonely:
        with pytest.raises(DeadlineExceeded, match=r"1 of 2 members.*without seeds it founded a group of its own"):
            lonely.wait_for(2, timeout=0.2)
        lonely.wait_for(1)
        with pytest.raises(BadArgument):
            lonely.wait_for(1000)


def summed_by_handles(comm):
    """The same, several in flight, of which the last are left alone if the first fails."""
    handles = [comm.all_reduce_async(np.ones(3), op=Op.SUM, tag=tag) for tag in (4, 5, 6)]
    return [handle.wait() for handle in handles][-1].value


@pytest.mark.parametrize("reduction", [summed, summed_by_handles])
def test_a_step_in_which_one_member_loses_a_call_is_taken_again_by_all(reduction):
    with group(3) as comms:
        began = time.monotonic()
        failed = threading.Event()

        def step(comm):
            comm.barrier()
            if comm is comms[0] and not failed.is_set():
                failed.set()
                comm.all_reduce(np.ones(1), tag=7, timeout=0.05)  # the others wait in the one below
            return reduction(comm)

        for number in (1, 2):
            results = together(*(lambda c=c: c.run(step) for c in comms))
            assert [(result.number, result.value.tolist()) for result in results] == [(number, [3.0] * 3)] * 3
            assert [result.attempts for result in results] == [3 - number] * 3
        assert time.monotonic() - began < LIMIT_S / 2  # nobody waited until a call's deadline


def test_a_step_that_takes_longer_than_its_time_out_is_told_so_and_the_next_one_counts(monkeypatch):
    passed = [0.0]
    monkeypatch.setattr(
        "collectives.step_runner.time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed))
    )
    with group(1) as (comm,):
        with pytest.raises(DeadlineExceeded, match="came to its end after its time-out of 30 s: allow more"):
            comm.run(lambda _: passed.append(100.0), timeout=LIMIT_S)
        assert comm.run(summed).number == 1


def test_one_that_hangs_in_a_step_costs_the_others_half_of_a_calls_time_and_comes_back_in_step():
    with group(3, timing=replace(LAN, hang=1.0)) as comms:
        hung, goes_on = comms[2], threading.Event()

        def step(comm):
            if comm is hung:
                goes_on.wait(LIMIT_S)
            return comm.all_reduce(np.ones(3), op=Op.SUM, timeout=8.0).value

        def take_steps(comm):
            began = time.monotonic()
            done = comm.run(step)
            took = time.monotonic() - began
            goes_on.set()
            assert (done.number, len(done.members), done.attempts) == (1, 2, 1)
            assert took < 8.0
            while len(done.members) < 3:
                done = comm.run(step)
            return done

        results = together(*(lambda c=c: take_steps(c) for c in comms[:2]), lambda: hung.run(step))
        assert [result.value.tolist() for result in results] == [[3.0] * 3] * 3
        assert len({result.number for result in results}) == 1
        assert [result.joined for result in results] == [False, False, True]


@pytest.mark.parametrize(("timeout", "lag"), [(2.0, 15.0), (30.0, 15.0), (300.0, 150.0)])
def test_how_late_others_may_be_for_the_calls_of_a_step_follows_from_their_time_outs(timeout, lag):
    begun = []
    with group(1, observer=lambda what: begun.append(what) if isinstance(what, Begin) else None) as (comm,):
        comm.run(lambda comm: comm.all_reduce(np.ones(3), timeout=timeout))
        comm.run(lambda comm: comm.all_reduce(np.ones(3), timeout=timeout))
        comm.all_reduce(np.ones(3), timeout=timeout)
    assert [(begin.kind, begin.lag) for begin in begun] == [
        ("rendezvous", 60.0),  # no call has said it yet: half of the fifth of a step's time that a rendezvous has
        *[("all_reduce", lag), ("step", min(lag, 60.0))] * 2,
        ("all_reduce", 0.0),
    ]


def test_one_that_raises_comes_back_in_step():
    with group(2) as comms:

        def odd(comm):
            if comm is comms[1]:
                raise RuntimeError("a bug of one's own")
            return summed(comm)

        def other():
            try:
                comms[1].run(odd)
            except RuntimeError:
                return comms[1].run(summed)

        began = time.monotonic()
        results = together(lambda: comms[0].run(odd), other)
        assert [(result.number, result.value.tolist()) for result in results] == [(1, [2.0] * 3)] * 2
        assert time.monotonic() - began < LIMIT_S / 2


def test_a_newcomer_is_let_in_between_steps_and_given_the_state():
    comms, states, numbers = [Communicator.connect("test")], {}, {}

    def train(comm, until):
        state = states[comm] = SharedState({"w": np.full(5, float(len(states)))})
        for _ in range(1000):
            done = comm.run(lambda comm: summed(comm, count=5), state)
            state.tensors["w"] += done.value
            numbers.setdefault(comm, []).append(done.number)
            if done.number >= until and len(done.members) == 2:
                return

    def come():
        wait_until(lambda: len(numbers.get(comms[0], [])) > 5, LIMIT_S)
        comms.append(Communicator.connect("test", seeds=[comms[0].address]))
        train(comms[1], 100)

    try:
        assert together(lambda: train(comms[0], 100), come) == [None, None]
        first, second = (numbers[comm] for comm in comms)
        assert first == [*range(1, first[-1] + 1)] and second == [*range(second[0], first[-1] + 1)] and second[0] > 5
        assert (states[comms[0]].tensors["w"] == states[comms[1]].tensors["w"]).all()
        assert states[comms[0]].revision == states[comms[1]].revision == first[-1]
    finally:
        for comm in comms:
            comm.leave()


def test_different_steps_are_told_apart():
    with group(2) as comms:
        results = together(
            lambda: comms[0].run(lambda c: summed(c, count=2)), lambda: comms[1].run(lambda c: summed(c, count=3))
        )
        assert [type(result) for result in results] == [Mismatch, Mismatch]
        results = together(lambda: comms[0].run(summed), lambda: comms[1].run(summed, SharedState({})))
        assert [type(result) for result in results] == [Mismatch, Mismatch]
        assert [result.number for result in together(*(lambda c=c: c.run(summed) for c in comms))] == [1, 1]
