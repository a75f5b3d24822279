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
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from collectives.errors import BadArgument
from collectives.types import Op
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
    unit = counted.pop() if len(counted) == 1 else 2.0 ** math.frexp(max(counted))[1]
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
