"""Where a system has less than Linux, a node runs all the same, and says what it lacks."""

import os

import pytest

from node.machine import undefended, usable_cores


def test_processors_are_counted_where_nobody_tells_which_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def test_what_is_not_defended_is_said_elsewhere_than_on_linux() -> None:
    assert list(undefended("linux")) == []
    assert any("never ends is not cut" in line for line in undefended("darwin"))
