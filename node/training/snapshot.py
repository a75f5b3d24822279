"""A copy of what is trained, in main memory: a checkpoint is written from it while training goes on."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from node.processes.machine import available_memory

T = TypeVar("T")
MOST = 0.5  # of the free memory; the next round may want the rest


def copied(state: T) -> T | None:
    """Return a copy of a tree of dictionaries, lists, tensors and plain values; None where it would be too large.

    Tensors that share their numbers go on to share them: safetensors writes tied weights once.
    """
    if size_of(state) > MOST * available_memory():
        return None
    tensors = {_place(tensor): tensor for tensor in _tensors(state)}
    copies = {place: one.detach().to("cpu", copy=True) for place, one in tensors.items()}
    return _replaced(state, copies)


def size_of(state: Any) -> int:
    """Return the bytes of the tensors in a tree; those that share their numbers count once."""
    return sum(tensor.nbytes for tensor in {_place(tensor): tensor for tensor in _tensors(state)}.values())


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _tensors(part)


def _replaced(state: Any, copies: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        return copies[_place(state)]
    if isinstance(state, dict):
        return {key: _replaced(part, copies) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_replaced(part, copies) for part in state)
    return state
