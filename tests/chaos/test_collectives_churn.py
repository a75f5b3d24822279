"""Members join, leave and are killed at random while the others reduce: no wrong value, no divergence, no stall.

On demand: pytest -m slow tests/chaos/churn.py; 30 s, GOSSAMER_CHURN_S=600 for longer. The seed is printed
with what fails.
"""

import os
import random
import signal
import time

import psutil
import pytest

from tests.collectives_member import Member, digest, vector
from tests.waiting import wait_until

SECONDS = float(os.environ.get("GOSSAMER_CHURN_S", "30"))
SEED = int(os.environ.get("GOSSAMER_CHURN_SEED", "1"))
COUNT = 50_000  # 400 kB: by the data plane
STALL_S = 10.0
LEAST, MOST = 2, 5


class Churn:
    """The group, and what is known of its steps."""

    def __init__(self, rng):
        self.rng = rng
        self.step = 0
        self.inside = [Member()]
        self.inside[0].connect()
        self.joining = []
        self.committed = 0
        self.joined = self.lost = 0

    def join(self):
        newcomer = Member()
        newcomer.tell("connect", [self.rng.choice(self.inside).address], {"timeout": 60.0})
        self.joining.append(newcomer)

    def lose(self):
        victim = self.rng.choice(self.inside)
        self.inside.remove(victim)
        self.lost += 1
        if self.rng.random() < 0.5:
            victim.ask("leave")
        else:
            victim.signal(signal.SIGKILL)
        victim.end()

    def settle_joins(self):
        for newcomer in [one for one in self.joining if one.pipe.poll()]:
            newcomer.address, newcomer.node_id = newcomer.answer()
            self.joining.remove(newcomer)
            self.inside.append(newcomer)
            self.joined += 1

    def know_all(self):
        self.settle_joins()
        known = {member.node_id for member in self.inside}
        return all(set(member.ask("members")) <= known for member in self.inside)

    def act(self, lose):
        """One operation by all who are inside, while one of them may be killed; check what it gave."""
        self.step += 1
        acting = list(self.inside)
        if all(member.ask("pending") for member in acting):
            for member in acting:
                member.tell("admit", 5.0)
            for member in acting:
                member.answer()
        # Who is in the view has to call what the others call: one that was let in says so in a moment.
        wait_until(self.know_all, STALL_S, "every member of the view to have told that it is in")
        acting = list(self.inside)
        kind = self.rng.choice(["reduce", "reduce", "reduce", "sync"])
        for member in acting:
            member.tell(kind, self.step, COUNT, 3.0)
        if lose and len(acting) > LEAST:
            victim = self.rng.choice(acting)
            time.sleep(self.rng.uniform(0.0, 0.03))  # somewhere within the operation
            victim.signal(signal.SIGKILL)
            acting.remove(victim)
            self.inside.remove(victim)
            self.lost += 1
            victim.end()
        answers = [member.answer() for member in acting]
        committed = [answer for answer in answers if answer[0] == "commit"]
        assert all(answer[0] == "commit" or answer[1] is True for answer in answers), answers
        assert not (committed and any(answer[0] in ("Aborted", "DeadlineExceeded") for answer in answers)), answers
        assert len(set(committed)) <= 1, answers
        if committed and kind == "reduce":
            _, contributors, found = committed[0]
            assert found == digest(sum(vector(member, self.step, COUNT) for member in contributors))
        self.committed += bool(committed)
        return bool(committed)

    def end(self):
        for member in [*self.inside, *self.joining]:
            member.end()


def usage(member):
    process = psutil.Process(member.process.pid)
    return process.num_threads(), process.num_fds(), process.memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_a_group_whose_members_come_and_go():
    rng = random.Random(SEED)
    churn = Churn(rng)
    try:
        churn.join()
        wait_until(lambda: churn.settle_joins() or len(churn.inside) == 2, 20, "the second member")
        ends, last = time.monotonic() + SECONDS, time.monotonic()
        next_change = last
        while time.monotonic() < ends:
            changes = time.monotonic() >= next_change
            loses = changes and rng.random() < 0.5
            if changes:
                next_change = time.monotonic() + rng.uniform(0.5, 2.0)
                if not loses and len(churn.inside) + len(churn.joining) < MOST:
                    churn.join()
                elif loses and len(churn.inside) > LEAST and rng.random() < 0.3:
                    churn.lose()
            churn.settle_joins()
            if churn.act(loses):
                last = time.monotonic()
            assert time.monotonic() - last < STALL_S, f"no operation committed for {STALL_S} s (seed {SEED})"
        print(f"{churn.step} operations, {churn.committed} committed; {churn.joined} joined, {churn.lost} lost")
        assert churn.joined >= SECONDS / 10 and churn.lost >= SECONDS / 10
        oldest = churn.inside[0]
        threads, descriptors, _ = usage(oldest)
        others = len(churn.inside) + len(churn.joining) - 1
        # A control connection and a data stream to each other member, perhaps dialled from both ends.
        assert threads < 12 + 8 * others and descriptors < 40 + 8 * others, (threads, descriptors)
    finally:
        churn.end()
