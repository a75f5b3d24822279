"""What goes wrong in one trial: a list of faults, each at the n-th message of some kind, or at a time.

A fault tied to a message strikes while that message is on its way, so that over many seeds each
happens in every state of the protocol: between any two steps, at the coordinator and elsewhere.
"""

from dataclasses import dataclass
from random import Random

from collectives.agreement import messages
from collectives.simulator.owner import LOOPS, Program
from collectives.types import Partition

ONE_AT_A_TIME = 0.2  # the part of schedules whose members make one call at a time
FAULT_SECONDS = 6.0  # faults happen within this time after the group has formed
KINDS = ("crash", "power", "restart", "pause", "cut", "split", "oneway", "isolate", "join", "leave")
MOMENTS = (
    messages.Initiate,
    messages.Start,
    messages.Done,
    messages.Commit,
    messages.Ack,
    messages.Abort,
    messages.Propose,
    messages.Report,
    messages.Decide,
    messages.Welcome,
    messages.Apply,
    messages.Sight,
)
RARE = (messages.Propose, messages.Report, messages.Decide, messages.Welcome, messages.Apply, messages.Sight)


@dataclass(frozen=True)
class Fault:
    """`kind` strikes the sender or the receiver of the n-th message of a type, or somebody at a time (s)."""

    kind: str
    moment: type[messages.Message] | None
    n: int
    at_sender: bool
    when: float
    lasts: float


@dataclass(frozen=True)
class Schedule:
    """A trial's conditions, all drawn from its seed."""

    seed: int
    members: int
    partition: Partition
    disorder: float
    encoded: bool  # messages go through their bytes
    dialling: float  # how long it may take until a link is there (s)
    programs: tuple[Program, ...]  # if members make one call at a time: each runs one of these
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int, members: int) -> "Schedule":
        """Return the schedule of a seed, for a group of up to `members`."""
        rng = Random(f"schedule {seed}")
        faults = tuple(cls._fault(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4))))
        return cls(
            seed,
            rng.randint(2, max(2, members)),
            rng.choice((Partition.CONTINUE, Partition.CONTINUE, Partition.CONTINUE, Partition.MAJORITY)),
            rng.choice((0.0, 0.0, 0.0, 0.05, 0.3)),
            rng.random() < 0.05,
            Random(f"dialling {seed}").choice((0.0, 0.0, 0.4)),
            cls._programs(Random(f"programs {seed}")),
            faults,
        )

    @staticmethod
    def _programs(rng: Random) -> tuple[Program, ...]:
        """Return none for most seeds; else one that all members run, or a mixture."""
        single = tuple((program,) for program in Program)
        return rng.choice((*single, LOOPS, LOOPS)) if rng.random() < ONE_AT_A_TIME else ()

    @staticmethod
    def _fault(rng: Random) -> Fault:
        moment = rng.choice((*MOMENTS, None))
        return Fault(
            kind=rng.choice(KINDS),
            moment=moment,
            n=rng.randint(1, 6 if moment in RARE else 40),
            at_sender=rng.random() < 0.5,
            when=rng.uniform(0.0, FAULT_SECONDS),
            lasts=rng.choice((0.2, 1.0, 2.0, 4.0)),
        )
