"""`gossamer serve`: OpenAI-style requests, answered by a trained policy through somebody else's server."""

import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from node.cli.options import Debug, Settings, Target
from node.errors import UserError, how_to_install
from node.operations.trained import find_trained
from node.processes.signals import interrupting_signals

NAME = "policy"  # requests ask for a node's policy by this name

Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Listen here; anybody who reaches it may ask.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")]
Server = Annotated[
    Literal["transformers", "vllm"] | None,
    typer.Option(help="The server.  [default: vllm if it is installed]", show_default=False),
]


def serve(
    model: Target,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    server: Server = None,
    settings: Settings = None,
    debug: Debug = False,
) -> int:
    """Serve a policy by an OpenAI-compatible API.

    It runs the server of vLLM or of transformers, until Ctrl-C. A checkpoint is exported to a temporary folder first.

    \b
    Example:
      gossamer serve runs/a/nodes/n0
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "policy", "prompt": "12+7=", "max_tokens": 8}'
    """
    chosen = server or ("vllm" if find_spec("vllm") else "transformers")
    extra, packages = _NEEDS[chosen]
    if any(find_spec(package) is None for package in packages):
        raise UserError(f"the server of {chosen} is not here: {how_to_install(extra)}")
    _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="gossamer-serve-") as made:
        folder = _folder(model, Path(made), settings)
        print(f"serving {model} as {folder.name!r} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        # A server names a model by the path that it is given. So the path is one word, relative to the folder above.
        words = command(chosen, folder.name, host, port)
        with interrupting_signals(), subprocess.Popen(words, cwd=folder.parent) as child:
            try:
                return child.wait()
            except KeyboardInterrupt:  # a signal to end: the server gets it too
                child.terminate()
                child.wait()
                return 0


def _check_free(host: str, port: int) -> None:
    """Raise `UserError` if nobody can listen there; the server itself finds out once it has loaded the model."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            tried.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None


_NEEDS = {"vllm": ("vllm", ("vllm",)), "transformers": ("serve", ("fastapi", "openai"))}
"""The extra that brings a server, and the packages of it that are looked for."""


def command(server: str, name: str, host: str, port: int) -> list[str]:
    """Return the command line of a server for the model in the folder `name` of its current one."""
    at = ["--host", host, "--port", str(port)]
    if server == "vllm":
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-P", "-m", module, "--model", name, "--served-model-name", name, *at]
    return [sys.executable, "-P", "-m", "node.operations.pinned_server", host, "serve", name, *at]


def _folder(model: str, made: Path, settings: list[str] | None) -> Path:
    """Return the folder of a model that a server can load: `model` itself if it is one, or its export in `made`."""
    folder = Path(model).resolve()
    trained = find_trained(model, settings)
    if (folder / "config.json").is_file() and trained.node is None and trained.adapters is None:
        return folder
    from node.operations.model_export import write_model

    write_model(model, made / NAME, None, settings)
    return made / NAME
