"""The server of transformers for one model: only what asks that model is passed on, and only for who asks this host.

`python -m node.operations.pinned_server HOST serve MODEL ...` runs `transformers serve MODEL ...`, which listens there.

That server loads or unloads any model, also one of the hub, if `/load_model` or `/reset` says so. A page of another
site could ask it through the browser of somebody on this machine, by its address or by a name that is made to mean this
machine (DNS rebinding). So all that is not in `PASSED` is not there, and on loopback a request has to name a loopback
host. Elsewhere the names are unknown, but an origin has to be that host.

A model without a chat template gets no chats: the server would answer that it failed.

A request's temperature or `top_p` means that tokens are drawn. That server would take the likeliest ones all the same,
unless the model's own settings say `do_sample`.
"""

import json
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from node.telemetry.same_site import asked_host, is_of_another_site

PASSED = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
    }
)
CHATS = frozenset({"/v1/chat/completions", "/v1/responses"})
NO_CHATS = "this model has no chat template: send a prompt to /v1/completions"


class Pinned:
    """Passes requests on to `app`, as the module says.

    Args:
        app: the server's.
        host: that it listens at.
        chats: whether the model has a chat template.
    """

    def __init__(self, app: ASGIApp, host: str, *, chats: bool = True) -> None:
        self._app = app
        self._chats = chats
        self._is_loopback = _is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        refused = self._refused(scope) if scope["type"] in ("http", "websocket") else None
        await (self._app if refused is None else refused)(scope, receive, send)

    def _refused(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        if self._is_loopback and not _is_loopback(asked_host(headers)):
            return PlainTextResponse("this is not the host that you asked for\n", 421)
        if is_of_another_site(headers):
            return PlainTextResponse("pages of other sites get no answers here\n", 403)
        if (scope.get("method"), scope["path"]) not in PASSED:
            return PlainTextResponse("this is not served here\n", 404)
        if scope["path"] in CHATS and not self._chats:
            return JSONResponse({"error": {"message": NO_CHATS, "type": "invalid_request_error"}}, 400)
        return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def has_chat_template(folder: Path) -> bool:
    """Tell whether the model in a folder has a chat template, as a file of its own or in its tokenizer's."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(json.loads(settings.read_text()).get("chat_template"))
    )


BuildConfig = Callable[..., Any]
"""The server's: from its handler, a request's body and the model's own settings to transformers' GenerationConfig."""


def drawing_as_asked(build: BuildConfig) -> BuildConfig:
    """Return `build` with tokens drawn, from all that the model gives, where the request asks for that."""

    def built(handler: Any, body: dict[str, Any], *given: Any, **named: Any) -> Any:
        config = build(handler, body, *given, **named)
        asked = [body[name] for name in ("temperature", "top_p") if body.get(name) is not None]
        if asked and asked[0] != 0 and not config.do_sample:
            config.do_sample = True
            config.top_k = 0  # which is 50 otherwise
        return config

    return built


def main() -> None:
    """Run the server, with what it serves pinned."""
    from transformers.cli.serving.utils import BaseHandler
    from transformers.cli.transformers import main as run

    BaseHandler._build_generation_config = drawing_as_asked(BaseHandler._build_generation_config)
    host = sys.argv.pop(1)
    chats = has_chat_template(Path(sys.argv[2]))

    class Config(uvicorn.Config):
        def __init__(self, app: Any, *given: Any, **named: Any) -> None:
            super().__init__(Pinned(app, host, chats=chats), *given, **named)

    uvicorn.Config = Config  # type: ignore[misc]  # the server makes one with its app
    run()


if __name__ == "__main__":
    main()
