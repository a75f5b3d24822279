"""One all-reduce, as every member knows it: the same at all of them, so that all do the same sums.

Also what the algorithms share: how a tensor is cut, scratch memory, and the residual of lossy codecs.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from collectives.reduce.codecs import BLOCK, Coder, coder_for
from collectives.reduce.kernels import scaled_weights, work_dtype
from collectives.types import Codec, Op
from protocol.identity import NodeId

# Of values in one payload. Large enough that a payload's fixed cost (some 50 us on both sides)
# does not show, small enough that receiving, adding and sending overlap and stay in cache.
CHUNK_BYTES = 1 << 20
Span = tuple[int, int]


@dataclass(frozen=True)
class Reduction:
    """What is reduced, in which order, how it travels.

    `weights` are those of `kernels.scaled_weights`; `coder` is None where values travel as they are.
    """

    order: tuple[NodeId, ...]
    op: Op
    dtype: torch.dtype
    weights: Mapping[NodeId, float]
    coder: Coder | None
    work: torch.dtype

    @property
    def total(self) -> float:
        """The sum of the weights, in the members' order."""
        return sum(self.weights[member] for member in self.order)

    @property
    def chunk(self) -> int:
        """Values in a payload: whole blocks of the codecs."""
        return CHUNK_BYTES // self.dtype.itemsize // BLOCK * BLOCK


def describe(
    order: Sequence[NodeId], dtype: torch.dtype, op: Op, weights: Mapping[NodeId, float], codec: Codec
) -> Reduction:
    """Return the reduction of these members' values.

    Raises:
        BadArgument: all weights are 0.
    """
    return Reduction(
        tuple(order),
        op,
        dtype,
        scaled_weights(order, weights, op),
        coder_for(codec, dtype),
        work_dtype(dtype, op),
    )


def cut(count: int, shares: Sequence[float]) -> list[Span]:
    """Cut `count` values in proportion to `shares`, at the codecs' blocks; all shares 0: equally."""
    total = sum(shares)
    parts = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
    blocks = -(-count // BLOCK)
    edges, reached = [0], 0.0
    for part in parts[:-1]:
        reached += part
        edges.append(min(count, max(edges[-1], round(blocks * reached) * BLOCK)))
    return list(zip(edges, [*edges[1:], count], strict=True))


def chunks(span: Span, size: int) -> Iterator[Span]:
    """Yield a span in pieces of at most `size`."""
    for first in range(span[0], span[1], size):
        yield first, min(first + size, span[1])


@dataclass
class Scratch:
    """Large buffers kept from one call to the next: fresh memory costs a page fault every 4 KiB.

    At most `limit` bytes are kept. A buffer of a cancelled operation must not be given back: a
    thread may still write to it. Thread-safe: operations in flight share one.
    """

    limit: int = 1 << 30
    _kept: list[torch.Tensor] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a 1-D tensor that nobody else has, not filled."""
        size = count * dtype.itemsize
        with self._lock:
            fitting = [i for i, kept in enumerate(self._kept) if size <= kept.numel() <= 2 * size]
            data = self._kept.pop(fitting[-1]) if fitting else torch.empty(size, dtype=torch.uint8)
        return data[:size].view(dtype)

    def give(self, buffer: torch.Tensor) -> None:
        """Keep a buffer for later, that nobody uses any more."""
        data = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
        with self._lock:
            self._kept.append(data)
            while sum(kept.numel() for kept in self._kept) > self.limit:
                del self._kept[0]
