"""README's two lines that serve a policy: `gossamer export`, then the server of transformers."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from node.exchange.endpoint import ModelEndpoint
from node.tasks import Item
from tests.swarms import ROOT
from tests.waiting import wait_until

SCRIPTS = Path(sys.executable).parent


@pytest.mark.slow
def test_an_exported_policy_answers_requests_until_its_server_is_asked_to_end(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    environment = {"HOME": str(tmp_path), "PATH": f"{SCRIPTS}{os.pathsep}{os.defpath}", "HF_HUB_OFFLINE": "1"}
    export, serve = (
        line.split("#")[0].split()
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(("    gossamer export ", "    transformers serve "))
    )
    export[2] = "builtin"  # instead of a node's folder
    subprocess.run(export, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True, timeout=100)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = subprocess.Popen([*serve, "--port", str(port)], env=environment, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return bool(asked(f"{url}/health"))
        except OSError:
            return False

    try:
        wait_until(answers, 100, "the server")
        sum_of = {"model": serve[2], "prompt": "1+2=", "max_tokens": 8, "temperature": 0}
        assert asked(f"{url}/v1/completions", sum_of)["choices"][0]["finish_reason"] == "stop"
        # This server gives one answer at a time.
        endpoint = ModelEndpoint(f"{url}/v1", serve[2], 8, is_chat=False)
        made = endpoint.answer(Item("1+2=", ""), 3)
        assert len(made) == 3 and any(answer.finished for answer in made) and endpoint.take_usage().completion > 3
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(30)


def asked(url: str, body: Mapping[str, object] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())
