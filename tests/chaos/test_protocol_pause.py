"""A process that is stopped for 20 s, as one is that loads a model: suspected, not lost, and it misses nothing."""

import signal
import time
from pathlib import Path

import pytest

from protocol.limits.timing import LOCAL
from tests.protocol_hosts import running, spawn
from tests.waiting import wait_until

PAUSE_S = 20.0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_that_is_stopped_for_20_s_is_suspected_comes_back_and_answers_all_it_was_asked(tmp_path: Path) -> None:
    with running(timing=LOCAL) as (one, address), running(address, timing=LOCAL) as (two, _):
        child, _ = spawn(tmp_path, address)
        try:
            wait_until(lambda: one.counters().peers == two.counters().peers == 2, 20, "the child at both")
            child.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            asked = {f"question {number}" for number in range(50)}
            for question in asked:
                one.publish(f"ask {question}".encode())
            wait_until(lambda: "suspect" in {peer.state for peer in one.peers()}, 15, "the suspicion")
            wait_until(lambda: time.monotonic() - stopped >= PAUSE_S, PAUSE_S + 5, "the end of the pause")
            child.send_signal(signal.SIGCONT)
            missing = {f"answer {question}" for question in asked}

            def all_answered() -> bool:
                missing.difference_update(item.body.decode() for item in two.receive(1000))
                return not missing

            wait_until(all_answered, 40, "every answer at the third node")
            wait_until(
                lambda: [peer.state for peer in one.peers()] == ["well", "well"], 20, "the child as a peer like others"
            )
            assert one.counters().rejected == two.counters().rejected == {}
        finally:
            child.kill()
            child.wait()
