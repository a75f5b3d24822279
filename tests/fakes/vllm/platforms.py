"""The part of `vllm.platforms` that the worker asks."""

import os
from types import SimpleNamespace

gpu = os.environ.get("VLLM_FAKE") in ("full", "gpu")
current_platform = SimpleNamespace(device_type="cuda" if gpu else "cpu", is_cpu=lambda: not gpu)
