"""A call on a thread of its own that the end of the process does not wait for, and a wait for async functions."""

import asyncio
import inspect
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
