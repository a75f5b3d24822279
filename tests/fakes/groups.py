"""A group in one process, with the interface that DiLoCo needs of a Communicator and arithmetic in float64."""

import threading
from types import SimpleNamespace

import torch

from collectives.errors import Aborted, BadArgument
from collectives.shared_state.state import share_of
from collectives.shared_state.transfer import sync
from collectives.types import ReduceResult, SyncResult
from tests.fakes.ports import Room

LIMIT = 20.0


class Hall:
    """Where members meet for each call; `abort` holds the numbers of the meetings that are called off."""

    def __init__(self, *members: str, abort=()) -> None:
        self.members = set(members)
        self.abort = set(abort)
        self.meetings: list[str] = []
        self._changed = threading.Condition()
        self._waiting: dict = {}
        self._results: dict = {}

    def meet(self, name: str, kind: str, value=None):
        """Wait for all members to call `kind`; return what each gave."""
        with self._changed:
            if name not in self.members and kind != "admit":
                raise AssertionError(f"{name} is no member and calls {kind}")
            self._waiting[name] = (kind, value)
            self._settle()
            assert self._changed.wait_for(lambda: name in self._results, LIMIT), f"{name} waits in {kind}"
            result = self._results.pop(name)
        if isinstance(result, Exception):
            raise result
        return result

    def leave(self, name: str) -> None:
        """As a member that is killed: a call that others wait in is called off."""
        with self._changed:
            self.members.discard(name)
            self._end({other: Aborted(f"{name} is gone") for other in self._waiting if other in (name, *self.members)})

    def waits(self, name: str) -> bool:
        with self._changed:
            return name in self._waiting

    def _settle(self) -> None:
        if not self.members or not self.members <= self._waiting.keys():
            return
        kinds = {kind for name, (kind, _) in self._waiting.items() if name in self.members}
        assert len(kinds) == 1, f"members meet for different things: {kinds}"
        (kind,) = kinds
        self.meetings.append(kind)
        if len(self.meetings) - 1 in self.abort:
            self._end({name: Aborted("called off") for name in self._waiting if name in self.members})
            return
        if kind == "admit":
            self.members |= self._waiting.keys()
        values = {name: value for name, (_, value) in self._waiting.items() if name in self.members}
        self._end(dict.fromkeys(values, values))

    def _end(self, results: dict) -> None:
        self._results |= results
        for name in results:
            self._waiting.pop(name, None)
        self._changed.notify_all()


class FakeCommunicator:
    def __init__(self, hall: Hall, name: str) -> None:
        self.hall = hall
        self.name = name
        self.weights: list[float] = []

    @classmethod
    def connect(cls, hall: Hall, name: str) -> "FakeCommunicator":
        """Wait until the members let this one in."""
        hall.meet(name, "admit")
        return cls(hall, name)

    def meet(self, addresses) -> None:
        self.met = [*addresses]

    def admit(self, timeout: float = 0) -> None:
        self.hall.meet(self.name, "admit")

    def sync_state(self, state, strategy=None, timeout: float = 0) -> SyncResult:
        room = Room([self.name])
        met = self.hall.meet(self.name, "sync", (share_of(state, strategy), room.ports[self.name], state))
        port = OneWay(room.ports[self.name], {name: value[1] for name, value in met.items()})
        shares = {name: value[0] for name, value in met.items()}
        outcome = sync(port, self.name, shares, state, strategy)
        self.hall.meet(self.name, "commit sync")
        outcome.publish()
        names = tuple(sorted(met))
        sent, received = outcome.bytes_sent, outcome.bytes_received
        return SyncResult(outcome.revision, sent, received, outcome.source, names, 0.0, outcome.replaced)

    def all_reduce(self, x, op, *, out, weight, codec, tag, timeout, feedback=None) -> ReduceResult:
        met = self.hall.meet(self.name, "reduce", (x.clone(), weight))
        self.weights.append(weight)
        total = sum(weight for _, weight in met.values())
        if total == 0:
            raise BadArgument("every member gave weight 0")
        mean = sum(values.double() * weight for _, (values, weight) in sorted(met.items())) / total
        out.copy_(mean)
        return ReduceResult(out, tuple(sorted(met)), 1, x.nbytes, x.nbytes, 0.0)


class OneWay:
    """A port whose questions go to the members' own ports."""

    def __init__(self, own, ports: dict) -> None:
        self.own = own
        self.ports = ports

    def serve(self, handler) -> None:
        self.own.serve(handler)

    def request(self, source, question, into):
        return SimpleNamespace(port=self.ports[source], ticket=self.ports[source].request(source, question, into))

    def wait(self, ticket) -> None:
        ticket.port.wait(ticket.ticket)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.int32), other.reshape(-1).view(torch.int32))
