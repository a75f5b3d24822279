"""A step is one view, also where a member dies between two of its calls: the others take it again without it."""

import os
import signal

import numpy as np

from collectives import Communicator, Op
from tests.collectives_member import WORKERS

LIMIT_S = 60
DIES_IN = 3  # the step


def train(pipe, seeds, dies):
    """Take steps of three calls each; the one that `dies` does so after the first call of one of them."""
    comm = Communicator.connect("steps", seeds, timeout=LIMIT_S)
    pipe.send(comm.address)
    comm.wait_for(3, LIMIT_S)
    for number in range(1, DIES_IN + 2):

        def step(comm, number=number):
            calls = [comm.all_reduce(np.ones(10), op=Op.SUM)]
            if dies and number == DIES_IN:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(comm.all_gather(np.ones(1)))
            calls.append(comm.all_reduce(np.ones(30_000), op=Op.SUM))
            return calls

        done = comm.run(step)
        pipe.send((done.number, done.members, [call.contributors for call in done.value], done.attempts))
    pipe.recv()
    comm.leave()


def test_the_contributors_to_every_call_of_a_step_are_its_members():
    pipes, members = [], []
    try:
        for number in range(3):
            pipe, theirs = WORKERS.Pipe()
            seeds = [pipes[0][1]] if pipes else []
            member = WORKERS.Process(target=train, args=(theirs, seeds, number == 2), daemon=True)
            member.start()
            members.append(member)
            pipes.append((pipe, pipe.recv() if not number else ""))
        for pipe, address in pipes[1:]:
            assert pipe.poll(LIMIT_S) and not address
            pipe.recv()
        told = []
        for pipe, _ in pipes[:2]:
            for _ in range(DIES_IN + 1):
                assert pipe.poll(LIMIT_S), "a step does not count"
                told.append(pipe.recv())
        for number, members_of_step, contributors, attempts in told:
            assert contributors == [members_of_step] * 3, (number, contributors)
            assert (len(members_of_step), attempts) == ((3, 1) if number < DIES_IN else (2, 1 + (number == DIES_IN)))
    finally:
        for member in members:
            member.kill()
            member.join(10)
