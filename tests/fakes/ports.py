"""Ports in one process for state transfer: questions, answers, and sources that fail on purpose."""

import threading
from collections.abc import Callable, Mapping

from collectives.errors import Aborted, DeadlineExceeded
from collectives.mesh.port import SourceLost

LIMIT = 20.0


class Room:
    """Members that can ask each other; `fault(source, asker, answer)` may change an answer, stall it or raise."""

    def __init__(self, members, fault: Callable | None = None) -> None:
        self.fault = fault
        self.handlers: dict = {}
        self.served = threading.Condition()
        self.asked: list = []
        self.ports = {member: RoomPort(self, member) for member in members}

    def cancel(self, reason: str) -> None:
        for port in self.ports.values():
            port.cancel(reason)


class RoomTicket:
    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.event.is_set()


class RoomPort:
    def __init__(self, room: Room, own) -> None:
        self.room = room
        self.own = own
        self.tickets: list[RoomTicket] = []
        self.cancelled = ""

    def serve(self, handler) -> None:
        with self.room.served:
            self.room.handlers[self.own] = handler
            self.room.served.notify_all()

    def request(self, source, question: bytes, into: memoryview) -> RoomTicket:
        if self.cancelled:
            raise Aborted(self.cancelled)
        ticket = RoomTicket()
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(source, question, into, ticket), daemon=True).start()
        return ticket

    def _answer(self, source, question, into, ticket) -> None:
        room = self.room
        with room.served:
            room.served.wait_for(lambda: source in room.handlers, LIMIT)
            room.asked.append((self.own, source, question))
        try:
            answer = room.handlers[source](self.own, bytes(question))
            if room.fault:
                answer = room.fault(source, self.own, answer)
            if answer is None or len(answer) != len(into):
                raise SourceLost(f"{source} refused")
            into[:] = answer
        except SourceLost as error:
            ticket.error = error
        ticket.event.set()

    def wait(self, ticket: RoomTicket) -> None:
        if not ticket.event.wait(LIMIT):
            raise DeadlineExceeded("too slow")
        if self.cancelled:
            raise Aborted(self.cancelled)
        if ticket.error:
            raise ticket.error

    def cancel(self, reason: str) -> None:
        self.cancelled = reason
        for ticket in self.tickets:
            ticket.event.set()


def on_threads(work: Mapping[str, Callable]) -> dict:
    """Run each member's work on a thread of its own; return results, or the errors that they raised."""
    results: dict = {}

    def run(member: str, do: Callable) -> None:
        try:
            results[member] = do()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            results[member] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a member hangs"
    return results
