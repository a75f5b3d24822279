"""What waits to be sent to one member: all of its streams take from here, the free one first."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from collectives.mesh.framing import Kind, Piece


class Sender(Protocol):
    """Whose piece it is."""

    @property
    def key(self) -> bytes:
        """Its operation's name on the wire."""

    @property
    def wanted(self) -> bool:
        """Tell whether its pieces still have a use."""

    def left(self) -> None:
        """One of its pieces has left, or never will."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One piece on its way out."""

    sender: Sender
    kind: Kind
    piece: Piece
    payload: memoryview


class SendQueue:
    """First in, first out; its readers can be told to ask again whether they shall end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Outgoing] = deque()
        self._closed = False

    def put(self, items: list[Outgoing]) -> None:
        """Append pieces; after `close` they are let go at once."""
        with self._changed:
            if not self._closed:
                self._items.extend(items)
                self._changed.notify(len(items))
                return
        for item in items:
            item.sender.left()

    def take(self, ended: Callable[[], bool]) -> Outgoing | None:
        """Wait for the next piece that is still wanted; None when `ended` says so, at the latest after `wake`."""
        while True:
            with self._changed:
                while not self._items and not self._closed and not ended():
                    self._changed.wait()
                if self._closed or ended():
                    self._changed.notify()  # another reader has to take what this one was woken for
                    return None
                item = self._items.popleft()
            if item.sender.wanted:
                return item
            item.sender.left()

    def wake(self) -> None:
        """Let every reader ask again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let everything go: nobody will carry it."""
        with self._changed:
            self._closed = True
            dropped = list(self._items)
            self._items.clear()
            self._changed.notify_all()
        for item in dropped:
            item.sender.left()
