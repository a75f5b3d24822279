"""Pinned staging (CUDA): a tensor's values come to pinned memory, and results go back, chunk by chunk.

    device  -- copies -->  pinned memory  -- wire -->  other members       `staged[first:end]` waits for that part alone
    device  <-- copies --  pinned memory  <-- wire --  other members       `land` queues a part, `landed` waits for all

Copies run on a stream of their own, beside the device's other work. So the first chunks are on the wire while later
ones are still being copied. The device copies at full speed to pinned memory only.

`Copies` is all that is known of a device. Another kind of device needs a class like `CudaCopies`, and a line in
`copies_of`. The tests have one that is late on purpose.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from collectives.reduce.kernels import cut

STAGE_BYTES = 1 << 20  # of a copy: 40 us at 25 GB/s, beside some 5 us to queue it
Wait = Callable[[], None]


class Values(Protocol):
    """The source of a member's own values: a flat tensor on the CPU, or `Staged`."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of an element."""

    @property
    def nbytes(self) -> int:
        """The length in bytes."""

    def numel(self) -> int:
        """Return how many there are."""

    def __getitem__(self, span: slice, /) -> torch.Tensor:
        """Return these values, on the CPU. May wait for them."""


class Copies(Protocol):
    """Copies between a device and pinned memory, carried out in the order in which they are queued."""

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the CPU that the device copies to and from, 1-D, not filled."""

    def queue(self, source: torch.Tensor, into: torch.Tensor) -> Wait:
        """Queue a copy and return at once; what is returned waits until this one and those before it are done."""


class CudaCopies:
    """See `Copies`. They begin once all that this thread queued on its current stream is done."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Copies`."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def queue(self, source: torch.Tensor, into: torch.Tensor) -> Wait:
        """See `Copies`."""
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        for tensor in (source, into):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # its memory goes to no other tensor before the copy is done
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize


def copies_of(tensor: torch.Tensor) -> Copies | None:
    """Return what copies this tensor's values; None: they need no staging."""
    return CudaCopies(tensor.device) if tensor.is_cuda else None


class Staged:
    """The values of a tensor on a device, in pinned memory. One thread at a time uses it."""

    def __init__(self, flat: torch.Tensor, copies: Copies, slices: int = 1) -> None:
        """Begin to copy.

        Args:
            flat: the values, 1-D and contiguous, on the device. They must not change until all were asked for.
            copies: those of the device.
            slices: how many equal parts will be read side by side; the first chunks of all of them come first.
        """
        self.dtype, self.nbytes, self.device = flat.dtype, flat.nbytes, flat.device
        self.memory = copies.pinned(flat.numel(), flat.dtype)
        self._copies = copies
        self._step = max(1, STAGE_BYTES // flat.itemsize)
        self._coming: dict[int, Wait] = {}
        self._going: Wait | None = None
        starts = [first for first, _ in cut(flat.numel(), [1.0] * slices)]

        def place_in_its_slice(first: int) -> int:
            return first - max(start for start in starts if start < first + self._step)

        for first in sorted(range(0, flat.numel(), self._step), key=place_in_its_slice):
            span = slice(first, first + self._step)
            self._coming[first] = copies.queue(flat[span], self.memory[span])

    def numel(self) -> int:
        """Return how many values there are."""
        return self.memory.numel()

    def __getitem__(self, span: slice, /) -> torch.Tensor:
        """Return these values once they are here: a view of the pinned memory."""
        first, end, _ = span.indices(self.numel())
        for chunk in range(first // self._step * self._step, end, self._step):
            wait = self._coming.pop(chunk, None)
            if wait is not None:
                wait()
        return self.memory[first:end]

    def land(self, first: int, results: torch.Tensor, target: torch.Tensor) -> None:
        """Queue results on their way to the device: those from value `first` on, to the same place of `target`.

        `target` is flat, and on `device`: copies to another one would run on a stream of that one, which nobody waits
        for. The results may lie in `memory` already. They take the values' place there, so nobody may need those any
        more.
        """
        for at in range(0, results.numel(), self._step):
            part = results[at : at + self._step]
            place = self[first + at : first + at + part.numel()]
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)
            self._going = self._copies.queue(place, target[first + at :][: part.numel()])

    def landed(self) -> None:
        """Wait until all results are on the device."""
        if self._going is not None:
            self._going()


def queued(tensors: Any) -> Wait:
    """Return a wait for all that this thread has queued on the devices of these tensors, nested in lists or not."""
    events = [torch.cuda.current_stream(device).record_event() for device in devices_of(tensors)]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


def devices_of(tensors: Any) -> list[Any]:
    """Return the CUDA devices of these tensors."""
    # Before CUDA starts no tensor is on a device, and a look at each takes a tenth of a small call's time.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return sorted({tensor.device for tensor in _each(tensors) if tensor.is_cuda}, key=str)


def _each(tensors: Any) -> Iterator[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        yield tensors
    elif isinstance(tensors, Sequence):
        for tensor in tensors:
            yield from _each(tensor)
