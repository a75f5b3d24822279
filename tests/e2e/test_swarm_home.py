"""Nodes at home, each on a machine of its own: a router that forwards their port, and neighbours that they find."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.namespaces import ROOT, Namespace, all_behind, behind, why_impossible, wired
from tests.waiting import wait_until

SWARM = "ab" * 16
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
OBSTACLE = why_impossible()
needs_namespaces = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
needs_miniupnpd = pytest.mark.skipif(
    not (shutil.which("miniupnpd") and shutil.which("nft")), reason="needs Debian's miniupnpd-nftables and nftables"
)
CHAINS = """table inet filter {
  chain forward { type filter hook forward priority 0; jump miniupnpd; }
  chain miniupnpd {}
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain prerouting_miniupnpd {}
  chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
  chain postrouting_miniupnpd {}
}"""
SETTINGS = """ext_ifname=wire
listening_ip=inside
http_port=5000
enable_upnp=%s
enable_pcp_pmp=%s
secure_mode=yes
upnp_table_name=filter
upnp_nat_table_name=filter
uuid=00000000-0000-0000-0000-000000000000
allow 1024-65535 0.0.0.0/0 1024-65535
"""


class Relay:
    """A relay on a machine of its own."""

    def __init__(self, space: Namespace, folder: Path, seeds: Sequence[str] = ()) -> None:
        self._space = space
        self.folder = folder
        self.log = folder.with_suffix(".log")
        settings = ["role=relay", f"network.swarm={SWARM}", f"network.seeds={list(seeds)}"]
        words = ["--listen", "tcp://0.0.0.0:4001", *(f"--set={setting}" for setting in settings)]
        command = self._command("node", "--state", str(folder), *words)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        wait_until((folder / "observe.json").exists, 40, f"the node of {folder.name}")

    def _command(self, *words: str) -> list[str]:
        code = "import sys; from node.cli import main; sys.exit(main())"
        return self._space.command(sys.executable, "-c", code, *words)

    @property
    def address(self) -> str:
        return (self.folder / "address").read_text().strip()

    def status(self) -> dict:
        words = self._command("status", str(self.folder), "--json")
        return json.loads(subprocess.run(words, env=ENVIRONMENT, capture_output=True, timeout=30, check=True).stdout)

    def peers(self) -> set[str]:
        return {peer["node"] for peer in self.status()["peers"]}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def relay(space: Namespace, folder: Path, seed: Relay | None = None) -> Iterator[Relay]:
    started = Relay(space, folder, [seed.address] if seed else [])
    try:
        yield started
    finally:
        started.stop()


@contextmanager
def forwarding(router: Namespace, folder: Path, speaks: str = "upnp") -> Iterator[None]:
    """Let a router answer UPnP, or NAT-PMP and PCP, for as long as the block lasts."""
    subprocess.run(router.command("nft", "-f", "-"), input=CHAINS, text=True, check=True, timeout=30)
    settings = folder / "miniupnpd.conf"
    settings.write_text(SETTINGS % (("yes", "no") if speaks == "upnp" else ("no", "yes")))
    words = ["miniupnpd", "-d", "-f", str(settings), "-P", str(folder / "miniupnpd.pid")]
    with (folder / "miniupnpd.log").open("wb") as log:
        server = subprocess.Popen(router.command(*words), stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            server.terminate()
            server.wait(30)


def forwarded(router: Namespace) -> str:
    words = router.command("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd")
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.long
@pytest.mark.timeout(300)
@needs_namespaces
@needs_miniupnpd
@pytest.mark.parametrize("speaks", ["upnp", "nat-pmp"])
def test_a_node_at_home_whose_router_forwards_its_port_is_dialled_by_another_home(tmp_path: Path, speaks: str) -> None:
    with wired("public", "router", "other") as (public, router, other):
        for number, space in enumerate((public, router, other), 1):
            space.move(f"93.184.1.{number}")
        with (
            behind(router) as home,
            behind(other) as flat,
            forwarding(router, tmp_path, speaks),
            relay(public, tmp_path / "public") as seed,
            relay(home, tmp_path / "home", seed) as one,
        ):
            wait_until(lambda: "192.168.7.2:4001" in forwarded(router), 40, "the router to forward the port")
            told = "tcp://93.184.1.2:4001"
            wait_until(lambda: any(told in at for at in one.status()["addresses"]), 90, "a peer to dial it back")
            assert one.status()["dialable"] is True
            # The public node is one network: without the router's word nobody would be told.
            assert one.status()["dialable_asked"] == 1
            with relay(flat, tmp_path / "flat", seed) as two:
                wait_until(lambda: len(two.peers()) == 2, 60, "both others as peers of the second home")
                wait_until(
                    lambda: "no router" in (two.status()["router"] or ""), 40, "that its own router says nothing"
                )
            assert "192.168.7.2" in forwarded(router)
            one.stop()
            assert "192.168.7.2" not in forwarded(router)


@pytest.mark.long
@pytest.mark.timeout(300)
@needs_namespaces
@needs_miniupnpd
def test_two_boxes_behind_one_router_with_a_seed_far_away_find_each_other_and_one_has_the_port(tmp_path: Path) -> None:
    with wired("public", "router") as (public, router):
        for number, space in enumerate((public, router), 1):
            space.move(f"93.184.1.{number}")
        with (
            all_behind(router, "left", "right") as boxes,
            forwarding(router, tmp_path),
            relay(public, tmp_path / "public") as seed,
            relay(boxes[0], tmp_path / "left", seed) as left,
        ):
            wait_until(lambda: f"{boxes[0].ipv4}:4001" in forwarded(router), 40, "the router to forward the port")
            with relay(boxes[1], tmp_path / "right", seed) as right:
                wait_until(lambda: right.status()["router"], 40, "what the router says to the second")
                assert "forwards port 4001 to another machine" in right.status()["router"]
                for here, there in ((left, right), (right, left)):
                    wait_until(lambda h=here, t=there: t.status()["node"] in h.peers(), 40, "the two to meet")
                assert any(peer["endpoint"] == "tcp://192.168.7.3:4001" for peer in left.status()["peers"])
            assert boxes[0].ipv4 in forwarded(router)  # who could not have it gave nothing back


@pytest.mark.long
@pytest.mark.timeout(300)
@needs_namespaces
def test_two_nodes_of_one_network_find_each_other_and_one_of_another_swarm_does_not(tmp_path: Path) -> None:
    with (
        wired("one", "two", "three") as spaces,
        relay(spaces[0], tmp_path / "one") as one,
        relay(spaces[1], tmp_path / "two") as two,
        relay(spaces[2], tmp_path / "three", "--set", f"network.swarm={'cd' * 16}") as three,
    ):
        for here, there in ((one, two), (two, one)):
            wait_until(lambda h=here, t=there: h.peers() == {t.status()["node"]}, 40, "the two to meet")
        assert three.peers() == set()
