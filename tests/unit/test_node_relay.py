"""A relay's loop."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.config import parse_config
from node.relay import Take, run_relay
from node.swarm.peering import Network
from protocol.host import Host, Received
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId


@pytest.mark.slow
@pytest.mark.usefixtures("own_log_setup")
def test_a_signal_to_stop_does_not_wait_for_all_that_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [Received(ItemId(bytes([n]) * 32), NodeId("somebody"), b"", 0.0, b"") for n in range(200)]
    taken: list[Received] = []

    def receive(_: Host, limit: int) -> list[Received]:
        came = waiting[:limit]
        del waiting[:limit]
        return came

    @contextmanager
    def looking(_: Network) -> Iterator[Take]:
        def take(items: Sequence[Received]) -> None:
            taken.extend(items)
            if len(taken) > 64:
                os.kill(os.getpid(), signal.SIGTERM)

        yield take

    monkeypatch.setattr(Host, "receive", receive)
    config = parse_config({"role": "relay", "network": {"listen": "tcp://127.0.0.1:0"}, "observe": {"enabled": False}})
    run_relay(config, tmp_path / "r", looking=looking)
    assert len(taken) == 128, "and a full hand is followed by the next at once"
