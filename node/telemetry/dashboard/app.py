"""The dashboard's paths, who may read them, and the stream of events that the page lives on.

    /            the page          /events   what it shows: server-sent events, see `feed`, and `state` each second
    /status      the state, JSON   /metrics  the same for Prometheus         /healthz   200 while all is well
    /curves      the plots: which metrics each one draws, JSON
    /refusals    what each reason for a refusal means, and whether it is nobody's fault, JSON

Nothing is taken in: GET and HEAD alone. A page of another site must not read this one through the visitor's browser: a
request that names a host which is not ours (DNS rebinding) or comes from another origin is refused; a link to the page
may be followed. Beyond loopback a
token is asked for, as a bearer token or once as `?token=`, which is then kept in a cookie. Peers' text is data to the
page, never markup: the page makes text nodes of it, and the content security policy allows no inline script.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.rollouts.screening import BLAMELESS
from node.telemetry.dashboard.feed import Feed, curves
from node.telemetry.refusals import MEANINGS
from node.telemetry.same_site import asked_host, is_of_another_site

STATIC = Path(str(files("node.telemetry.dashboard"))) / "static"
MAX_PAGES = 16  # open at once; each reads the files for itself
POLL_S = 0.5
STATE_S = 1.0
COOKIE = "gossamer"
SAFE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

State = Callable[[], Mapping[str, Any]]


class Site(NamedTuple):
    """The subject of a page.

    `state` returns what /status says, `page_state` what the page shows of it each second; both are called from
    threads, and an exception is a defect. `metrics` returns Prometheus' text, `well` whether all is well. `folders`
    are those of the nodes, by name.
    """

    folders: Mapping[str, Path]
    state: State
    page_state: State
    metrics: Callable[[], bytes] | None
    well: Callable[[], bool]


def make_app(site: Site, closing: Event, hosts: frozenset[str], token: str = "") -> ASGIApp:
    """Return the ASGI application.

    Args:
        site: what it is of.
        closing: set when streams shall end.
        hosts: by which names, without port, it may be asked for; empty for any.
        token: without it nobody reads anything; "" for none.
    """
    pages = asyncio.Semaphore(MAX_PAGES)

    def status(_: Request) -> Response:
        return JSONResponse(site.state())

    def metrics(_: Request) -> Response:
        return Response(site.metrics() if site.metrics else b"", media_type="text/plain; version=0.0.4; charset=utf-8")

    def healthz(_: Request) -> Response:
        well = site.well()
        return PlainTextResponse("ok\n" if well else "the network failed\n", HTTPStatus.OK if well else 503)

    async def refusals(_: Request) -> Response:
        return JSONResponse({key: {"means": text, "blameless": key in BLAMELESS} for key, text in MEANINGS.items()})

    async def plots(_: Request) -> Response:
        return JSONResponse(curves())

    async def events(_: Request) -> Response:
        if pages.locked():
            return PlainTextResponse(f"{MAX_PAGES} pages are open: close one\n", 503)
        return StreamingResponse(_events(site, closing, pages), media_type="text/event-stream")

    async def page(_: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    routes = [
        Route("/", page),
        Route("/status", status),
        Route("/healthz", healthz),
        Route("/events", events),
        Route("/refusals", refusals),
        Route("/curves", plots),
        *([Route("/metrics", metrics)] if site.metrics else []),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return _Guard(Starlette(routes=routes), hosts, token)


async def _events(site: Site, closing: Event, pages: asyncio.Semaphore) -> AsyncIterator[bytes]:
    """Yield server-sent events until the client goes away."""
    async with pages:
        feed = await run_in_threadpool(Feed, site.folders)
        said_at = float("-inf")
        clock = asyncio.get_running_loop().time
        while not closing.is_set():
            for kind, data in await run_in_threadpool(feed.poll):
                yield _event(kind, data)
            if clock() - said_at >= STATE_S:
                said_at = clock()
                yield _event("state", await run_in_threadpool(site.page_state))
            await asyncio.sleep(POLL_S)


def _event(kind: str, data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class _Guard:
    """Lets through who may read, and adds the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str) -> None:
        self._app = app
        self._hosts = hosts
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                safe = [(name.encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *safe]
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("nothing is taken in here\n", 405)
        if self._hosts and asked_host(headers) not in self._hosts:
            return PlainTextResponse("this is not the host that you asked for\n", 421)
        if is_of_another_site(headers):
            return PlainTextResponse("a page of another site may not read this one\n", 403)
        followed = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not followed:  # as for an image
            return PlainTextResponse("a page of another site may not read this one\n", 403)
        return self._asks_for_token(scope, headers)

    def _asks_for_token(self, scope: Scope, headers: Headers) -> Response | None:
        if not self._token or scope["path"] == "/healthz":  # an orchestrator's probe has no token, and reads "ok" alone
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = Request(scope).cookies.get(COOKIE, "")
        if self._knows(bearer if scheme.lower() == "bearer" else "") or self._knows(cookie):
            return None
        if self._knows(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
            response = RedirectResponse("/" + scope["path"].lstrip("/\\"), 303)  # "//" would name another host
            response.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
            return response
        return PlainTextResponse("this page wants the token that the node printed at its start\n", 401)

    def _knows(self, word: str) -> bool:
        return hmac.compare_digest(word.encode(), self._token.encode())
