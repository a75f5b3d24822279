"""A few agreement cores on a simulated network that loses nothing, for tests that tell what happens step by step."""

from collections import Counter
from random import Random
from typing import Any

from collectives.agreement.agreement import Agreement
from collectives.agreement.events import (
    ADMIT,
    Action,
    Begin,
    Dial,
    Event,
    Finished,
    Heard,
    Linked,
    Perform,
    Performed,
    Send,
    Tick,
    Unlinked,
)
from collectives.agreement.views import ADMIT_TAG
from collectives.simulator.network import SimulatedNetwork
from collectives.types import LAN
from protocol.identity import id_of_bytes

IDS = tuple(id_of_bytes(bytes([16 * number + 7]) * 20) for number in range(12))
STEP = LAN.heartbeat / 2


class Group:
    """Nodes by number; `finished` and `actions` are what each was told."""

    def __init__(self, size: int) -> None:
        self.network = SimulatedNetwork(Random(1), 0.0, self._deliver, self._linked, self._unlinked)
        self.cores: dict[int, Agreement] = {}
        self.finished: dict[int, list[Finished]] = {}
        self.actions: dict[int, list[Action]] = {}
        self.begun: Counter[int] = Counter()
        self.stopped: set[int] = set()
        self.obedient = True  # carry out at once what is started
        for number in range(size):
            self.boot(number)
            if number == 1:
                self.run(2.0)  # the founder lets the first in by itself
        self.run(1.0)
        if size > 2:
            self.admit()

    def boot(self, number: int) -> None:
        seeds = [str(other) for other in self.cores if other not in self.stopped]
        now = self.network.now
        self.cores[number] = Agreement(
            IDS[number],
            str(number),
            b"group",
            Random(number),
            now,
            seeds=seeds,
        )
        self.finished[number], self.actions[number] = [], []
        self._tick(number, self.cores[number])

    def admit(self) -> None:
        for number, core in self.cores.items():
            if core.view is not None and number not in self.stopped:
                self.feed(number, Begin(ADMIT_TAG, ADMIT, 10.0))
        self.run(3.0)

    def call(self, number: int, *, tag: int = 0, deadline: float = 5.0, count: int = 1, share: bytes = b"") -> None:
        self.feed(number, Begin(tag, "reduce", deadline, (("count", count),), share))

    def feed(self, number: int, event: Event) -> None:
        if number in self.stopped:
            return
        self.begun[number] += isinstance(event, Begin)
        for action in self.cores[number].handle(event, self.network.now):
            self.actions[number].append(action)
            self.act(number, action)

    def act(self, number: int, action: Action) -> None:
        match action:
            case Send(member, message):
                self.network.send(number, IDS.index(member), message)
            case Dial(_, address) if int(address) in self.cores and int(address) not in self.stopped:
                self.network.connect(number, int(address))
            case Finished():
                self.finished[number].append(action)
            case Perform(op) if self.obedient:
                self.network.at(self.network.now + 0.01, self.feed, number, Performed(op))

    def run(self, seconds: float) -> None:
        self.network.run(self.network.now + seconds)

    def stop(self, number: int, *, silently: bool = False) -> None:
        self.stopped.add(number)
        self.network.vanish(number, range(len(self.cores)), silently=silently)

    def clear(self) -> None:
        """Forget what each was told."""
        for told in (*self.finished.values(), *self.actions.values()):
            told.clear()

    def views(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return the epoch and members that each running node is in, without repetition."""
        seen = {core.view for number, core in self.cores.items() if number not in self.stopped}
        return sorted((view.epoch, tuple(map(IDS.index, view.members))) if view else (0, ()) for view in seen)

    def verdicts(self, *, tag: int = 0) -> dict[int, list[str]]:
        return {
            number: [finished.verdict.value for finished in ended if finished.op.tag == tag]
            for number, ended in self.finished.items()
        }

    def _tick(self, number: int, core: Agreement) -> None:
        if self.cores[number] is core and number not in self.stopped:
            self.feed(number, Tick())
            self.network.at(self.network.now + STEP, self._tick, number, core)

    def _deliver(self, source: int, to: int, message: Any) -> None:
        self.feed(to, Heard(IDS[source], message))

    def _linked(self, end: int, far: int) -> None:
        self.feed(end, Linked(IDS[far], str(far)))

    def _unlinked(self, end: int, far: int) -> None:
        self.feed(end, Unlinked(IDS[far]))
