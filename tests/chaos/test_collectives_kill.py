"""A member or the coordinator dies, or is stopped, in every state of an operation: the others go on, and rightly.

What each member contributes follows from its id and the step, so every committed result is compared
with the exact sum of its `contributors`, at every member, and every buffer of a call that did not
commit with what it was.
"""

import os
import signal
import time
from itertools import product

import pytest

from collectives.mesh.shared_memory import is_possible
from collectives.types import WAN
from tests.collectives_member import STATES, Member, digest, vector
from tests.waiting import wait_until

COUNT = 300_000  # 2.4 MB: several chunks for each
NEXT_S = 5.0  # within which the next operation commits


def check(step, answers, members):
    """Compare what members say of one reduction; return how it ended."""
    committed = [answer for answer in answers if answer[0] == "commit"]
    for answer in answers:
        assert answer[0] == "commit" or answer[1] is True, f"a call that did not commit changed its buffer: {answer}"
    verdicts = {answer[0] for answer in answers}
    assert not {"commit", "Aborted"} <= verdicts and not {"commit", "DeadlineExceeded"} <= verdicts, answers
    for _, contributors, found in committed:
        assert contributors == committed[0][1] and set(contributors) <= set(members)
        assert found == digest(sum(vector(member, step, COUNT) for member in contributors))
    return verdicts


@pytest.fixture
def four(way):
    members, options = [Member() for _ in range(4)], {"shares_memory": way == MEMORY}
    try:
        members[0].connect(**options)
        for number, member in enumerate(members[1:], 1):
            member.tell("connect", [members[0].address], options)
            if number > 1:
                there = members[:number]
                wait_until(lambda there=there: all(m.ask("pending") for m in there), 20, "the newcomer to be seen")
                for other in there:
                    other.tell("admit", 20)
                assert [other.answer() for other in there] == ["commit"] * number
            member.address, member.node_id = member.answer()
        yield members
    finally:
        for member in members:
            member.end()


def reduce_all(members, step, timeout=15.0):
    for member in members:
        member.tell("reduce", step, COUNT, timeout)
    return [member.answer() for member in members]


# Some of each run always, the others with the slow ones: a case takes some 4 s, most of it to get going.
SOCKETS, MEMORY = "sockets", "memory"
ALWAYS = {
    ("reduce", "member", signal.SIGSTOP, MEMORY),
    ("commit", "coordinator", signal.SIGKILL, MEMORY),
    ("transfer", "member", signal.SIGKILL, SOCKETS),
}
CASES = [
    pytest.param(
        *case,
        id=f"{case[0]}-{case[1]}-{case[2].name}{'-memory' * (case[3] == MEMORY)}",
        marks=[] if case in ALWAYS else pytest.mark.slow,
    )
    for case in product(STATES, ("member", "coordinator"), (signal.SIGKILL, signal.SIGSTOP), (SOCKETS, MEMORY))
    if case[3] == SOCKETS or (case[0] in ("reduce", "reduced", "commit") and is_possible())
]


@pytest.mark.parametrize(("state", "who", "number", "way"), CASES)
def test_the_others_go_on(four, state, who, number, way):
    ids = sorted(member.node_id for member in four)
    if way == MEMORY:
        for step in range(-20, 0):
            check(step, reduce_all(four, step), ids)
            if all(member.ask("shares_memory") for member in four):
                break
        else:
            raise AssertionError("20 reductions by sockets")
    victim = next(m for m in four if m.node_id == (ids[0] if who == "coordinator" else ids[2]))
    others = [member for member in four if member is not victim]
    assert check(0, reduce_all(four, 0), ids) == {"commit"}

    newcomer = None
    if state == "admission":
        newcomer = Member()
        newcomer.tell("connect", [others[0].address], {})
        wait_until(lambda: all(member.ask("pending") for member in four), 20, "the newcomer to be seen")
    try:
        victim.tell("hold", state)
        if state != "idle":
            victim.answer()
            for member in four:
                if state == "transfer":
                    # Only the victim, and one other, have what the two others lack.
                    member.tell("sync", member in (victim, others[0]), 4_000_000, 15.0)
                elif state == "admission":
                    member.tell("admit", 15.0)
                else:
                    member.tell("reduce", 1, COUNT, 15.0)
        else:
            victim.answer()
        assert victim.hear() == ("holding", state)
        victim.signal(number)
        began = time.monotonic()
        if state in ("idle", "transfer", "admission"):
            answers = [member.answer() for member in others] if state != "idle" else []
            if state == "transfer":
                assert all(answer[0] == "commit" or answer[1] is True for answer in answers), answers
        else:
            check(1, [member.answer() for member in others], ids)
        for step in range(2, 20):
            if newcomer is not None and not newcomer.node_id and newcomer.pipe.poll():
                newcomer.address, newcomer.node_id = newcomer.answer()
                ids.append(newcomer.node_id)
            inside = newcomer is not None and newcomer.node_id in others[0].ask("members")
            verdicts = check(step, reduce_all([*others, newcomer] if inside else others, step, 1.0), ids)
            if verdicts == {"commit"}:
                break
        assert time.monotonic() - began < NEXT_S, "the next operation took too long to commit"
        assert set(others[0].ask("members")) >= {member.node_id for member in others}
        assert victim.node_id not in others[0].ask("members")
    finally:
        if newcomer is not None:
            newcomer.end()


def test_one_that_is_killed_is_lost_at_once_though_a_process_that_it_forked_lives():
    members, forked = [Member() for _ in range(2)], None
    try:
        members[0].connect(timing=WAN)
        members[1].connect([members[0].address], timing=WAN)
        forked = members[1].ask("fork")
        reduce_all(members, "before")
        members[1].signal(signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: len(members[0].ask("members")) == 1, 20, "the view without it")
        assert time.monotonic() - began < WAN.timeout - WAN.heartbeat
    finally:
        if forked is not None:
            os.kill(forked, signal.SIGKILL)
        for member in members:
            member.end()
