"""A stranger that has no secret does its worst: members hardly notice.

A member whose operations have a core keeps as much of their rate as an attack leaves of that core. So what it takes
is measured in processor time for each second, twice: of the whole process while the members do nothing else, and of
the control threads, which are all that hears strangers, while the members operate. (Processor time for each operation
alone, over that under attack, is the same on a quiet machine only: where others take half of the core, an operation
lasts twice as long, and so does the attack that is counted to it.)
"""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch

from collectives import Op
from tests.fakes.collectives_stranger import KINDS
from tests.groups import group, join, together

pytestmark = pytest.mark.slow  # what it costs the members is told from what else the machine does

ELEMENTS = 4 << 20
WINDOW_S = 1.0
KEPT = 0.8  # of the rate of operations, at each member
MAX_MORE_BYTES = 256 << 20  # with what operations leave: beside a load 96 MiB were seen
SECRET = "of the tests, and long enough"


@pytest.fixture(scope="module")
def members():
    with group(3, secret=SECRET) as comms:
        operate(comms)  # what the first takes is not counted
        yield comms


@contextmanager
def under(kind, members):
    addresses = [comm.address for comm in members]
    command = [sys.executable, "-m", "tests.fakes.collectives_stranger", kind, *addresses]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        try:
            assert stranger.stdout.readline() == "at it\n"
            yield
            assert stranger.poll() is None, "the stranger gave up"
        finally:
            stranger.kill()


def control_time():
    """Return the processor time that the members' control threads have taken (s)."""
    threads = [thread for thread in threading.enumerate() if thread.name == "gossamer-control"]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in threads)


def taken(clock, members, meanwhile):
    """Return how much of a core each member took by `clock`, while the rest went on."""
    began, spent = time.monotonic(), clock()
    meanwhile()
    return (clock() - spent) / (time.monotonic() - began) / len(members)


def operate(members):
    """Reduce together for WINDOW_S, and check every result."""
    inputs = [torch.full((ELEMENTS,), float(i + 1)) for i in range(len(members))]
    outs = [torch.empty(ELEMENTS) for _ in members]
    until = time.monotonic() + WINDOW_S
    while time.monotonic() < until:
        results = together(
            *(
                lambda c=c, x=x, out=out: c.all_reduce(x, op=Op.SUM, out=out)
                for c, x, out in zip(members, inputs, outs, strict=True)
            )
        )
        assert [result.contributors for result in results] == [members[0].members] * len(members)
        assert all((out == 6).all() for out in outs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_worst_costs_members_no_result_and_little_of_their_rate(members, kind):
    epoch, threads, memory = members[0].epoch, threading.active_count(), resident()
    alone = taken(control_time, members, lambda: operate(members))
    with under(kind, members):
        busy = taken(control_time, members, lambda: operate(members))
        assert threading.active_count() <= threads + len(members)  # of the calls that were under way
        idle = taken(time.process_time, members, lambda: threading.Event().wait(WINDOW_S))
        more = resident() - memory
    print(f"{kind}: {idle:.1%} of a core for each; operating {busy - alone:.1%} besides {alone:.1%}; {more >> 20} MiB")
    assert 1 - max(idle, busy - alone) >= KEPT
    assert {comm.epoch for comm in members} == {epoch}
    assert more < MAX_MORE_BYTES


def resident():
    return psutil.Process().memory_info().rss


def test_one_more_member_comes_in_while_strangers_of_another_network_take_all_slots_that_they_get():
    with group(2, secret=SECRET) as comms, under("idle", comms):
        comms.append(join(comms, secret=SECRET))
        assert {comm.world_size for comm in comms} == {3}
