"""torch's `Work`: one operation under way, which somebody may wait for, look at, or take the future of."""

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FunctionType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.futures import Future

C = TypeVar("C", bound=type)

_TorchWork: Any = vars(dist)["_Work"]
threads: WeakSet[threading.Thread] = WeakSet()  # of works that nobody waits for without a time-out


def untraced(kind: C) -> C:
    """Keep torch's compiler out of the methods of a class that torch calls: those of its own backends are C++."""
    for name, method in list(vars(kind).items()):
        is_torchs = not name.startswith("_") or hasattr(kind.__base__, name)
        if isinstance(method, FunctionType) and is_torchs and name != "__init__":
            setattr(kind, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]
    return kind


@untraced
class Work(_TorchWork):
    """One operation under way. `finish`, if there is one, is carried out by whoever waits without a time-out.

    For those who wait otherwise (a time-out, a future, a look whether it is over) a thread carries it out.
    """

    def __init__(self, tensors: Any, finish: Callable[[], None] | None, keep: Any) -> None:
        super().__init__()
        self.source = -1
        self._tensors = tensors
        self._finish = finish
        self._keep = keep  # memory that is sent from, or received to
        self._has_thread = False
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._root: Future[None] = Future(devices=_devices_of(tensors))
        self._future = self._root.then(self._conclude)

    def end(self, error: BaseException | None) -> None:
        """Note that it is over, and what it failed with."""
        self._error = error
        self._finish = self._keep = None
        self._over.set()
        self._root.set_result(None)  # with an exception set instead, DDP's own callback would end the process

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is over. Raises `BackendError`, or TimeoutError if `timeout` passed before."""
        seconds = seconds_of(timeout)
        if seconds is None:
            self._carry_out()
        else:
            self._carry_out_on_a_thread()
        if not self._over.wait(seconds):
            raise TimeoutError("it is not over: wait for it again")
        if self._error is not None:
            raise self._error
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Tell whether `wait` would return at once."""
        self._carry_out_on_a_thread()
        return self._over.is_set()

    def is_success(self) -> bool:
        """Tell whether it is over and did not fail."""
        return self._over.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        """Return what it failed with."""
        return self._error

    def result(self) -> Any:
        """Return the tensors."""
        return self._tensors

    def source_rank(self) -> int:
        """Return whom it was received from."""
        return self.source

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Return a future of the tensors."""
        self._carry_out_on_a_thread()
        return self._future

    def _carry_out_on_a_thread(self) -> None:
        if self._finish is not None and not self._has_thread:
            self._has_thread = True
            thread = threading.Thread(target=self._carry_out, name="gossamer-torch", daemon=True)
            thread.start()
            threads.add(thread)

    def _carry_out(self) -> None:
        with self._lock:
            if self._finish is None:
                return
            error: BaseException | None = None
            try:
                self._finish()
            except BaseException as failed:  # noqa: BLE001  # it belongs to whoever waits
                error = failed
            self.end(error)

    def _conclude(self, _: Any) -> Any:
        if self._error is not None:
            raise RuntimeError(str(self._error))
        return self._tensors


def seconds_of(timeout: timedelta | None) -> float | None:
    """Return a time-out in seconds; None where none was given."""
    if timeout is None or timeout.total_seconds() <= 0:
        return None
    return timeout.total_seconds()


def queued(tensors: Any) -> Callable[[], None]:
    """Return a wait for all that this thread has queued on the devices of these tensors, nested in lists or not."""
    events = [torch.cuda.current_stream(device).record_event() for device in _devices_of(tensors)]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


def _devices_of(tensors: Any) -> list[Any]:
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
