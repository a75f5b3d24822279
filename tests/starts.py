"""Notes which tests start a process, or bind or connect a socket; for conftest.py and `tests.repeat`.

They are known by what they do. A test also counts if a fixture that it uses started something for an earlier test. What
an import does counts for nobody: it comes once in a process.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

AUDITED = {"subprocess.Popen", "os.fork", "os.posix_spawn", "socket.bind", "socket.connect"}
STARTS = ("starts", True)  # a property of a test's report
IMPORT = "<frozen importlib._bootstrap>"


class StartNoter:
    """Adds `STARTS` to the properties of each test that starts something."""

    def __init__(self) -> None:
        self._test: pytest.Item | None = None
        self._started = 0
        self._fixtures: set[int] = set()  # that started something
        sys.addaudithook(lambda event, _: self._note() if event in AUDITED else None)
        for name in ("bind", "connect"):
            setattr(zmq.Socket, name, self._noting(getattr(zmq.Socket, name)))

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            self._note()
            return function(*arguments, **options)

        return noting

    def _note(self) -> None:
        if self._test is None or _is_importing():
            return
        self._started += 1
        if STARTS not in self._test.user_properties:
            self._test.user_properties.append(STARTS)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note what starts meanwhile as this test's."""
        self._test = item
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Note fixtures that start something."""
        before = self._started
        value = yield
        if self._started > before:
            self._fixtures.add(id(fixturedef))
        return value

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Note a test that uses such a fixture, which may be older than it."""
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if not self._fixtures.isdisjoint(id(definition[-1]) for definition in definitions):
            self._note()


def _is_importing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False
