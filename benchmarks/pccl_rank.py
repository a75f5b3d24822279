"""A rank that has pypccl 1.0.0, under whatever interpreter has it: needs NumPy, cffi and libcuda besides.

Rank 0 runs PCCL's master as well, which is one thread in its process.
"""

import socket
import time
from typing import Any

from benchmarks.rank_commands import PERIOD, serve

POLL_S = 0.05
JOIN_S = 60.0


class Rank:
    """See `rank_commands`."""

    def load(self, rank: int) -> dict[str, Any]:
        """Import it; the answer says what is missing."""
        try:
            import numpy
            import pccl  # type: ignore[import-not-found]
        except (ImportError, OSError) as error:
            return {"problem": str(error)}
        self._numpy, self._pccl = numpy, pccl
        return {"problem": ""}

    def master(self) -> dict[str, Any]:
        """Start the master on a free port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._master = self._pccl.MasterNode(listen_address=f"127.0.0.1:{port}")
        self._master.run()
        return {"port": port}

    def join(self, port: int, ranks: int, rank: int) -> dict[str, Any]:
        """Connect, and vote until all are in."""
        self._group = self._pccl.Communicator(f"127.0.0.1:{port}", 0)
        self._group.connect(n_attempts=15)
        deadline = time.monotonic() + JOIN_S
        while self._group.get_attribute(self._pccl.Attribute.GLOBAL_WORLD_SIZE) < ranks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {ranks} ranks are in after {JOIN_S:g} s")
            if self._group.are_peers_pending():
                self._group.update_topology()
            time.sleep(POLL_S)
        return {}

    def prepare(self, mib: float, ranks: int, rank: int) -> dict[str, Any]:
        """Make the values."""
        np = self._numpy
        self._ranks = ranks
        self._pattern = (np.arange(PERIOD << 13) % PERIOD).astype(np.float32)
        self._values = np.resize(self._pattern, int(mib * (1 << 18)))
        self._values *= np.float32(rank + 1)
        self._buffer = np.empty_like(self._values)
        return {}

    def refill(self, rank: int) -> dict[str, Any]:
        """Put this rank's values in the buffer."""
        self._buffer[:] = self._values
        return {}

    def reduce(self, impl: str, codec: str) -> None:
        """Sum up, in place."""
        self._group.all_reduce(self._buffer, self._buffer, op=self._pccl.ReduceOp.SUM)

    def is_right(self, codec: str) -> bool:
        """Compare with the sum that is known beforehand."""
        np = self._numpy
        wanted = self._pattern * np.float32(self._ranks * (self._ranks + 1) / 2)
        parts = [self._buffer[at : at + len(wanted)] for at in range(0, len(self._buffer), len(wanted))]
        return all(np.array_equal(part, wanted[: len(part)]) for part in parts)


if __name__ == "__main__":
    serve(Rank())
