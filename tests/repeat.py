"""Run the tests that start processes or sockets again and again, idle and beside busy processes: which fail by chance?

    python -m tests.repeat [--times 20] [--load 8] [--out runs/repeat] [what pytest takes]

First, all tests that pytest collects run once. Only those that start something run again (`tests.starts`).

Each run is a pytest of its own, two files at a time as in `make test`. Its output is kept in the folder. The last lines
are a table: each test that failed, and in how many of the runs. If there is one, the exit status is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.starts import STARTS, StartNoter

ALL = ("-m", "not long and not browser and not gpu")
PYTEST = (sys.executable, "-m", "pytest", "-p", "tests.repeat", "-n", "2", "--dist", "loadfile")
SIGNAL = ("-o", "timeout_method=signal")  # a test that hangs fails; by the usual method its process would end
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def main() -> int:
    """Parse the command line, do the runs, and print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.repeat", description="Which tests fail by chance?")
    parser.add_argument("--times", type=int, default=20, help="runs idle, and as many under load (20)")
    parser.add_argument("--load", type=int, default=8, help="busy processes beside the second half (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/repeat"), help="a folder for what the runs print")
    options, chosen = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    first = run(options.out / "all", [*ALL, *chosen])
    if not first["starts"]:
        sys.exit("none of these tests starts a process or a socket")
    again = options.out / "starts"
    again.write_text("\n".join(first["starts"]) + "\n")
    failed = {"all": Counter(first["failed"])}
    for name, load in (("idle", 0), ("busy", options.load)):
        with busy(load):
            paths = [options.out / f"{name}-{number}" for number in range(1, options.times + 1)]
            failed[name] = Counter(test for path in paths for test in run(path, ["-m", "", f"@{again}"])["failed"])
    print(f"\nfailed in 1 run of all, {options.times} idle, {options.times} beside {options.load} busy processes:")
    for test in (tests := sorted(set().union(*failed.values()))):
        print(*(f"{count[test]:4}" for count in failed.values()), test)
    print(f"{len(tests)} of {first['count']} tests, of which {len(first['starts'])} start a process or a socket")
    return 1 if tests else 0


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy; they end with this one, however it ends."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(path: Path, chosen: Sequence[str]) -> dict[str, Any]:
    """Run the `chosen` tests; return how many there were, which failed, and which start something."""
    began, found = time.monotonic(), path.with_suffix(".json")
    found.unlink(missing_ok=True)
    with path.with_suffix(".log").open("w") as log:
        environment = os.environ | {"REPEAT_RESULT": str(found.absolute())}
        status = subprocess.run(
            [*PYTEST, *SIGNAL, *chosen], stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with status {status}: see {path.with_suffix('.log')}")
    result = json.loads(found.read_text())
    summary = f"{result['count']} tests, {len(result['failed'])} failed, {time.monotonic() - began:.0f} s"
    print(f"{path.name}: {summary}", *result["failed"], sep="\n    ", flush=True)
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Begin to note what tests start."""
    if not config.pluginmanager.has_plugin("starts"):
        config.pluginmanager.register(StartNoter(), "starts")
    if not hasattr(config, "workerinput"):  # the process that has all reports
        config.pluginmanager.register(Recorder())


class Recorder:
    """Writes which tests there were, which failed, and which start something."""

    def __init__(self) -> None:
        self._tests: set[str] = set()
        self._starts: set[str] = set()
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what is told of a test."""
        self._tests.add(report.nodeid)
        if report.failed:
            self._failed.add(report.nodeid)
        if STARTS in map(tuple, report.user_properties):
            self._starts.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write it."""
        found = {"count": len(self._tests), "failed": sorted(self._failed), "starts": sorted(self._starts)}
        Path(os.environ["REPEAT_RESULT"]).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
