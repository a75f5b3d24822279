"""A stranger that knows an open group's name completes the handshake and does its worst: members hardly notice.

What an attack costs is measured in the members' processor time, in a second in which they do nothing else: what is
left of a core is the rate that they keep. A busy machine makes that more, never less.
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
OPERATIONS = 3
WINDOW_S = 2.0
KEPT = 0.8  # of a core, at each member
MAX_MORE_BYTES = 128 << 20


@pytest.fixture(scope="module")
def members():
    with group(3) as comms:
        measure(comms)  # what the first takes is not counted
        yield comms


@contextmanager
def under(kind, members):
    addresses = [comm.address for comm in members]
    command = [sys.executable, "-m", "tests.fakes.collectives_stranger", kind, *addresses]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        try:
            assert stranger.stdout.readline() == "at it\n"
            yield
        finally:
            stranger.kill()


def measure(members):
    """Return the processor time of an operation, of all members together; its result is checked."""
    inputs = [torch.full((ELEMENTS,), float(i + 1)) for i in range(len(members))]
    outs = [torch.empty(ELEMENTS) for _ in members]
    began = time.process_time()
    for _ in range(OPERATIONS):
        results = together(
            *(
                lambda c=c, x=x, out=out: c.all_reduce(x, op=Op.SUM, out=out)
                for c, x, out in zip(members, inputs, outs, strict=True)
            )
        )
        assert [result.contributors for result in results] == [members[0].members] * len(members)
    spent = time.process_time() - began
    assert all((out == 6).all() for out in outs)
    return spent / OPERATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_worst_costs_members_no_result_and_little_of_their_rate(members, kind):
    epoch, threads, memory = members[0].epoch, threading.active_count(), resident()
    before = measure(members)
    with under(kind, members):
        during = measure(members)
        assert threading.active_count() <= threads + len(members)  # of the calls that were under way
        began, spent = time.monotonic(), time.process_time()
        threading.Event().wait(WINDOW_S)
        taken = (time.process_time() - spent) / (time.monotonic() - began) / len(members)
        more = resident() - memory
        measure(members)
    print(f"{kind}: {taken:.1%} of a core for each; {before:.3f}, {during:.3f} s an operation; {more >> 20} MiB more")
    assert taken <= 1 - KEPT
    assert {comm.epoch for comm in members} == {epoch}
    assert more < MAX_MORE_BYTES


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("kind", ["idle", "keys"])
def test_one_more_member_comes_in_while_strangers_of_another_network_take_all_slots_that_they_get(kind):
    with group(2) as comms, under(kind, comms):
        comms.append(join(comms))
        assert {comm.world_size for comm in comms} == {3}
