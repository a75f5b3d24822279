"""What people run on torch's groups comes to the same here as on gloo: the rows of a table of docs/torch.md."""

import json
import os
import subprocess
import sys

import pytest

from tests import torch_programs

LIMIT_S = 300
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def came_of(tmp_path_factory):
    """What came of each program, at each rank, by backend."""
    folder, backends = tmp_path_factory.mktemp("programs"), ("gloo", "gossamer")
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"GOSSAMER_SECRET": "of this test", "HF_HUB_OFFLINE": "1"}
    for backend in backends:
        command = [*start, "-m", "tests.torch_programs", backend, str(folder)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as agent:
            try:
                said = agent.communicate(timeout=LIMIT_S)[1]
            finally:
                agent.terminate()
        assert agent.returncode == 0, [line for line in said.splitlines() if line.startswith("[rank")]
    return {
        backend: [json.loads((folder / f"{backend}{rank}").read_text()) for rank in range(2)] for backend in backends
    }


@pytest.mark.parametrize("program", torch_programs.PROGRAMS)
def test_a_program_comes_to_what_it_does_on_gloo(program, came_of):
    theirs, ours = ([results[program] for results in came_of[backend]] for backend in ("gloo", "gossamer"))
    assert ours == theirs


def test_programs_come_to_what_they_should(came_of):
    first, second = came_of["gossamer"]
    assert first["trl"] == second["trl"]
    assert first["sigterm_in_a_call"] == [[2.0] * 3, ["SIGTERM"]]
    sums = [[2.0 * number] * 2 for number in range(torch_programs.MANY)]
    assert first["many_groups_and_a_large_object"] == [[*sums, torch_programs.LARGE, 1]] * 3


def test_world_after_world_is_made_over_torchruns_store(came_of):
    assert [results["world_after_world"] for results in came_of["gossamer"]] == [[[2.0] * 3] * 3] * 2
