"""Calls on threads of their own that the end of the process does not wait for, and a wait for async functions."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def settle(future: "Future[T]", call: Callable[[], T]) -> None:
    """Make the call, and let `future` have what comes of it: its result, or what it raised."""
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
        future.set_exception(error)


def on_daemon(call: Callable[[], T], name: str) -> "Future[T]":
    """Make the call on a daemon thread of this name; return what will hold its result."""
    future: Future[T] = Future()
    threading.Thread(target=settle, args=(future, call), name=name, daemon=True).start()
    return future


class CallThread:
    """A daemon thread that makes the calls given to it one after the other, in their order."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_make_calls, args=(self._calls,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether this is the thread that asks."""
        return threading.current_thread() is self._thread

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Let the call wait for its turn; return what will hold its result. One that is cancelled is not made."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def end(self) -> None:
        """End the thread after the calls that wait."""
        self._calls.put(None)


def _make_calls(calls: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (given := calls.get()) is not None:
        future, call = given
        if future.set_running_or_notify_cancel():
            settle(future, call)
        del given, future, call  # or the last call's objects would live until the next one


def awaited(value: Any) -> Any:
    """Return `value`, or what it gives where it is awaitable; raise what it raises.

    This also works in a notebook, whose main thread has a loop that runs: then another thread waits for it.
    """
    if not inspect.isawaitable(value):
        return value

    async def given() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(given())
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, given()).result()
