"""Whatever owners write around `admit` and `all_reduce`, three processes of it go on when one is killed, one comes.

And the programs of README.md do what they say, from their own text.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.collectives_programs import PROGRAMS, Trainee

LIMIT_S = 30.0
README = Path(__file__).parents[2] / "README.md"
MIXTURES = [["call_again", "go_on", "begin_again"], ["admit_who_waits", "call_again", "go_on"]]


@pytest.mark.parametrize("programs", [*([name] * 3 for name in PROGRAMS), *MIXTURES], ids="-".join)
def test_members_go_on_after_a_death_and_with_a_newcomer(programs: list[str]) -> None:
    trainees = [Trainee(programs[0])]
    try:
        address = trainees[0].hear(LIMIT_S)
        trainees += [Trainee(program, [address]) for program in programs[1:]]
        for newcomer in trainees[1:]:
            assert newcomer.hear(LIMIT_S).startswith("tcp://")
        for trainee in trainees:
            trainee.reduces_with(3, 3, LIMIT_S)
        trainees.pop().end()
        for trainee in trainees:
            trainee.reduces_with(2, 3, LIMIT_S)
        trainees.append(Trainee(programs[2], [address]))
        assert trainees[-1].hear(LIMIT_S).startswith("tcp://")
        for trainee in trainees:
            trainee.reduces_with(3, 3, LIMIT_S)
    finally:
        for trainee in trainees:
            trainee.end()


def test_a_member_that_was_stopped_comes_back_in_step() -> None:
    trainees = [Trainee("take_steps")]
    try:
        address = trainees[0].hear(LIMIT_S)
        trainees += [Trainee("take_steps", [address]) for _ in range(2)]
        assert all(newcomer.hear(LIMIT_S).startswith("tcp://") for newcomer in trainees[1:])
        for stopped in (trainees[2], trainees[0]):  # the founder, too
            others = [trainee for trainee in trainees if trainee is not stopped]
            for trainee in trainees:
                trainee.reduces_with(3, 3, LIMIT_S)
            os.kill(stopped.process.pid, signal.SIGSTOP)
            for trainee in others:
                trainee.reduces_with(2, 3, LIMIT_S)
            os.kill(stopped.process.pid, signal.SIGCONT)
        for trainee in trainees:
            trainee.reduces_with(3, 3, LIMIT_S)
    finally:
        for trainee in trainees:
            trainee.end()


def program_of(heading: str) -> str:
    """Return the first indented block under a heading of README.md, as a program."""
    lines = README.read_text().split(f"### {heading}\n", 1)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("    "))
    block = []
    for line in lines[first:]:
        if line and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block)


@pytest.mark.real
def test_the_program_of_the_readme_runs_as_three_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(program_of("Only the collectives"))
    processes = []

    def start(*seeds: str) -> None:
        command = [sys.executable, str(script), "tcp://0.0.0.0:0", *seeds]  # as on several machines
        environment = os.environ | {"RUN_SECRET": "a secret"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))

    try:
        start()
        address = processes[0].stdout.readline().strip()
        start(address)
        start(address)
        said = [process.communicate(timeout=90)[0].splitlines()[-1] for process in processes]
        assert len(set(said)) == 1 and said[0].startswith("100 steps"), said
        assert [process.returncode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
