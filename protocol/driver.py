"""One step of a node on whatever clock and transport it is given: shared by the host and the simulator."""

from collections.abc import Callable

import structlog

from protocol.config import AwakeClock, Instant
from protocol.core import Core
from protocol.events import (
    ChargePrefix,
    CoreEvent,
    Deliver,
    Dial,
    FillLink,
    HangUp,
    Item,
    Link,
    SendFrame,
    Tick,
)
from protocol.transport import Transport

log = structlog.get_logger()


class Driver:
    """Feeds events to a core and carries out what it asks for.

    `now` is the core's clock: `clock`, less the time in which this process did not run.
    """

    def __init__(
        self, core: Core, transport: Transport, clock: Callable[[], Instant], deliver: Callable[[Item], object]
    ) -> None:
        self._core = core
        self._transport = transport
        self.now = AwakeClock(clock)
        self.at = self.now()  # when the last step had handled what came
        self._deliver = deliver
        transport.serve(self._make)

    def wait(self) -> float:
        """Return how many seconds may pass before the next `step`, if nothing comes."""
        return self._core.wait(self.now())

    def step(self, timeout: float) -> float:
        """Wait up to `timeout` seconds for the network, handle what came, and tick if it is time.

        Returns what `wait` would.
        """
        events = self._transport.poll(timeout)
        now = self.now()
        for event in events:
            self._feed(event, now)
        self.at = self.now() if events else now
        wait = self._core.wait(self.at)
        if wait <= 0:
            self._feed(Tick(), self.at)
            wait = self.wait()
        return wait

    def _make(self, link: Link) -> bytes:
        """Return the frame of the next item that waits for a link. A defect in it is logged and counted."""
        now = self.now()
        try:
            return self._core.make_frame(link, now)
        except Exception:  # one item must not end the only network thread
            log.exception("internal error", event_type="make_frame")
            self._core.scores.offence("internal", None, now)
            return b""

    def feed(self, event: CoreEvent) -> None:
        """Handle one event. A defect that it runs into is logged and counted; the node goes on."""
        self._feed(event, self.now())

    def _feed(self, event: CoreEvent, now: Instant) -> None:
        try:
            actions = self._core.handle(event, now)
            for action in actions:
                match action:
                    case SendFrame(link, frame):
                        if self._transport.send(link, frame):
                            self._core.note_sent(action)
                    case FillLink(link):
                        self._transport.fill(link)
                    case Deliver(item):
                        self._deliver(item)
                    case Dial(address, scope):
                        self._transport.dial(address, scope)
                    case HangUp(link):
                        self._transport.hang_up(link)
                    case ChargePrefix(link, points):
                        self._transport.charge(link, points)
        except Exception:  # one item must not end the only network thread, whatever is wrong with us
            log.exception("internal error", event_type=type(event).__name__)
            self._core.scores.offence("internal", None, now)
