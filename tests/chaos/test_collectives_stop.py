"""A member that is stopped until the others have gone on without it, and then runs again, comes back as it should."""

import inspect
import signal
import time

import psutil
import pytest

from collectives import Communicator
from collectives.mesh.shared_memory import is_possible
from collectives.types import WAN
from tests.collectives_group import COUNTS, PATIENCE_S, commit, let_in, members_in, mix
from tests.collectives_member import digest, state_at
from tests.waiting import wait_until

HOLD_S = 2.5  # longer than the silence that is death in a group of one room


def test_by_default_one_that_keeps_pythons_lock_for_some_seconds_is_in_every_sum():
    assert inspect.signature(Communicator.connect).parameters["timing"].default is WAN
    with members_in([None] * 2, timing=WAN) as members:
        members[1].ask("keep_the_lock", HOLD_S)
        until, step = time.monotonic() + 2 * HOLD_S, 0
        while time.monotonic() < until:
            assert {answer[0] for answers in mix(members, step) for answer in answers} == {"commit"}
            step += 1


@pytest.mark.parametrize(("who", "in_memory"), [("coordinator", False), ("member", is_possible())])
def test_a_member_that_was_stopped_finds_itself_left_out_comes_back_and_has_what_the_others_have(who, in_memory):
    with members_in([None] * 3, shares_memory=in_memory) as members:
        commit(members, "together")
        while in_memory and not all(member.ask("shares_memory") for member in members):
            commit(members, "by sockets")
        ids = sorted(member.node_id for member in members)
        victim = next(member for member in members if member.node_id == ids[0 if who == "coordinator" else 1])
        others = [member for member in members if member is not victim]
        process = psutil.Process(victim.process.pid)
        idle = process.num_threads()
        victim.tell("mix", "never", COUNTS, PATIENCE_S, "victim")
        wait_until(lambda: process.num_threads() > idle + len(COUNTS), PATIENCE_S, "the calls to be under way")
        victim.signal(signal.SIGSTOP)
        for step in range(3):
            revision, _ = commit(others, f"without {step}", "others")
        victim.signal(signal.SIGCONT)

        # Its calls end, although nobody else knows of them any more; nothing that it holds has changed.
        assert {answer[:2] for answer in victim.answer()} <= {("Evicted", True), ("InDoubt", True)}
        wait_until(lambda: victim.ask("members") == (), PATIENCE_S, "the stopped member to know that it is out")
        let_in(*members)
        assert commit(members, "again") == (revision + 1, digest(state_at(revision + 1, "others")))
        assert {member.ask("members") for member in members} == {tuple(ids)}
