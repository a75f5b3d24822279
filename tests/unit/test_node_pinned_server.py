"""What the server of `gossamer serve` passes on."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler

from node.operations.pinned_server import Pinned, drawing_as_asked, has_chat_template

HERE = {"host": "127.0.0.1:8000"}


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status(host: str, method: str, path: str, headers: dict[str, str], *, chats: bool = True) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": lines}
    asyncio.run(Pinned(app, host, chats=chats)(scope, None, send))  # type: ignore[arg-type]  # nothing is received
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("POST", "/v1/completions", {}, 200),
        ("GET", "/health", {"host": "localhost:8000"}, 200),
        ("GET", "/health", {"host": "[::1]:8000"}, 200),
        ("POST", "/v1/completions", {"origin": "http://127.0.0.1:8000"}, 200),
        ("POST", "/load_model", {}, 404),
        ("POST", "/reset", {}, 404),
        ("GET", "/openapi.json", {}, 404),
        ("OPTIONS", "/v1/completions", {}, 404),
        ("GET", "/health", {"host": "evil.example"}, 421),
        ("GET", "/health", {"host": "127.0.0.1.evil.example:8000"}, 421),
        ("GET", "/health", {"host": "["}, 421),
        ("GET", "/health", {"host": ""}, 421),
        ("POST", "/v1/completions", {"origin": "http://evil.example"}, 403),
        ("POST", "/v1/completions", {"origin": "null"}, 403),
        ("POST", "/v1/completions", {"origin": "http://["}, 403),
        ("POST", "/v1/completions", {"origin": "http://127.0.0.1:8001"}, 403),
    ],
)
def test_a_server_on_loopback_answers_for_its_model_and_nobody_elses_page(
    method: str, path: str, headers: dict[str, str], expected: int
) -> None:
    assert status("127.0.0.1", method, path, HERE | headers) == expected


def test_a_server_for_other_machines_may_have_any_name_and_refuses_pages_of_others() -> None:
    named = {"host": "box.example:8000"}
    assert status("0.0.0.0", "GET", "/health", named) == 200  # nothing listens
    assert status("0.0.0.0", "GET", "/health", named | {"origin": "http://evil.example"}) == 403  # as above


@pytest.mark.parametrize(
    ("body", "draws"),
    [
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"temperature": 1.0, "top_p": 0.9}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0, "top_p": 0.9}, False),
        ({"temperature": None}, False),
        ({}, False),
    ],
)
def test_a_request_that_names_a_temperature_has_its_tokens_drawn(
    body: dict[str, Any], draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server took the likeliest tokens, whatever the request said."""
    build = drawing_as_asked(BaseHandler._build_generation_config)
    monkeypatch.setattr(BaseHandler, "_build_generation_config", build)
    state = SimpleNamespace(_compile=False)
    handler = CompletionHandler(model_manager=None, generation_state=state)
    config = handler._build_generation_config(body | {"max_tokens": 8}, GenerationConfig())
    assert bool(config.do_sample) == draws and config.max_new_tokens == 8
    assert config.temperature == body.get("temperature") and config.top_p == body.get("top_p")
    assert (config.top_k == 0) == draws, "of all tokens"
    own = handler._build_generation_config(body, GenerationConfig(do_sample=True, top_k=20))
    assert own.top_k == 20, "the model's own settings stay"


def test_a_model_without_a_chat_template_gets_no_chats(tmp_path: Path) -> None:
    for path in ("/v1/chat/completions", "/v1/responses"):
        assert status("127.0.0.1", "POST", path, HERE) == 200
        assert status("127.0.0.1", "POST", path, HERE, chats=False) == 400
    assert status("127.0.0.1", "POST", "/v1/completions", HERE, chats=False) == 200
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)
