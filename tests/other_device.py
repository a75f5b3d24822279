"""A device of the tests: ordinary tensors, whose values have to be copied to the CPU, and back."""

import pytest


def treat_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tensor that is reduced or moved be on such a device."""
    for module in ("collectives.reduce.tensors", "collectives.torch_backend.group"):
        monkeypatch.setattr(f"{module}.on_cpu", lambda flat: flat.clone())
