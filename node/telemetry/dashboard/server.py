"""HTTP in a thread of its own: uvicorn on a socket that we opened, for as long as a block lasts."""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NamedTuple

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from node.config import ObserveConfig
from node.errors import UserError
from node.telemetry.dashboard.app import Site, make_app

MAX_CONNECTIONS = 256
MAX_WAITING = 192  # connections without a request in progress: a newcomer takes the place of the oldest
IDLE_S = 15.0  # for a request, or a part of an answer: a browser that lost its network leaves its connections open
STOP_S = 2  # for streams that are open when the node ends; each looks twice a second whether it does
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

log = structlog.get_logger()


class Served(NamedTuple):
    """Where a site is read: the port that it got, the token that it asks for ("" for none), the link to its page."""

    port: int
    token: str
    link: str


class _PageConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # uvicorn chooses the class when it is imported
    """Hangs up if for `IDLE_S` no whole request comes and nothing of an answer is read. To make one may take longer.

    Those who connect and say nothing hold nobody up: of more than `MAX_WAITING` the oldest goes. uvicorn's own
    `timeout_keep_alive` begins with the end of an answer, so it ends none of these.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._made = self.loop.time()
        waiting = [
            peer
            for peer in self.connections
            if (peer.cycle is None or peer.cycle.response_complete) and not peer.transport.is_closing()
        ]
        if len(waiting) > MAX_WAITING:
            min(waiting, key=lambda peer: peer._made).transport.abort()
        self._before = self.cycle, 0
        self._idle = self.loop.call_later(IDLE_S, self._look)

    def _look(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        now = self.cycle, self.transport.get_write_buffer_size()
        if now == self._before and not is_answering:
            self.transport.abort()
        else:
            self._before = now
            self._idle = self.loop.call_later(IDLE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.cancel()
        super().connection_lost(exc)


@contextmanager
def serve(config: ObserveConfig, site: Site) -> Iterator[Served]:
    """Serve `site` while the block lasts.

    Raises:
        UserError: the host or the port cannot be listened on.
    """
    alone = _is_loopback(config.host)
    token = config.token or ("" if alone else secrets.token_urlsafe(24))
    closing = Event()
    app = make_app(site, closing, LOOPBACK_NAMES | {config.host} if alone else frozenset(), token)
    with serve_app(app, config.host, config.port, "set observe.port=0, or another") as (port, link):
        try:
            yield Served(port, token, link + (f"?token={token}" if token else ""))
        finally:
            closing.set()


@contextmanager
def serve_app(app: ASGIApp, host: str, port: int, remedy: str) -> Iterator[tuple[int, str]]:
    """Serve an application while the block lasts; yield the port, and the link to it.

    Raises:
        UserError: the host or the port cannot be listened on; `remedy` says what to do.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): {remedy}") from None
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=_PageConnection,
            lifespan="off",
            log_config=None,
            log_level="critical",  # a client that went away is no event
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_S,
        )
    )
    server_thread = Thread(target=server.run, args=([listening],), name="gossamer-observe", daemon=True)
    server_thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield port, f"http://{shown}:{port}/"
    finally:
        server.should_exit = True
        server_thread.join(2 * STOP_S)
        if server_thread.is_alive():
            log.warning("the page's server does not end and is left behind", seconds=2 * STOP_S)
        listening.close()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
