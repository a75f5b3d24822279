"""How float values travel in fewer bytes: one encoding of fixed size for each run of values.

A run is cut into blocks of 256 values, so that one large value costs precision near it only.
With M the greatest magnitude of a block's finite values:

    codec             what travels for a block               |decoded - value| is at most
    FLOAT16           int16 exponent, 256 float16            2^-11 |value| + 2^-39 M
    BFLOAT16          int16 exponent, 256 bfloat16           2^-8 |value| + 2^-133 M
    INT8              scale, 256 int8                        M / 254       (M / 252 beside NaN or infinity)

and for the arithmetic itself 2^-20 M more; where M is subnormal, a step of the subnormals for each
code, and in a FLOAT16 block of float64 values 2^-1047, half a step of a float16 that is subnormal too.
Scales are float32, and float64 for float64 values. The 16-bit codecs first divide by a power of two, the
exponent: what was finite does not overflow, and small gradients are not lost.

**NaN and infinity pass.** Each is a value of float16 and bfloat16. An 8-bit block that holds any
has a negative scale, and three of its codes stand for NaN, +inf and -inf; the finite values beside
them keep their bound.

**Bit parity**: a result is encoded once, by the member that reduced it, and that member takes what
the others will decode. Decoding is one product and at most one sum a value, each rounded by
itself, so it gives the same bits on every machine.

Integers travel as they are, whatever the codec, and so do 16-bit floats under the 16-bit codecs.

**Error feedback** (`Feedback`): what a lossy codec loses of a member's contribution is added to its next one. A member
makes errors when it encodes its values, a partial sum, or as owner the result. It adds these errors, in units of its
own contribution, to what it contributes next time. So errors do not pile up over steps: with steps small against
values, the mean of the results tends to that of the exact ones (1-bit SGD, Seide et al. 2014; Karimireddy et al. 2019,
"Error feedback fixes SignSGD"). The caller holds one object for each tensor that it reduces again and again, with SUM
or AVG.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from collectives.errors import BadArgument
from collectives.types import Codec, Op

BLOCK = 256  # values: a float32 scale adds 1.6 % to their codes; a row of weights is seldom shorter
_HALVES = (torch.float16, torch.bfloat16)


class Coder(Protocol):
    """One codec for one type. Values are 1-D tensors of the work type, float32 or float64."""

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the encoding, as uint8."""

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        """Fill `into` with the values of their encoding."""


def coder_for(codec: Codec, dtype: torch.dtype) -> Coder | None:
    """Return how values of `dtype` are encoded, None where they travel as they are."""
    return CODERS[codec](dtype) if dtype.is_floating_point else None


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Return the values as rows of a block each; a last one too short is filled up with its last value."""
    short = -values.numel() % BLOCK
    return (torch.cat((values, values[-1:].expand(short))) if short else values).view(-1, BLOCK)


def _powers_of_two(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 2 to the (normal) exponents, by putting them where the format has them (IEEE 754)."""
    if dtype is torch.float64:
        return ((exponents.to(torch.int64) + 1023) << 52).view(dtype)
    return ((exponents.to(torch.int32) + 127) << 23).view(dtype)


class _Half:
    """An int16 exponent for each block; then the values, divided by 2 to that power, in a type of 16 bits."""

    def __init__(self, half: torch.dtype) -> None:
        self._half = half
        # The greatest of a float16 block becomes 2^14 to 2^15: far from both ends. Any would do for bfloat16.
        self._top, self._below_top = (15, 32752.0) if half is torch.float16 else (2, 3.984375)

    def size(self, count: int) -> int:
        return 2 * _blocks(count) + 2 * count

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        data = torch.empty(self.size(values.numel()), dtype=torch.uint8)
        if not values.numel():
            return data
        rows = _rows(values)
        greatest = rows.abs().amax(1)
        if not bool(greatest.isfinite().all()):
            greatest = torch.where(rows.isfinite(), rows, 0).abs_().amax(1)
        least = -1022 if values.dtype is torch.float64 else -126  # so that both factors are normal numbers
        exponents = (torch.frexp(greatest).exponent - self._top).clamp_(min=least)
        scaled = rows * _powers_of_two(-exponents, values.dtype)[:, None]
        if bool((greatest > 0.99 * torch.finfo(values.dtype).max).any()):
            # Rounding up would give the next power of two, which the type of the values does not have.
            limit = torch.where(scaled.isfinite(), self._below_top, torch.inf)
            scaled = torch.where(scaled.isnan(), scaled, scaled.clamp(-limit, limit))
        head = 2 * len(rows)
        data[:head].view(torch.int16).copy_(exponents)
        data[head:].view(self._half).copy_(scaled.view(-1)[: values.numel()])
        return data

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        if not into.numel():
            return
        head = 2 * _blocks(into.numel())
        factors = _powers_of_two(data[:head].view(torch.int16), into.dtype)
        into.copy_(data[head:].view(self._half))
        whole = into.numel() // BLOCK
        into[: whole * BLOCK].view(-1, BLOCK).mul_(factors[:whole, None])
        into[whole * BLOCK :].mul_(factors[-1])


class _Int8:
    """A scale for each block; then a code of 8 bits a value. A negative scale marks a block with special codes."""

    levels, levels_beside_specials = 127, 126  # the greatest code of a finite value
    nan, plus, minus = -128, 127, -127

    def __init__(self, scale: torch.dtype) -> None:
        self._scale = scale
        self._scale_bytes = torch.finfo(scale).bits // 8

    def size(self, count: int) -> int:
        return self._scale_bytes * _blocks(count) + count

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        count = values.numel()
        data = torch.empty(self.size(count), dtype=torch.uint8)
        if not count:
            return data
        rows = _rows(values)
        greatest = rows.abs().amax(1)
        given, finite, specials = rows, None, None
        levels = torch.full_like(greatest, self.levels)
        if not bool(greatest.isfinite().all()):
            finite = rows.isfinite()
            specials = ~finite.all(1)
            rows = torch.where(finite, rows, 0)
            greatest = rows.abs().amax(1)
            levels.masked_fill_(specials, self.levels_beside_specials)
        scale = greatest / levels
        divisor = torch.where(scale == 0, 1, scale)  # a block of nothing, or of next to nothing
        codes = (rows / divisor[:, None]).round_().clamp_(-levels[:, None], levels[:, None])
        if finite is not None and specials is not None:
            codes = torch.where(finite, codes, self._special_codes(given))
            scale = torch.where(specials, -scale, scale)
        scales, all_codes = self._parts(data, count)
        scales.copy_(scale)
        all_codes.copy_(codes.view(-1)[:count])
        return data

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        count = into.numel()
        if not count:
            return
        scales, codes = self._parts(data, count)
        rows = into.view(-1, BLOCK) if count % BLOCK == 0 else into.new_empty((_blocks(count), BLOCK))
        rows.view(-1)[:count] = codes
        rows.view(-1)[count:] = 0
        scale = scales.to(into.dtype)  # not in place: these are the bytes that others get
        marked = scale.signbit()
        special = rows[marked] if bool(marked.any()) else None
        scale = scale.abs()
        rows.mul_(scale[:, None])
        if not bool((scale * self.levels).isfinite().all()):  # rounding up at the very end of the type's range
            end = torch.finfo(rows.dtype).max
            rows.clamp_(-end, end)
        if special is not None:
            for code, value in ((self.nan, torch.nan), (self.plus, torch.inf), (self.minus, -torch.inf)):
                rows[marked] = torch.where(special == code, value, rows[marked])
        if count % BLOCK:
            into.copy_(rows.view(-1)[:count])

    def _parts(self, data: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        head = _blocks(count) * self._scale_bytes
        return data[:head].view(self._scale), data[head:].view(torch.int8)

    def _special_codes(self, rows: torch.Tensor) -> torch.Tensor:
        codes = torch.where(rows > 0, float(self.plus), float(self.minus))
        return codes.masked_fill_(rows.isnan(), float(self.nan)).to(rows.dtype)


def _half(half: torch.dtype) -> Callable[[torch.dtype], Coder | None]:
    return lambda dtype: None if dtype in _HALVES else _Half(half)


def _int8(dtype: torch.dtype) -> Coder:
    return _Int8(torch.float64 if dtype is torch.float64 else torch.float32)


CODERS: Mapping[Codec, Callable[[torch.dtype], Coder | None]] = {  # from the values' floating type to their coder
    Codec.NONE: lambda dtype: None,
    Codec.FLOAT16: _half(torch.float16),
    Codec.BFLOAT16: _half(torch.bfloat16),
    Codec.INT8: _int8,
}
assert set(CODERS) == set(Codec), "each codec has its coder"


class Feedback:
    """The residual of one tensor, kept across calls. It changes only when an operation commits."""

    def __init__(self) -> None:
        self.residual: torch.Tensor | None = None
        self._next: torch.Tensor | None = None

    def check(self, count: int, op: Op) -> None:
        """Raise `BadArgument` if the operation has no error feedback, or the tensor had another size before."""
        if op not in (Op.SUM, Op.AVG):
            raise BadArgument(f"error feedback with {op.name}: it is for SUM and AVG only")
        if self.residual is not None and self.residual.numel() != count:
            raise BadArgument(
                f"error feedback of {self.residual.numel()} values for a tensor of {count}: "
                "keep one Feedback for each tensor"
            )

    def start(self, flat: torch.Tensor, op: Op, work: torch.dtype) -> torch.Tensor:
        """Return the values plus the residual, and begin to collect the next. Raises `BadArgument` as `check`."""
        self.check(flat.numel(), op)
        self._next = torch.zeros(flat.numel(), dtype=work)
        return flat.to(work) if self.residual is None else flat.to(work) + self.residual.to(work)

    def lost(self, first: int, wanted: torch.Tensor, got: torch.Tensor, factor: float = 1.0) -> None:
        """Note that `got` was used in place of `wanted`, from value `first` on; `factor` makes it our units."""
        if self._next is not None:
            # NaN and infinity arrive as they are: there is nothing to make good.
            error = torch.nan_to_num((wanted - got).mul_(factor), nan=0.0, posinf=0.0, neginf=0.0)
            self._next[first : first + wanted.numel()] += error

    def commit(self) -> None:
        """The operation counted: keep what it lost for the next."""
        if self._next is not None:
            self.residual, self._next = self._next, None

    def abort(self) -> None:
        """The operation did not count: the residual stays."""
        self._next = None
