"""What a node's clock says after a sleep, and on which thread a slow disk is waited for."""

import os
import random
import threading
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import MAX_STEP_S, AwakeClock, Instant, Setup
from protocol.driver import Driver
from protocol.events import Blame, Tick
from protocol.gossip.exchange import Gossip
from protocol.identity import Identity
from protocol.limits.timing import LAN, WAN, Timing
from protocol.storage import load_peers, save_peers
from protocol.wire.messages import NO_TOPIC, Entry, Have
from tests.protocol_hosts import running
from tests.waiting import wait_until

UNIX = 1.7e9
ME, HOLDER = Identity(b"m" * 32), Identity(b"h" * 32)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> Instant:
        return Instant(self.time, UNIX + self.time)


@given(st.lists(st.floats(0, 100), max_size=30))
def test_the_steady_clock_leaves_out_every_sleep_and_nothing_else(steps: list[float]) -> None:
    raw = Clock()
    clock = AwakeClock(raw)
    for step in steps:
        before = clock()
        raw.time += step
        after = clock()
        assert after.unix == UNIX + raw.time
        assert after.steady - before.steady == pytest.approx(min(step, MAX_STEP_S), abs=1e-6)


def entries(count: int) -> tuple[Entry, ...]:
    return tuple(Entry(os.urandom(32), 10_000, NO_TOPIC, b"abcd") for _ in range(count))


def blamed_after_a_stop(clock, raw: Clock, timing: Timing, stop: float) -> list[Blame]:
    """A holder is asked for 32 items and delivers, but we are stopped: of what waits we read its next words first."""
    gossip = Gossip(ME.node_id, Setup(ME, b"s" * 16, timing=timing), random.Random(1), clock())
    gossip.up(HOLDER.node_id, clock())
    gossip.heard(HOLDER.node_id, Have(entries(32)), clock())
    assert gossip.tick(clock())
    raw.time += stop
    gossip.heard(HOLDER.node_id, Have(entries(1)), clock())
    return [action for action in gossip.tick(clock()) if isinstance(action, Blame)]


@pytest.mark.parametrize(("timing", "stop"), [(WAN, 25.0), (LAN, 12.0)])
def test_whoever_was_stopped_blames_nobody_for_what_it_did_not_read(timing: Timing, stop: float) -> None:
    raw = Clock()
    assert blamed_after_a_stop(raw, raw, timing, stop)  # the clock that every process has
    raw = Clock()
    assert blamed_after_a_stop(AwakeClock(raw), raw, timing, stop) == []


def test_a_core_is_told_a_time_without_the_sleeps_of_its_driver() -> None:
    raw = Clock()
    seen: list[float] = []

    class Network:
        def serve(self, make) -> None:
            """Nothing waits for a link."""

        def poll(self, timeout: float) -> list:
            raw.time += 0.4
            return []

    class Watching:
        def wait(self, now: Instant) -> float:
            return 0.0

        def handle(self, event: Tick, now: Instant) -> list:
            seen.append(now.steady)
            return []

    driver = Driver(Watching(), Network(), raw, lambda item: None)
    driver.step(0.5)
    raw.time += 3600  # the machine is suspended
    driver.step(0.5)
    driver.step(0.5)
    assert seen[1] - seen[0] <= MAX_STEP_S + 1e-6 and seen[2] - seen[1] == pytest.approx(0.4)


@pytest.mark.slow
def test_a_full_disk_ends_nothing_and_is_logged(tmp_path: Path) -> None:
    with (
        structlog.testing.capture_logs() as logs,
        running(peers_file=tmp_path / "gone" / "peers.json") as (one, address),
        running(address) as (two, _),
    ):
        wait_until(lambda: any(line["event"] == "cannot write the peers file" for line in logs), 20, "the log")
        two.publish(b"all the same")
        wait_until(lambda: one.receive(1), 20, "an item")


@pytest.mark.slow
def test_a_disk_that_hangs_holds_up_no_network_thread_and_the_last_peers_are_saved(tmp_path: Path, monkeypatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()
    threads: set[str] = set()

    def slow_save(path: Path, records: list[bytes]) -> None:
        threads.add(threading.current_thread().name)
        hanging.set()
        assert go_on.wait(60)
        save_peers(path, records)

    monkeypatch.setattr("protocol.host.save_peers", slow_save)
    with running(peers_file=tmp_path / "peers.json") as (one, address), running(address) as (two, _):
        assert hanging.wait(30)
        two.publish(b"while the disk hangs")
        wait_until(lambda: one.receive(1), 20, "an item")
        go_on.set()
    assert len(load_peers(tmp_path / "peers.json")) == 1
    assert len(threads) == 1 and "gossamer-network" not in threads
