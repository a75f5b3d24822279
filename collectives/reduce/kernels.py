"""The arithmetic of a reduction: `start` with one member's values, `combine` the others', `finish`.

Each element is reduced in one order, by one member at a time, so everybody's result has the
same bits. Values are 1-D contiguous CPU tensors, and accumulate in `work_dtype`:

    values                 operation             work dtype   rounded
    float16, bfloat16      all                   float32      once, by `finish`
    float32, float64       all                   the same     at each step, as always
    integers               SUM PROD MIN MAX      the same     exact; SUM and PROD wrap around
    integers               AVG                   float64      once, towards zero

AVG is sum(weight * x) / sum(weight). A member of weight 0 does not count at all: its values,
NaN included, are not looked at. Weights are scaled first, so that equal ones are 1 and cost nothing,
and large ones (numbers of tokens) do not overflow. An AVG of 64-bit integers is exact
while the sum stays within 2^53. MIN and MAX of a NaN is NaN.

NumPy computes where it has the type, because it has every unsigned type, stays on the thread
that calls it, and releases the interpreter; torch adds 16-bit floats to float32.

A `Reduction` is one all-reduce as every member knows it: the same at all of them, so that all do the same
sums. Beside it, what the algorithms share: how a tensor is cut, and scratch memory.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from collectives.errors import BadArgument
from collectives.reduce.codecs import BLOCK, Coder, coder_for
from collectives.types import Codec, Op
from protocol.identity import NodeId

_HALVES = (torch.float16, torch.bfloat16)
_COMBINE: dict[Op, Callable[..., Any]] = {
    Op.SUM: np.add,
    Op.AVG: np.add,
    Op.PROD: np.multiply,
    Op.MIN: np.minimum,
    Op.MAX: np.maximum,
}
_COMBINE_HALVES: dict[Op, Callable[..., Any]] = {
    Op.SUM: torch.add,
    Op.AVG: torch.add,
    Op.PROD: torch.mul,
    Op.MIN: torch.minimum,
    Op.MAX: torch.maximum,
}


def work_dtype(dtype: torch.dtype, op: Op) -> torch.dtype:
    """Return the type that values of `dtype` accumulate in."""
    if dtype in _HALVES:
        return torch.float32
    if op is Op.AVG and not dtype.is_floating_point:
        return torch.float64
    return dtype


def check_weight(weight: float) -> float:
    """Return a member's own weight.

    Raises:
        BadArgument: it is negative, infinite or NaN.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise BadArgument(f"weight = {weight}: give a finite number of at least 0")
    return float(weight)


def scaled_weights(order: Sequence[NodeId], weights: Mapping[NodeId, float], op: Op) -> dict[NodeId, float]:
    """Return each member's weight in a unit that suits all: 1 for all where `op` is not AVG.

    Raises:
        BadArgument: all weights are 0, so there is no mean. Everybody knows all weights and raises.
    """
    if op is not Op.AVG:
        return dict.fromkeys(order, 1.0)
    counted = {weights[member] for member in order if weights[member]}
    if not counted:
        raise BadArgument("every member gave weight 0, so there is no mean: let one give more")
    # A power of two, so that scaling itself rounds nothing.
    unit = counted.pop() if len(counted) == 1 else 2.0 ** min(math.frexp(max(counted))[1], sys.float_info.max_exp - 1)
    return {member: weights[member] / unit for member in order}


def start(values: torch.Tensor, weight: float, into: torch.Tensor) -> None:
    """Fill the accumulator with a first member's values; weight 0 fills it with zeros."""
    if weight == 0:
        into.zero_()
    elif weight != 1:
        with np.errstate(all="ignore"):
            np.multiply(_numpy(values), weight, out=into.numpy(), casting="same_kind", dtype=into.numpy().dtype)
    elif values.dtype in _HALVES:
        into.copy_(values)
    else:
        np.copyto(into.numpy(), values.numpy(), casting="unsafe")


def combine(op: Op, into: torch.Tensor, values: torch.Tensor, weight: float) -> None:
    """Take another member's values (of the tensor's type or the work type) into the accumulator, in place."""
    if weight == 0:
        return
    if values.dtype in _HALVES and weight == 1:
        _COMBINE_HALVES[op](into, values, out=into)
        return
    accumulator = into.numpy()
    with np.errstate(all="ignore"):  # overflow and NaN are results here
        operand = _numpy(values)
        if weight != 1:
            operand = np.multiply(operand, weight, dtype=accumulator.dtype)
        _COMBINE[op](accumulator, operand, out=accumulator)


def pair(op: Op, first: torch.Tensor, second: torch.Tensor, into: torch.Tensor) -> bool:
    """Start and combine two members of weight 1 in one pass over memory, if the types allow it."""
    if not first.dtype == second.dtype == into.dtype:
        return False
    with np.errstate(all="ignore"):
        _COMBINE[op](first.numpy(), second.numpy(), out=into.numpy())
    return True


def add_up(job: "Reduction", values_of: Callable[[NodeId], torch.Tensor], work: torch.Tensor) -> None:
    """Fill the accumulator with the members' values, in their order; `values_of` returns those of one member."""
    counted = [member for member in job.order if job.weights[member]]
    first, rest = values_of(counted[0]), counted[1:]
    if rest and job.weights[counted[0]] == job.weights[rest[0]] == 1:
        second = values_of(rest[0])
        if pair(job.op, first, second, work):
            rest = rest[1:]
        else:
            start(first, 1.0, work)
    else:
        start(first, job.weights[counted[0]], work)
    for member in rest:
        combine(job.op, work, values_of(member), job.weights[member])


def finish(op: Op, work: torch.Tensor, total: float, into: torch.Tensor) -> None:
    """Turn the accumulator, which may be `into` itself, into the result; `total` is the sum of the weights."""
    if op is Op.AVG and total != 1:
        with np.errstate(all="ignore"):
            np.divide(work.numpy(), total, out=work.numpy())
    if work is into or work.data_ptr() == into.data_ptr():
        return
    if into.dtype.is_floating_point:
        into.copy_(work)
    else:
        _truncate(work.numpy(), into.numpy())


def _truncate(work: "np.ndarray[Any, Any]", into: "np.ndarray[Any, Any]") -> None:
    if not work.size:
        return
    if into.dtype != work.dtype and into.dtype.itemsize == 8 and work.dtype.kind == "f":
        # The greatest 64-bit integers are not float64: the mean of equal ones would round past the end.
        limits = np.iinfo(into.dtype)
        np.clip(work, float(limits.min), np.nextafter(float(limits.max), 0), out=work)
    np.copyto(into, work, casting="unsafe")


def _numpy(values: torch.Tensor) -> "np.ndarray[Any, Any]":
    return values.float().numpy() if values.dtype in _HALVES else values.numpy()


# Bytes of values in one payload: large enough that a payload's fixed cost (some 50 us on both sides)
# does not show, small enough that receiving, adding and sending overlap and stay in cache.
CHUNK_BYTES = 1 << 20
Span = tuple[int, int]


@dataclass(frozen=True)
class Reduction:
    """What is reduced, in which order, how it travels.

    `weights` are those of `scaled_weights`; `coder` is None where values travel as they are.
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


def cut(count: int, parts: int) -> list[Span]:
    """Cut `count` values into so many equal parts, at the codecs' blocks."""
    blocks = -(-count // BLOCK)
    edges = [min(count, round(blocks * part / parts) * BLOCK) for part in range(parts)]
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
