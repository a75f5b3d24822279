"""What every test shares: no hub, no telemetry, no display, few threads, and reproducible examples.

The environment is set here, before any test module imports torch, matplotlib or transformers.
"""

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from multiprocessing import forkserver

import pytest
from hypothesis import HealthCheck, settings

from tests.starts import STARTS, StartNoter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"

# A shell's job in the background ignores Ctrl-C, and so would each node that a test starts and stops by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In CI the examples are the same on every run; elsewhere hypothesis explores, and prints the
# `@reproduce_failure` line that replays what it found.
# Whether it makes examples fast enough is a matter of the machine's load, not of what is tested.
SLOW_MACHINE = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=SLOW_MACHINE)
settings.register_profile("local", deadline=None, print_blob=True, suppress_health_check=SLOW_MACHINE)
settings.load_profile("ci" if os.environ.get("CI") else "local")

UNMARKED = "it starts a process or a socket: mark it slow, or real if it is the one path of its kind in `make test`"
MARKS = {"real", "slow", "long", "browser", "gpu"}
FORKED = ("tests.collectives_member", "tests.fakes.nodes")  # modules whose functions run in children of the fork server


def pytest_configure(config: pytest.Config) -> None:
    """Note which tests start something."""
    if not config.pluginmanager.has_plugin("starts"):
        config.pluginmanager.register(StartNoter(), "starts")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in e2e/ and chaos/ as slow, but for the real paths."""
    for item in items:
        if {"e2e", "chaos"} & set(item.path.parts) and not MARKS & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test of `make test` that starts something and does not say so."""
    report = yield
    is_marked = MARKS & {mark.name for mark in item.iter_markers()}
    if report.when == "call" and report.passed and STARTS in item.user_properties and not is_marked:
        report.outcome, report.longrepr = "failed", UNMARKED
    return report


def pytest_collection_finish() -> None:
    """Start the fork server where members of groups or a supervisor's nodes are collected, with what they import.

    A process has one fork server, and who starts it says what it has imported. Otherwise each child would import all
    by itself. That takes seconds, on a busy machine more than others wait.
    """
    preload = [name for name in FORKED if name in sys.modules]
    if preload:
        forkserver.set_forkserver_preload(preload)
        forkserver.ensure_running()
    if (cage := sys.modules.get("node.processes.cage")) is not None:
        cage.lacking()  # it starts a process once: else it would be that of whichever test comes first
    gc.collect()
    gc.freeze()  # what is imported lives to the end: no collection need walk it, here or in a process forked from here


@pytest.fixture
def own_log_setup() -> Iterator[None]:
    """Undo what a test sets up for the program's logs, as opening an `Exchange` does."""
    from tests.log_places import own_logs

    with own_logs():
        yield
