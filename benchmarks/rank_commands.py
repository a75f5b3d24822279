"""What a rank of `bench allreduce` is told, a JSON object a line, whichever library it uses.

Only the standard library: ranks of another library run under an interpreter of their own.

    {"prepare": {"mib", "ranks", "rank"}}       -> {}     make the values, and a buffer
    {"refill": {"rank"}}                        -> {}     put the values in the buffer
    {"reduce": {"impl", "codec", "at", "rank"}} -> {"end": unix time, "cpu": processor seconds, "is_right": bool}
    {any other of the rank's methods: its keywords} -> its answer

An answer {"error": text} says why there is none. Element i of rank r is (r + 1) (i mod 97): small
integers, so that every order of adding gives the same float32.
"""

import json
import sys
import time
from typing import Any, Protocol

PERIOD = 97


class Rank(Protocol):
    """One process's side of a library."""

    def prepare(self, mib: float, ranks: int, rank: int) -> dict[str, Any]: ...

    def refill(self, rank: int) -> dict[str, Any]: ...

    def reduce(self, impl: str, codec: str) -> None:
        """Put the sum of all ranks' values in the buffer."""
        ...

    def is_right(self, codec: str) -> bool:
        """Tell whether the buffer holds it, as near as the codec allows."""
        ...


def serve(rank: Rank) -> None:
    """Answer commands until the end of input."""
    for line in sys.stdin:
        ((command, options),) = json.loads(line).items()
        try:
            answer = _reduce(rank, **options) if command == "reduce" else getattr(rank, command)(**options)
        except Exception as error:  # noqa: BLE001  # the parent decides what follows from it
            answer = {"error": f"{command}: {type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _reduce(own: Rank, impl: str, codec: str, at: float, rank: int) -> dict[str, Any]:
    time.sleep(max(0.0, at - time.time()))
    before = time.process_time()
    own.reduce(impl, codec)
    end, cpu = time.time(), time.process_time() - before
    return {"end": end, "cpu": cpu, "is_right": own.is_right(codec), "rank": rank}
