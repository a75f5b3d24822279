"""Nodes that nobody can dial, each on a machine of its own: a firewall drops what comes in, or there is NAT.

They give and get what others do: with a node that can be dialled, and with one another
through it.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.namespaces import ROOT, Namespace, behind, why_impossible, wired
from tests.waiting import wait_until

SWARM = b"a swarm of tests"

OBSTACLE = why_impossible()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)


class Speaker:
    """A speaking node in a namespace."""

    def __init__(self, space: Namespace, name: str, folder: Path, listen: str, *seeds: str) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        words = [str(self.folder), SWARM.hex(), name, listen, *seeds]
        self._process = subprocess.Popen(
            space.command(sys.executable, "-m", "tests.protocol_speaker", *words), cwd=ROOT
        )

    @property
    def address(self) -> str:
        path = self.folder / "address"
        wait_until(lambda: path.exists() or self._process.poll() is not None, 30, f"{self.name} to listen")
        return path.read_text()

    def heard(self) -> Counter[str]:
        """How many items it heard from whom."""
        path = self.folder / "heard"
        return Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()

    def rejected(self) -> dict[str, int]:
        path = self.folder / "rejected"
        return json.loads(path.read_text()) if path.exists() else {}

    def standing(self) -> dict[str, object]:
        path = self.folder / "standing"
        return json.loads(path.read_text()) if path.exists() else {}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Network:
    """Speaking nodes, all of one swarm, on machines of their own."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.stack = stack
        self.speakers: list[Speaker] = []
        self._folder = folder

    def speak(self, space: Namespace, name: str, listen: str, *seeds: str) -> Speaker:
        speaker = Speaker(space, name, self._folder, listen, *seeds)
        self.stack.callback(speaker.stop)
        self.speakers.append(speaker)
        return speaker

    def wait_for_items(self, count: int, timeout: float = 40) -> None:
        """Wait until everybody heard so many more items from everybody else than now."""
        before = {speaker.name: speaker.heard() for speaker in self.speakers}

        def enough() -> bool:
            return all(
                speaker.heard()[other.name] >= before[speaker.name][other.name] + count
                for speaker in self.speakers
                for other in self.speakers
                if other is not speaker
            )

        wait_until(enough, timeout, f"{count} items from everybody at everybody")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack, tmp_path)


@pytest.mark.parametrize(
    ("family", "listening"),
    [
        pytest.param("ipv4", True, id="they listen in vain"),
        pytest.param("ipv6", True, id="they listen in vain, IPv6", marks=pytest.mark.slow),
        pytest.param("ipv4", False, id="they do not listen"),
    ],
)
def test_two_nodes_that_nobody_can_dial_share_as_others_do(network: Network, family: str, listening: bool) -> None:
    public, *private = network.stack.enter_context(wired("public", "home", "flat"))
    for space in private:
        space.drop_inbound()

    def endpoint(space: Namespace) -> str:
        return f"tcp://{space.ipv4}:7777" if family == "ipv4" else f"tcp://[{space.ipv6}]:7777"

    relay = network.speak(public, "public", endpoint(public))
    for name, space in zip(("home", "flat"), private, strict=True):
        speaker = network.speak(space, name, endpoint(space) if listening else "-", relay.address)
        if listening:
            assert speaker.address.startswith(endpoint(space))
            assert not public.can_connect(getattr(space, family), 7777)
    network.wait_for_items(3)
    assert [speaker.rejected() for speaker in network.speakers] == [{}, {}, {}]


def test_two_homes_behind_nat_share_through_a_node_that_both_can_dial(network: Network) -> None:
    public, *routers = network.stack.enter_context(wired("public", "router", "other"))
    relay = network.speak(public, "public", f"tcp://{public.ipv4}:7777")
    homes = []
    for name, router in zip(("home", "flat"), routers, strict=True):
        home = network.stack.enter_context(behind(router))  # both have the same address: each in its own network
        homes.append(network.speak(home, name, f"tcp://{home.ipv4}:7777", relay.address))
    network.wait_for_items(3)
    for speaker, seen_at, dialable in (
        (relay, public, True),
        *((s, r, False) for s, r in zip(homes, routers, strict=True)),
    ):
        known = {"seen_at": seen_at.ipv4, "dialable": dialable}
        wait_until(lambda s=speaker, k=known: k.items() <= s.standing().items(), 40, f"{speaker.name}: {known}")
    assert [speaker.rejected() for speaker in network.speakers] == [{}, {}, {}]


@pytest.mark.slow
def test_a_node_tells_its_ipv6_address_that_lasts_and_not_a_temporary_one() -> None:
    told = "from protocol.transport.addresses import own_hosts; print(own_hosts('::')[0])"
    with wired("desktop") as (desktop,):

        def run(*words: str) -> str:
            return subprocess.run(desktop.command(*words), capture_output=True, text=True, check=True, cwd=ROOT).stdout

        run("sh", "-c", "for each in all wire; do echo 2 > /proc/sys/net/ipv6/conf/$each/use_tempaddr; done")
        run("ip", "address", "add", "2a02:1234:5678:1::10/64", "dev", "wire", "mngtmpaddr", "nodad")
        run("ip", "-6", "route", "add", "default", "via", "fd77::2")
        shown = ("ip", "-6", "address", "show", "dev", "wire", "temporary", "-tentative")
        wait_until(lambda: run(*shown), 30, "a temporary address")
        assert run(sys.executable, "-c", told).strip() == "2a02:1234:5678:1::10"


@pytest.mark.slow  # only a missing heartbeat, 15 seconds later, tells that the old address is gone
def test_a_node_whose_address_changes_comes_back(network: Network) -> None:
    public, home = network.stack.enter_context(wired("public", "home"))
    relay = network.speak(public, "public", f"tcp://{public.ipv4}:7777")
    network.speak(home, "home", "-", relay.address)
    network.wait_for_items(3)
    home.move("10.77.0.99")
    network.wait_for_items(3, timeout=90)
