"""Under each attack an honest pair goes on at its rate, memory stays bounded, and the offender is refused.

The pair exchanges 10 kB items over real sockets at 200 a second each way, far above what a
swarm of learners needs and about a quarter of what two cores can do. Windows with and without the
attack alternate, so that whatever else the machine does falls on both alike.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from protocol.config import LAN, MIB, Limits
from protocol.host import Host
from protocol.identity import Identity
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SWARM = b"a swarm of tests"
HASTY = replace(LAN, pull_patience=0.2)  # promises are due in a second, not in ten
ROUND_S = 0.005
WINDOW_S = 0.25
MIN_WINDOWS, MAX_WINDOWS = 3, 15  # of each kind: more while others keep the machine too busy to tell
# Of the undisturbed rate: what an attack should leave, and what is printed. A busy machine leaves less with no attack
# at all, so the test fails only when the pair does not go on; docs/results/protocol.md has what was measured.
MIN_SHARE = 0.8
MAX_GROWTH = 64 * MIB  # each attack on memory sends more than that in its windows

# Attack -> the reasons under which it is counted. "graylisted" is what refuses its key from then on.
REASONS = {
    "replay": {"replayed"},
    "stale time stamps": {"stale"},
    "forged signatures": {"forged", "graylisted"},
    "stolen ids": {"impostor", "graylisted"},
    "false records": {"forged", "graylisted"},
    "promises broken": {"broken_promise", "graylisted"},
    "promises broken and repeated": {"broken_promise", "graylisted"},
    "one key, many addresses": {"superseded"},
    "many keys, one address": {"too_many_connections"},
    "endless multipart": {"endless_message"},
    "huge frames": {"framing"},
    "huge lengths before CURVE": {"framing"},
    "deep nesting": {"malformed", "graylisted"},
    "nested envelope": {"malformed", "graylisted"},
    "huge lengths in MessagePack": {"malformed", "graylisted"},
    "slow-loris handshakes": {"handshake_unfinished"},
    "CURVE probing": {"no_hello"},
    "flood": {"flood"},
}


class Arena:
    """An honest pair, and an attacker in a process of its own."""

    def __init__(self) -> None:
        # Half as much again as the honest pair needs, so that a flood over it costs the attacker, a process
        # on the same two cores, not too much.
        # What the pair itself holds is small beside what an attack would have to grow by to be noticed.
        limits = Limits(messages_per_second=300, messages_burst=300, held_bytes=4 * MIB)
        self.victim = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [], limits, timing=HASTY)
        address = self.victim.start()
        assert address is not None
        self.friend = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [address], limits, timing=HASTY)
        self.friend.start()
        wait_until(lambda: self.friend.counters().peers == self.victim.counters().peers == 1, 20, "the pair")
        command = [sys.executable, "-m", "tests.protocol_attacks", str(address), SWARM.hex()]
        self._attacker = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._attacker.stdout is not None
        assert self._attacker.stdout.readline() == "ready\n"

    def tell(self, word: str) -> None:
        assert self._attacker.stdin is not None
        self._attacker.stdin.write(word + "\n")

    def rate(self) -> float:
        """Exchange items for one window; return the rounds a second that were completed."""
        rounds, start = 0, time.monotonic()
        while (now := time.monotonic()) < start + WINDOW_S:
            if now < start + rounds * ROUND_S:
                time.sleep(0.001)
                continue
            self.exchange()
            rounds += 1
        return rounds / (time.monotonic() - start)

    def exchange(self) -> None:
        """Pass one item each way."""
        bodies = os.urandom(10_000), os.urandom(10_000)
        self.victim.publish(bodies[0])
        self.friend.publish(bodies[1])
        deadline = time.monotonic() + 20
        for taker, body in ((self.friend, bodies[0]), (self.victim, bodies[1])):
            while not any(item.body == body for item in taker.receive(100)):
                assert time.monotonic() < deadline, "an honest item was lost"
                time.sleep(0.0005)

    def rejected(self) -> Counter[str]:
        return Counter(dict(self.victim.counters().rejected))

    def close(self) -> None:
        self._attacker.kill()
        self._attacker.wait()
        for pipe in (self._attacker.stdin, self._attacker.stdout):
            assert pipe is not None
            pipe.close()
        self.victim.stop()
        self.friend.stop()


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # both hosts and the test are threads of this process; elsewhere they are not
    made = Arena()
    try:
        yield made
    finally:
        made.close()
        sys.setswitchinterval(usual)


SLOW = {"slow-loris handshakes"}  # a handshake has five seconds


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in REASONS]
)
def test_an_honest_pair_goes_on_under(arena: Arena, attack: str) -> None:
    before, memory = arena.rejected(), psutil.Process().memory_info()
    calm, disturbed = [], []
    share = 0.0
    while len(calm) < MIN_WINDOWS or (share < MIN_SHARE and len(calm) < MAX_WINDOWS):
        calm.append(arena.rate())
        arena.tell("go" if disturbed else attack)
        disturbed.append(arena.rate())
        arena.tell("stop")
        share = statistics.median(disturbed) / statistics.median(calm)

    def missing() -> set[str]:
        return REASONS[attack] - set(arena.rejected() - before)

    arena.tell("go")
    wait_until(lambda: not missing() or arena.exchange(), 40, f"{missing()} in {arena.rejected()}")
    arena.tell("stop")
    growth = psutil.Process().memory_info().rss - memory.rss
    print(f"{attack}: {share:.2f} of the rate, {growth / MIB:+.0f} MiB, {dict(arena.rejected() - before)}")
    assert share > 0, (calm, disturbed)
    assert growth < MAX_GROWTH
    assert arena.rejected()["internal"] == 0
    assert arena.friend.counters().peers >= 1
