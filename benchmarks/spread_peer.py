"""A peer of `benchmarks.spread`, ours or libtorrent's. It is told a JSON object a line what to do.

    {"start": {"rank", "address"}}                         -> {"address": where it is dialled}
    {"meet": {"rank", "addresses"}}                        -> {"peers": links that there are, "sent": bytes}
    {"round": {"rank", "seed", "bytes", "at", "timeout"}}  -> {"seconds": from `at` until all is here, or null}

Rank 0 makes the item known at the Unix time `at`. libtorrent may live in an environment of its own. So only the
standard library and the package of one side are imported:

    VENV/bin/python -m benchmarks.spread_peer libtorrent FOLDER
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

LOOK_S = 0.005
SWARM = b"spread benchmark"


class Ours:
    """A `Host`, linked with others before an item is published."""

    def __init__(self) -> None:
        self._host: Any = None

    def start(self, address: str) -> str:
        """Note where to listen."""
        self._listen = f"tcp://{address}:7700"
        return ""

    def meet(self, addresses: list[str]) -> int:
        """Begin, with the first address as a seed; from then on return how many peers there are."""
        from protocol.credentials.records import Address
        from protocol.host import Host
        from protocol.identity import Identity

        if self._host is None:
            self._host = Host(
                Identity.generate(), SWARM, self._listen, [Address.parse(address) for address in addresses[:1]]
            )
            self.address = str(self._host.start())
        counters = self._host.counters()
        self.sent = counters.bytes_sent
        peers: int = counters.peers
        return peers

    def seed(self, data: bytes, at: float) -> None:
        """Publish an item at the time `at`."""
        _wait_until(at)
        self._host.publish(data)

    def fetch(self, data: bytes, at: float, timeout: float) -> float | None:
        """Return after how many seconds the item was here."""
        _wait_until(at)
        while time.time() < at + timeout:
            if any(item.body == data for item in self._host.receive(1, timeout=LOOK_S)):
                return time.time() - at
        return None


class Torrent:
    """A session of libtorrent's without bounds, which knows all peers and looks for no others."""

    sent = None  # not counted

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._others: list[str] = []

    def start(self, address: str) -> str:
        """Start the session."""
        import libtorrent  # type: ignore[import-not-found]

        self._lt = libtorrent
        self.address = f"{address}:7800"
        closed = ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp", "enable_outgoing_utp")
        self._session = libtorrent.session(
            {"listen_interfaces": self.address, "unchoke_slots_limit": -1, "connection_speed": 500}
            | dict.fromkeys(closed, False)
        )
        return self.address

    def meet(self, addresses: list[str]) -> int:
        """Note whom to dial once there is something to fetch."""
        self._others = addresses
        return len(addresses)

    def seed(self, data: bytes, at: float) -> None:
        """Offer an item at the time `at`."""
        params = self._torrent(data)
        params.flags |= self._lt.torrent_flags.seed_mode
        _wait_until(at)
        self._session.add_torrent(params)

    def fetch(self, data: bytes, at: float, timeout: float) -> float | None:
        """Return after how many seconds the item was here."""
        params = self._torrent(data)
        (Path(params.save_path) / params.ti.name()).unlink()
        _wait_until(at)
        handle = self._session.add_torrent(params)
        for host, _, port in (other.rpartition(":") for other in self._others):
            handle.connect_peer((host, int(port)))
        while time.time() < at + timeout:
            if handle.status().is_seeding:
                return time.time() - at
            time.sleep(LOOK_S)
        return None

    def _torrent(self, data: bytes) -> Any:
        """Return what adds the torrent of `data`: each end computes it, so that it need not be sent."""
        folder = self._folder / self.address.replace(":", "-")
        folder.mkdir(exist_ok=True)
        name = data[:8].hex()
        (folder / name).write_bytes(data)
        made = self._lt.create_torrent([self._lt.create_file_entry(name, len(data))])
        self._lt.set_piece_hashes(made, str(folder))
        params = self._lt.add_torrent_params()
        params.ti = self._lt.torrent_info(self._lt.bdecode(self._lt.bencode(made.generate())))
        params.save_path = str(folder)
        return params


def _wait_until(at: float) -> None:
    time.sleep(max(0.0, at - time.time()))


def _answer(peer: Any, command: str, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    if command == "start":
        return {"address": peer.start(options["addresses"][rank])}
    if command == "meet":
        others = [address for number, address in enumerate(options["addresses"]) if number != rank]
        return {"peers": peer.meet(others), "address": peer.address, "sent": peer.sent}
    data = random.Random(options["seed"]).randbytes(options["bytes"])
    if rank == 0:
        peer.seed(data, options["at"])
        return {"seconds": 0.0}
    return {"seconds": peer.fetch(data, options["at"], options["timeout"])}


def main() -> None:
    """Answer commands until the end of input."""
    side, *folder = sys.argv[1:]
    peer: Any = Ours() if side == "gossamer" else Torrent(*folder)
    for line in sys.stdin:
        ((command, options),) = json.loads(line).items()
        print(json.dumps(_answer(peer, command, options.pop("rank"), options)), flush=True)


if __name__ == "__main__":
    main()
