"""The failure detector, driven by hand: whom it probes, suspects and declares dead, and when."""

import random
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from protocol.events import Send
from protocol.identity import NodeId
from protocol.limits.timing import LAN
from protocol.membership.failure_detector import (
    PINGS,
    Detector,
    Liveness,
)
from protocol.wire.messages import Ping

A, B, C, D, E = map(NodeId, "abcde")
STEP = 0.25


def machine(*peers: NodeId) -> Detector:
    detector = Detector(LAN, random.Random(1))
    for peer in peers:
        detector.up(peer, 0.0)
    return detector


class Dead(NamedTuple):
    node: NodeId


def tick(detector: Detector, now: float) -> list:
    """Return what it asks for, each thing by itself."""
    pings, dead = detector.tick(now)
    return [*(Send(node, ping) for node, ping in pings.items()), *map(Dead, dead)]


def run(detector: Detector, start: float, end: float, *talking: NodeId) -> list:
    """Tick from `start` to `end`, with something heard from `talking` before each tick."""
    actions, now = [], start
    while now < end:
        for node in talking:
            detector.heard(node, now)
        actions += tick(detector, now)
        now += STEP
    return actions


def of(kind: type, actions: list) -> list:
    return [action for action in actions if isinstance(action, kind)]


def sent(kind: type, actions: list) -> list:
    return [action.message for action in of(Send, actions) if isinstance(action.message, kind)]


def time_of_death(detector: Detector, *talking: NodeId) -> float:
    now = 0.0
    while now < 1000:
        for node in talking:
            detector.heard(node, now)
        actions = tick(detector, now)
        if Dead(A) in actions:
            return now
        now += STEP
    raise AssertionError("never")


def test_a_silent_peer_is_pinged_twice_suspected_and_dead_within_the_documented_bound() -> None:
    detector = machine(A, B, C)
    actions = run(detector, 0, LAN.death_bound + 1, B, C)
    kinds = [type(action.message if isinstance(action, Send) else action) for action in actions]
    assert kinds[:PINGS] == [Ping] * PINGS and Dead in kinds
    assert {action.to for action in of(Send, actions)} == {A}
    assert len({ping.token for ping in sent(Ping, actions)}) == len(sent(Ping, actions))
    assert time_of_death(machine(A, B), B) <= LAN.death_bound + STEP
    assert time_of_death(machine(A)) <= LAN.death_bound + STEP


def test_a_peer_whose_first_ping_was_lost_is_not_suspected() -> None:
    detector = machine(A, B)
    actions, now = [], 0.0
    while len(sent(Ping, actions)) < PINGS:
        now += STEP
        detector.heard(B, now)
        actions += tick(detector, now)
    detector.heard(A, now + STEP)
    assert detector.state(A) is Liveness.WELL


def test_a_pause_shorter_than_the_suspicion_does_not_kill() -> None:
    detector = machine(A, B)
    run(detector, 0, 20, B)
    assert detector.suspects == [A]
    detector.heard(A, 20)
    assert detector.state(A) is Liveness.WELL
    assert Dead(A) not in run(detector, 20, 60, A, B)


def test_the_round_trip_is_that_of_the_last_ping() -> None:
    detector = machine(A)
    (ping,) = sent(Ping, run(detector, 0, LAN.probe_interval + STEP))
    assert detector.rtt(A) is None
    detector.pong(A, ping.token + 1, LAN.probe_interval + 0.04)
    assert detector.rtt(A) is None
    detector.pong(A, ping.token, LAN.probe_interval + 0.04)
    assert abs((detector.rtt(A) or 0) - 0.04) < 1e-6


nodes = st.sampled_from([A, B, C, D])
calls = st.one_of(
    st.tuples(st.sampled_from(["up", "heard"]), nodes),
    st.tuples(st.just("down"), nodes),
    st.tuples(st.just("tick")),
)


@given(st.lists(st.tuples(st.floats(0, 10), calls), max_size=80))
def test_whatever_happens_it_pings_live_peers_only_and_kills_none_that_was_just_heard(history) -> None:
    detector = machine()
    live: set[NodeId] = set()
    heard: dict[NodeId, float] = {}
    now = 0.0
    for pause, (name, *rest) in history:
        now += pause
        actions: list = []
        match name:
            case "up":
                detector.up(rest[0], now)
                live.add(rest[0])
                heard[rest[0]] = now
            case "down":
                detector.down(rest[0])
                live.discard(rest[0])
            case "heard":
                detector.heard(rest[0], now)
                heard[rest[0]] = now
            case "tick":
                actions = tick(detector, now)
        for action in actions:
            match action:
                case Send(to):
                    assert to in live
                case Dead(node):
                    assert now - heard[node] >= LAN.suspicion
                    detector.down(node)
                    live.discard(node)
        assert set(detector.suspects) <= live
