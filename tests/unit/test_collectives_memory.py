"""Arenas, bays and leases: who may write, when memory is used again, and what is refused."""

import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from collectives.mesh import shared_memory
from collectives.mesh.shared_memory import ARENA_BYTES, SEALS, Arena, MemoryOffer, SharedMemory, is_possible
from protocol.identity import NodeId

pytestmark = pytest.mark.skipif(not is_possible(), reason="Linux on x86-64")
A, B = NodeId("a" * 32), NodeId("b" * 32)


@pytest.fixture
def two():
    """Two members that hold each other's arenas."""
    memories = {member: SharedMemory(member) for member in (A, B)}
    for member, memory in memories.items():
        for other in memories.keys() - {member}:
            memories[other].hold(member, Arena.of(memory.own_arena().descriptor, memory.own_arena().serial))
    return memories


def lease_of(memories):
    """Begin an operation of both: return their leases, and the bays as each finds them."""
    leases = {member: memory.lease((A, B)) for member, memory in memories.items()}
    offers = {member: MemoryOffer.decode(lease.offer.encode()) for member, lease in leases.items()}
    return leases, {member: lease.bays(offers) for member, lease in leases.items()}


def test_what_one_member_writes_others_read_and_cannot_write(two):
    _, bays = lease_of(two)
    bays[A][A].data[:3] = 1, 2, 3
    assert bays[B][A].data[:3].tolist() == [1, 2, 3]
    with pytest.raises(PermissionError):
        mmap.mmap(two[A].own_arena().descriptor, ARENA_BYTES)
    for change in (lambda fd: os.ftruncate(fd, 0), lambda fd: os.ftruncate(fd, 2 * ARENA_BYTES)):
        with pytest.raises(PermissionError):
            change(two[A].own_arena().descriptor)


def test_a_counter_wakes_those_who_wait_for_it(two):
    _, bays = lease_of(two)
    woken = threading.Event()
    waiting = threading.Thread(target=lambda: (bays[B][A].given.wait(0, 60.0), woken.set()), daemon=True)
    waiting.start()
    while not woken.is_set():  # it may not wait yet
        bays[A][A].given.write(7)
    assert bays[B][A].given.read() == 7


def test_a_bay_is_used_again_once_all_have_finished(two):
    leases, bays = lease_of(two)
    leases[A].end()
    second, _ = lease_of({A: two[A]})
    assert second[A].offer.bay != leases[A].offer.bay, "the other member may still read"
    second[A].end()
    leases[B].end()
    third, _ = lease_of({A: two[A]})
    assert (third[A].offer.bay, third[A].offer.use) == (leases[A].offer.bay, leases[A].offer.use + 1)
    assert bays[B][A].given.read() == 0, "a counter of the use before would be believed"


def test_more_operations_than_bays_have_none(two):
    leases = [two[A].lease((A, B)) for _ in range(shared_memory.BAYS + 1)]
    assert [lease.bay is not None for lease in leases] == [True] * shared_memory.BAYS + [False]
    assert leases[-1].bays({A: leases[-1].offer, B: two[B].lease((A, B)).offer}) is None


def test_members_that_do_not_hold_the_same_arenas_share_none(two):
    two[A].give_up()
    two[A].own_arena()
    _, bays = lease_of(two)
    assert bays == {A: None, B: None}


def test_what_was_read_before_an_arena_was_given_up_stays(two):
    _, bays = lease_of(two)
    bays[A][A].data[:2] = 5, 6
    two[A].give_up()
    two[B].hold(A, Arena.of(two[A].own_arena().descriptor, two[A].own_arena().serial))
    two[A].hold(B, Arena.of(two[B].own_arena().descriptor, two[B].own_arena().serial))
    _, later = lease_of(two)
    later[A][A].data[:2] = 8, 9
    assert later[B][A].data[:2].tolist() == [8, 9]
    assert bays[B][A].data[:2].tolist() == [5, 6], "a member that was stopped reads what it would have read"


def descriptor_of(size, seals):
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: descriptor_of(ARENA_BYTES, 0), id="not sealed"),
        pytest.param(lambda: descriptor_of(ARENA_BYTES, SEALS & ~fcntl.F_SEAL_SHRINK), id="can be made shorter"),
        pytest.param(lambda: descriptor_of(ARENA_BYTES - 4096, SEALS), id="shorter"),
        pytest.param(lambda: descriptor_of(2 * ARENA_BYTES, SEALS), id="longer"),
        pytest.param(lambda: os.open("/dev/zero", os.O_RDWR), id="a device"),
        pytest.param(lambda: os.open(__file__, os.O_RDONLY), id="a file"),
    ],
)
def test_a_descriptor_that_could_change_under_its_reader_is_refused(make):
    descriptor = make()
    try:
        with pytest.raises(OSError):  # whichever: all of them are caught
            Arena.of(descriptor, bytes(8))
    finally:
        os.close(descriptor)


def test_an_arena_leaves_no_descriptor_and_no_mapping():
    def left():
        return len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/maps").read_text().count("gossamer-arena")

    before = left()
    arena = Arena.make()
    theirs = Arena.of(arena.descriptor, arena.serial)
    view = theirs.bays[1].data[:4]
    assert left()[1] == before[1] + 2
    del arena, theirs
    assert left()[1] == before[1] + 1, "somebody still has values of it"
    assert np.array_equal(view, [0, 0, 0, 0])
    del view
    assert left() == before
