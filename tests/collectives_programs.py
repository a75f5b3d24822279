"""A member that trains in a loop, as a process that tests kill: what owners write around `admit` and `all_reduce`.

It sends the number of contributors of every reduction that commits, after its own address.
"""

import time

import numpy as np

from collectives import Aborted, CollectiveError, Communicator, DeadlineExceeded, Evicted, InDoubt, SharedState
from collectives.errors import CALLED_OFF
from collectives.types import LAN
from tests.collectives_member import WORKERS

COMPUTING_S = 0.02  # what a step costs besides: so that thousands do not fill the pipe


def again(comm, call):
    """As the table of errors says."""
    while True:
        try:
            return call()
        except (Aborted, DeadlineExceeded, InDoubt):
            pass
        except Evicted:
            again(comm, comm.admit)


def attempt(call):
    try:
        return call()
    except CALLED_OFF:
        return None


def call_again(comm, reduce):
    """Retry one's own call."""
    again(comm, comm.admit)
    return again(comm, reduce)


def go_on(comm, reduce):
    """Leave what was called off for the next call."""
    attempt(comm.admit)
    return attempt(reduce)


def begin_again(comm, reduce):
    """After any error, from `admit` on."""
    return attempt(lambda: (comm.admit(), reduce())[1])


def admit_who_waits(comm, reduce):
    """Admit when somebody waits, retry one's own call."""
    if comm.pending():
        again(comm, comm.admit)
    return again(comm, reduce)


def take_steps(comm, reduce, state=SharedState({"w": np.zeros(3)})):  # noqa: B008  # one a process
    """Leave it to the library."""
    done = comm.run(lambda _: reduce(), state)
    assert done.members == done.value.contributors
    state.tensors["w"] += done.value.value
    return done.value


PROGRAMS = {program.__name__: program for program in (call_again, go_on, begin_again, admit_who_waits, take_steps)}


def train(pipe, program, seeds):
    """The child's main function: runs until it is killed."""
    comm = Communicator.connect("programs", seeds, timing=LAN)
    pipe.send(comm.address)
    try:
        while True:
            result = PROGRAMS[program](comm, lambda: comm.all_reduce(np.ones(3)))
            if result is not None:
                pipe.send(len(result.contributors))
            time.sleep(COMPUTING_S)
    except CollectiveError as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Trainee:
    """The parent's end of one."""

    def __init__(self, program, seeds=()):
        self.program = program
        self.pipe, theirs = WORKERS.Pipe()
        self.process = WORKERS.Process(target=train, args=(theirs, program, list(seeds)), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self, timeout):
        assert self.pipe.poll(timeout), f"{self.program} does not come on"
        return self.pipe.recv()

    def reduces_with(self, contributors, times, timeout):
        """Wait until so many reductions of so many members committed."""
        until = time.monotonic() + timeout
        while times:
            said = self.hear(max(0.0, until - time.monotonic()))
            assert isinstance(said, int), said
            times -= said == contributors

    def end(self):
        self.process.kill()
        self.process.join(10)
        self.pipe.close()
