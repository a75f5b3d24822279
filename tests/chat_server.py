"""An OpenAI-compatible server for tests: says what a function makes of each request, and keeps the requests."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Body = Mapping[str, Any]


class Reply(NamedTuple):
    """What is answered: a status, JSON (or a text that is none), and headers beside those that every reply has."""

    status: int
    content: Any
    headers: Mapping[str, str] = {}


class Asked(NamedTuple):
    """A request as it came."""

    path: str
    key: str | None
    body: Body


def says(*texts: str, reason: str = "stop", usage: tuple[int, int] | None = (10, 3)) -> Reply:
    """Return a reply in the form of chats and of continuations at once."""
    choices = [
        {"index": at, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for at, text in enumerate(texts)
    ]
    for choice in choices:
        del choice["text" if len(texts) % 2 else "message"]  # servers say one of the two
    counted = {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    return Reply(200, {"choices": choices, **counted})


def sum_of(body: Body) -> int:
    """Return the sum of the numbers in the last question of a request."""
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"].splitlines()[-1]
    return sum(int(number) for number in re.findall(r"[+-]?\d+", text))


@contextmanager
def chat_server(answer: Callable[[Body], Reply]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve on loopback while the block lasts; yield the URL, and the list of requests that grows."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(Reply(200, {"data": []}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(Asked(self.path, self.headers.get("Authorization"), body))
            self._say(answer(body))

        def _say(self, reply: Reply) -> None:
            content = reply.content if isinstance(reply.content, str) else json.dumps(reply.content)
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()
