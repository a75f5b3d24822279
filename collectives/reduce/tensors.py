"""Tensors and arrays as collectives see them: one dimension, contiguous, on the CPU.

`flatten` gives what a member contributes. Where it can it is a view of the caller's memory, and
nobody writes to it; what was reduced is scratch, and `publish` copies it back when the operation
has committed. So an operation that is called off has touched nothing.

A tensor of another device is copied to the CPU, and back.
`DTYPES` are the types that can be reduced, `MOVED` those that can be sent as they are. NumPy has no bfloat16 and torch
no strings, dates, structures or foreign byte order: those are refused here, before anything is sent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # its stub exports one of them

from collectives.errors import BadArgument

TensorLike: TypeAlias = torch.Tensor | np.ndarray[Any, Any]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
COMPLEX = (torch.complex64, torch.complex128)
FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *SIGNED, *UNSIGNED)}
MOVED = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bool, *COMPLEX, *FLOATS_8)}
_NAMES = {dtype: name for name, dtype in MOVED.items()}


def dtype_name(x: TensorLike, among: Mapping[str, torch.dtype] = MOVED) -> str:
    """Return the name of the element type, the same for a tensor and an array: "float32", say.

    Raises:
        BadArgument: `x` is neither, or of a type that is not `among` these.
    """
    if isinstance(x, torch.Tensor):
        name = _NAMES.get(x.dtype, "")
        if name not in among or x.layout is not torch.strided or x.is_meta:
            raise _refused(f"a {x.layout} tensor of {x.dtype} on {x.device}", among)
        return name
    if isinstance(x, np.ndarray):
        if x.dtype.name not in among or not x.dtype.isnative:
            raise _refused(f"an array of {x.dtype!r}", among)
        return x.dtype.name
    raise _refused(f"a {type(x).__name__}", among)


def _refused(what: str, among: Mapping[str, torch.dtype]) -> BadArgument:
    verb = "reduce" if among is DTYPES else "send"
    return BadArgument(
        f"cannot {verb} {what}: give a dense torch.Tensor or numpy.ndarray of one of {', '.join(among)}, "
        "in this machine's byte order"
    )


def flatten(x: TensorLike) -> torch.Tensor:
    """Return the values of `x` in row-major order, 1-D, contiguous, on the CPU; read it only.

    It shares the memory of a contiguous `x` on the CPU, and else is a copy.

    Raises:
        BadArgument: as `dtype_name`.
    """
    dtype_name(x)
    if isinstance(x, torch.Tensor):
        # A tensor's lazy negation and conjugation are not in its memory yet.
        return set_apart(on_cpu(packed(x.detach().reshape(-1).contiguous().resolve_conj().resolve_neg())))
    rows = np.ascontiguousarray(x).reshape(-1)
    # torch warns of a read-only array, and refuses the stride that one element of a reversed array has.
    return packed(torch.from_numpy(rows if rows.flags.writeable and rows.size > 1 else rows.copy()))


def on_cpu(flat: torch.Tensor) -> torch.Tensor:
    """Return the values on the CPU: the same tensor if it is there, else a copy, once the device has computed it."""
    return flat.cpu()


def packed(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous 1-D tensor with stride 1: to torch one element, or none, is contiguous at any stride."""
    return x.as_strided(x.shape, (1,))


def check_target(x: TensorLike, out: TensorLike | None) -> TensorLike:
    """Return where the result of reducing `x` goes: `out`, or `x` itself.

    Raises:
        BadArgument: it cannot hold the result, or cannot be written.
    """
    target = x if out is None else out
    if dtype_name(target) != dtype_name(x) or tuple(target.shape) != tuple(x.shape):
        raise BadArgument(
            f"out is {dtype_name(target)} of shape {tuple(target.shape)}, the result {dtype_name(x)} "
            f"of shape {tuple(x.shape)}: give an out like the input"
        )
    if isinstance(target, np.ndarray):
        writable = target.flags.writeable and not _shares_memory(target.strides, target.shape, target.itemsize)
    else:
        writable = not _shares_memory(target.stride(), target.shape, 1)
    if not writable:
        raise BadArgument("the buffer cannot be written (read-only, expanded or unfolded): give a writable out=")
    return target


def _shares_memory(strides: Sequence[int], shape: Sequence[int], element: int) -> bool:
    """Tell whether elements may share memory, as expand() and unfold() make them: they cannot hold different results.

    Each stride must reach beyond all that the smaller ones span. `element` is an element's length, in their unit.
    """
    if 0 in shape:
        return False
    span = element
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def publish(result: torch.Tensor, target: TensorLike) -> None:
    """Copy a flat result of the same type into `target`, of any layout and device."""
    if isinstance(target, torch.Tensor):
        # A tensor made under inference_mode can be written under it only, and this may be another thread.
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(result.view(target.shape))
    else:
        np.copyto(target, result.numpy().reshape(target.shape))


def publish_pieces(parts: Sequence[tuple[tuple[int, int], torch.Tensor]], target: TensorLike) -> None:
    """Copy flat results, each with its place (first and end), into `target`, of any layout and device."""
    if not (target.is_contiguous() if isinstance(target, torch.Tensor) else target.flags.c_contiguous):
        publish(torch.cat([part for _, part in parts]), target)
        return
    if isinstance(target, np.ndarray):
        for (first, end), part in parts:
            np.copyto(target.reshape(-1)[first:end], part.numpy())
        return
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        for (first, end), part in parts:
            target.view(-1)[first:end].copy_(part)


def fresh(like: TensorLike, shape: Sequence[int]) -> TensorLike:
    """Return a new buffer of the kind, type and device of `like`, of `shape`, not filled."""
    if isinstance(like, torch.Tensor):
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return np.empty(tuple(shape), dtype=like.dtype)


def set_apart(x: torch.Tensor) -> torch.Tensor:
    """Return the same memory as another tensor, with a storage object of its own; it is no tensor of inference mode.

    `Tensor.numpy` marks a storage as one that can never be resized. FSDP resizes its parameters' storages, so the
    caller's must stay unmarked.
    """
    alias: torch.Tensor = from_dlpack(to_dlpack(x.view(torch.uint8)))  # it does not know all types
    return alias.view(x.dtype)


def memory(flat: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous 1-D CPU tensor, without a copy."""
    return flat.view(torch.uint8).numpy().data
