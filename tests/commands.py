"""Commands and nodes in processes forked from the tests: they share the seconds that importing torch and TRL takes.

What is tested of a fresh process, that it can be installed and what it imports, is tested by others.
"""

import multiprocessing
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers.models.llama.modeling_llama  # noqa: F401  # or each child would import it
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import node.engines.hf  # noqa: F401
from node.cli import main
from node.config import NodeConfig
from node.run import run_node

FORK = multiprocessing.get_context("fork")
get_checkpoint_conversion_mapping("llama")  # transformers makes the table, of all models, when it is first asked
OUTPUTS = ("stdout", "stderr")


def start(output: Path, *arguments: str | Path) -> multiprocessing.process.BaseProcess:
    """Start `gossamer` with `arguments`; what it prints goes to `stdout` and `stderr` in the folder `output`."""
    child = FORK.Process(target=_run, args=(output, [str(argument) for argument in arguments]))
    child.start()
    return child


def run(*arguments: str | Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Run `gossamer` with `arguments` to its end."""
    with TemporaryDirectory() as folder:
        child = start(Path(folder), *arguments)
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(list(map(str, arguments)), timeout)
        printed = [Path(folder, name).read_text() for name in OUTPUTS]
    return subprocess.CompletedProcess(arguments, child.exitcode, *printed)


def start_node(config: NodeConfig, folder: Path) -> multiprocessing.process.BaseProcess:
    """Start a node in `folder`."""
    child = FORK.Process(target=run_node, args=(config, folder))
    child.start()
    return child


def _run(output: Path, arguments: list[str]) -> None:
    with ExitStack() as stack:
        sys.stdout, sys.stderr = (stack.enter_context((output / name).open("w", buffering=1)) for name in OUTPUTS)
        for number, stream in enumerate((sys.stdout, sys.stderr), 1):
            os.dup2(stream.fileno(), number)
        main(arguments)
