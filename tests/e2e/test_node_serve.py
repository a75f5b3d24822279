"""`gossamer serve`: a trained policy answers OpenAI-style requests through the server of transformers."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from node.cli.app import run
from node.cli.serve import command
from node.exchange.endpoint import ModelEndpoint
from node.tasks import Item
from tests.swarms import ROOT
from tests.waiting import wait_until

MAIN = "import sys; from node.cli import main; sys.exit(main())"


def test_without_a_server_it_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("node.cli.serve.find_spec", lambda name: None)
    assert run(["serve", "builtin"], debug=False) == 2
    assert "pip install 'gossamer[serve]'" in capsys.readouterr().err
    assert run(["serve", "builtin", "--server", "vllm"], debug=False) == 2
    assert "pip install 'gossamer[vllm]'" in capsys.readouterr().err
    monkeypatch.setattr("node.cli.serve.find_spec", lambda name: None if name == "openai" else name)
    assert run(["serve", "builtin", "--server", "transformers"], debug=False) == 2
    assert f"{sys.executable} -m pip install 'gossamer[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "no/such-model", "--port", str(port), "--server", "transformers"], debug=False) == 2
    said = capsys.readouterr().err
    assert said == f"error: cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port\n"


def test_vllm_knows_the_model_by_its_folders_name() -> None:
    words = command("vllm", "policy", "127.0.0.1", 8000)
    assert words[words.index("--model") + 1] == words[words.index("--served-model-name") + 1] == "policy"


@pytest.mark.slow
def test_a_policy_answers_requests_until_it_is_asked_to_end(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "builtin", "--port", str(port), "--server", "transformers"]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([sys.executable, "-c", MAIN, *words], env=environment, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return bool(asked(f"{url}/health"))
        except OSError:
            return False

    try:
        wait_until(answers, 100, "the server")
        said = asked(f"{url}/v1/completions", {"model": "policy", "prompt": "1+2=", "max_tokens": 8, "temperature": 0})
        assert said["choices"][0]["finish_reason"] == "stop"
        hot = {"model": "policy", "prompt": "1+2=", "max_tokens": 8, "temperature": 5}
        assert len({asked(f"{url}/v1/completions", hot)["choices"][0]["text"] for _ in range(4)}) > 1
        # This server gives one answer at a time.
        endpoint = ModelEndpoint(f"{url}/v1", "policy", 8, is_chat=False)
        made = endpoint.answer(Item("1+2=", ""), 3)
        assert len(made) == 3 and any(answer.finished for answer in made) and endpoint.take_usage().completion > 3
        for path, body, headers, status in (
            ("/v1/completions", {"model": "gpt2", "prompt": "1+2="}, {}, 400),
            ("/v1/chat/completions", {"model": "policy", "messages": [{"role": "user", "content": "1+2="}]}, {}, 400),
            ("/load_model", {"model": "gpt2"}, {}, 404),
            ("/reset", {}, {}, 404),
            ("/v1/completions", {"model": "policy", "prompt": "1+2="}, {"Host": "evil.example"}, 421),
            ("/v1/completions", {"model": "policy", "prompt": "1+2="}, {"Origin": "http://evil.example"}, 403),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                asked(f"{url}{path}", body, headers)
            assert refused.value.code == status, path
            refused.value.close()
    finally:
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0


def asked(url: str, body: Mapping[str, object] | None = None, headers: Mapping[str, str] = MappingProxyType({})) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())
