"""A device of the tests: ordinary tensors, and copies that are carried out as late as can be."""

import pytest
import torch

from collectives.reduce.staging import Wait


class LateCopies:
    """See `collectives.reduce.staging.Copies`. A copy is carried out when somebody waits for it, or for a later one."""

    def __init__(self) -> None:
        self._queued: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0

    @property
    def left(self) -> int:
        """Return how many have yet to be carried out."""
        return len(self._queued) - self._done

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((count * dtype.itemsize,), 0x7F, dtype=torch.uint8).view(dtype)

    def queue(self, source: torch.Tensor, into: torch.Tensor) -> Wait:
        self._queued.append((source, into))
        number = len(self._queued)

        def wait() -> None:
            while self._done < number:
                source, into = self._queued[self._done]
                into.copy_(source)
                self._done += 1

        return wait


def treat_as_on_a_device(monkeypatch: pytest.MonkeyPatch, stage_bytes: int = 1 << 16) -> None:
    """Let every tensor that is reduced or moved be on such a device."""
    monkeypatch.setattr("collectives.reduce.staging.STAGE_BYTES", stage_bytes)
    for module in ("collectives.reduce.tensors", "collectives.torch_backend.group"):
        monkeypatch.setattr(f"{module}.copies_of", lambda _: LateCopies())
