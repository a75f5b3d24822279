"""Where a system has less than Linux, a node runs all the same, and says what it lacks."""

import os
import platform

import psutil
import pytest
import torch

from node.config import parse_config
from node.errors import UserError
from node.policy.detection import computes_in_bf16, detect_machine
from node.policy.load import device_of
from node.processes.machine import return_freed_memory, undefended, usable_cores


def test_processors_are_counted_where_nobody_tells_which_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_below_a_block_in_use_is_given_back() -> None:
    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    size, count = 100_000, 1000  # smaller than what glibc maps on its own
    blocks = [bytes([1]) * size for _ in range(count)]
    del blocks[:-1]
    before = resident()
    return_freed_memory()
    assert resident() < before - size * count / 2


def test_an_apple_gpu_is_used_where_it_is_asked_for_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_config({"policy": {"device": "mps"}}).policy.device == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no Apple GPU"):
        device_of("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [device_of(choice) for choice in ("mps", "auto", "cpu")] == ["mps", "cpu", "cpu"]
    assert not computes_in_bf16("mps")
    assert not detect_machine("mps").gpu


def test_what_is_not_defended_is_said_elsewhere_than_on_linux() -> None:
    assert list(undefended("linux")) == []
    assert any("never ends is not cut" in line for line in undefended("darwin"))
