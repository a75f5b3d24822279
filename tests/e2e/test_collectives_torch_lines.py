"""Worlds of torch over the lines that people have, between ranks in network namespaces. Needs root on Linux."""

import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from tests.namespaces import ROOT, cut_off, why_impossible, wired

OBSTACLE = why_impossible()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
BACKENDS = ["gossamer", pytest.param("gloo", marks=pytest.mark.long)]
OUTAGE_S = 8.0  # longer than the silence that is death elsewhere


class Ranks:
    """One rank of `tests.torch_lines` in each namespace, all of which reduce when they are told to."""

    def __init__(self, stack, spaces, backend):
        self.processes = [
            stack.enter_context(
                subprocess.Popen(
                    space.command("env", *_variables(spaces, rank), sys.executable, "-m", "tests.torch_lines", backend),
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
            for rank, space in enumerate(spaces)
        ]
        for process in self.processes:
            stack.callback(process.kill)

    def reduce(self):
        """Let all reduce; return what each says."""
        self.call()
        return self.results()

    def call(self):
        for process in self.processes:
            process.stdin.write("\n")

    def results(self):
        return [process.stdout.readline() for process in self.processes]


def _variables(spaces, rank):
    given = {"RANK": rank, "WORLD_SIZE": len(spaces), "MASTER_ADDR": spaces[0].ipv4, "MASTER_PORT": 29777}
    return [f"{name}={value}" for name, value in {**given, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": 1}.items()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_reach_each_other_by_the_network_of_the_master_and_not_by_that_of_the_default_route(backend):
    """As where each of two machines has a NAT, a cloud's or a virtual machine's, beside the line between them."""
    with ExitStack() as stack:
        spaces = stack.enter_context(wired(*"ab"))
        for space in spaces:
            for words in (
                "link add nat type veth peer name router",
                "link set nat up",
                "link set router up",
                "address add 10.0.2.15/24 dev nat",
                "route add default via 10.0.2.2",
            ):
                subprocess.run(space.command("ip", *words.split()), check=True, timeout=30)
        assert Ranks(stack, spaces, backend).reduce() == ["2.0\n"] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_line_that_is_down_for_some_seconds_holds_the_ranks_up_and_ends_nothing(backend):
    with ExitStack() as stack:
        spaces = stack.enter_context(wired(*"ab"))
        ranks = Ranks(stack, spaces, backend)
        assert ranks.reduce() == ["2.0\n"] * 2
        with cut_off(spaces[1]):
            ranks.call()
            time.sleep(OUTAGE_S)
        assert ranks.results() == ["2.0\n"] * 2
        assert ranks.reduce() == ["2.0\n"] * 2
