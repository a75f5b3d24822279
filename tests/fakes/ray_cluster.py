"""A stand-in for Ray's interface: an actor or a task is a thread of this process, a machine is a name that may die.

What it does with exceptions, with calls of one actor in order, and with a share of processors is as Ray 2.60 does it.
"""

import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from signal import SIGKILL
from threading import Event
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """Any."""


class RayActorError(RayError):
    """An actor cannot be reached."""


class ActorDiedError(RayActorError):
    """An actor is dead."""


class GetTimeoutError(RayError, TimeoutError):
    """There is no answer yet."""


class Machine:
    def __init__(self, name: str, **resources: float) -> None:
        self.name, self.resources, self.alive = name, resources, True
        self.actors: list[Actor] = []

    def free(self, key: str) -> float:
        taken = sum(actor.asks.get(key) or 0 for actor in self.actors if not actor.dead)
        return self.resources.get(key, 0.0) - taken

    def die(self) -> None:
        self.alive = False
        for actor in self.actors:
            actor.die()


class Actor:
    """The handle of an actor."""

    def __init__(self, ray: "FakeRay", kind: Any, asks: dict[str, float], given: tuple[Any, ...]) -> None:
        self.asks = asks
        self._gone = Event()
        self._kind, self._given, self._ray = kind, given, ray
        self._thread = ThreadPoolExecutor(1)
        self.made: Any = None
        self._first = self._thread.submit(self._make)

    def _make(self) -> None:
        while not self._ray.place(self) and not self._gone.wait(0.01):
            continue
        if not self.dead:
            self.made = self._kind(*self._given)

    @property
    def dead(self) -> bool:
        return self._gone.is_set()

    def die(self) -> None:
        self._gone.set()
        if self.made is not None and self.made._child is not None:
            with suppress(OSError):
                self.made._child.signal(SIGKILL)

    def clean(self) -> None:
        """Remove what a machine that died would have kept."""
        self._thread.shutdown()
        if self.made is not None:
            shutil.rmtree(self.made._place, ignore_errors=True)
            if self.made._sender is not None:
                self.made._sender.close()

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> "Answer":
            return Answer(self._thread.submit(lambda: getattr(self.made, name)(*given)), self)

        return SimpleNamespace(remote=remote)


class Answer:
    def __init__(self, future: "Future[Any]", actor: Actor | None = None) -> None:
        self.future, self.actor = future, actor

    @property
    def ready(self) -> bool:
        return self.future.done() or (self.actor is not None and self.actor.dead)


class FakeRay:
    """The module `ray`, connected to a cluster of `machines`."""

    exceptions = SimpleNamespace(
        RayError=RayError, RayActorError=RayActorError, ActorDiedError=ActorDiedError, GetTimeoutError=GetTimeoutError
    )
    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def __init__(self, *machines: Machine) -> None:
        self.machines = machines
        self.actors: list[Actor] = []
        self.is_shut_down = False
        self.given: dict[str, Any] = {}
        self._turns = itertools.cycle(machines)  # SPREAD

    def init(self, **given: Any) -> None:
        self.given = given

    def shutdown(self) -> None:
        self.is_shut_down = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": machine.alive, "Resources": machine.resources} for machine in self.machines]

    def put(self, value: Any) -> Any:
        return value

    def place(self, actor: Actor) -> bool:
        """Place it on the next machine with room, if there is one."""
        for _ in self.machines:
            one = next(self._turns)
            if one.alive and all(one.free(key) >= (value or 0) for key, value in actor.asks.items()):
                one.actors.append(actor)
                return True
        return False

    def remote(self, *kinds: Any, **asks: Any) -> Any:
        if not kinds:
            return lambda kind: self._of(kind, asks)
        return self._of(kinds[0], asks)

    def _of(self, kind: Any, asks: dict[str, Any]) -> Any:
        def remote(*given: Any) -> Any:
            if not isinstance(kind, type):
                return Answer(ThreadPoolExecutor(1).submit(kind, *given))
            names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
            actor = Actor(self, kind, {names[key]: value for key, value in asks.items() if key in names}, given)
            self.actors.append(actor)
            return actor

        return SimpleNamespace(remote=remote, options=lambda **more: self._of(kind, asks | more))

    def wait(self, answers: list[Answer], timeout: float | None = None) -> tuple[list[Answer], list[Answer]]:
        wait([answer.future for answer in answers if not answer.ready], timeout)
        ready = [answer for answer in answers if answer.ready]
        return ready, [answer for answer in answers if not answer.ready]

    def get(self, answer: Answer, timeout: float | None = None) -> Any:
        if answer.actor is not None and answer.actor.dead and not answer.future.done():
            raise ActorDiedError("The actor died unexpectedly.\nIts node was terminated.")
        try:
            return answer.future.result(timeout)
        except TimeoutError:
            raise GetTimeoutError from None
        except Exception as error:  # noqa: BLE001  # Ray's is both what was raised and its own
            both: Callable[[str], Exception] = type("RayTaskError", (RayError, type(error)), {"cause": error})
            raise both(f"a traceback\n{error}") from None

    def kill(self, actor: Actor) -> None:
        actor.die()
