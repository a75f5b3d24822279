"""`python -m tests.repeat` finds the tests that start something, and counts in how many runs each failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import socket, subprocess, sys, time
from pathlib import Path
import pytest, zmq

@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]

def test_that_starts_nothing():
    pass

def test_that_listens(port):
    pass

def test_that_uses_the_port_of_an_earlier_test(port):
    pass

@pytest.mark.parametrize("text", ["a b", "[::]"])
def test_that_starts_a_process(text):
    subprocess.run([sys.executable, "-c", ""], check=True)

def test_that_binds_a_socket_of_zeromq():
    with zmq.Context() as context, context.socket(zmq.REP) as server:
        server.bind("tcp://127.0.0.1:0")

def test_that_fails_in_each_second_run(port):
    runs = Path("runs")
    runs.write_text(runs.read_text() + "." if runs.exists() else ".")
    assert len(runs.read_text()) % 2 == 0

@pytest.mark.timeout(1)
def test_that_hangs(port):
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_starts_something_runs_again_and_each_failure_is_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.repeat", "--times", "1", "--load", "1", "--out", "out"]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "   1    0    1 test_some.py::test_that_fails_in_each_second_run",
        "   1    1    1 test_some.py::test_that_hangs",
        "2 of 8 tests, of which 7 start a process or a socket",
    ]
    assert "test_some.py::test_that_starts_nothing" not in (tmp_path / "out" / "starts").read_text().splitlines()
    assert "test_that_hangs" in (tmp_path / "out" / "busy-1.log").read_text()
