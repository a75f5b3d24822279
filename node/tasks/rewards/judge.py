"""A judge: another model, behind an OpenAI-compatible URL, that pays a completion from 0 to 1 by a rubric.

It is one more reward function (`node.tasks.rewards.functions`). No peer can check what it says, so a task with a judge
trains its maker alone. A text is unscorable if the judge does not answer in time, or with no number from 0 to 1.

The variable OPENAI_API_KEY is sent along if it is set, as other clients do.
"""

import json
import os
import re
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

RUBRIC = "You grade answers. 1 is right and complete, 0 is wrong."
ASK = "Reply with one number from 0 to 1 and nothing else."
MAX_TOKENS = 1024  # of a reply: some models think first
MAX_REPLY_BYTES = 1 << 20
AT_ONCE = 8  # requests to a judge
_NUMBER = re.compile(r"(?<![\d.-])(?:0(?:\.\d*)?|1(?:\.0*)?|\.\d+)(?![\d.]*\d)")


class JudgeError(Exception):
    """The judge did not answer, or with no number; the text says which."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge at `url`, to which `/chat/completions` is added; a question to it takes `seconds` at most."""

    url: str
    model: str
    rubric: str
    seconds: float

    def __call__(self, prompts: list[Any], completions: list[Any], **_: object) -> list[float]:
        """Return what the judge pays for each completion; raise `JudgeError` if it does not say."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._paid, map(_text, prompts), map(_text, completions)))

    def _paid(self, question: str, answer: str) -> float:
        content = f"Question:\n{question}\n\nAnswer:\n{answer}\n\n{ASK}"
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": self.rubric}, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        try:
            with ask_openai(f"{self.url.rstrip('/')}/chat/completions", body, self.seconds) as reply:
                parsed: Any = json.loads(reply.read(MAX_REPLY_BYTES))
            text = parsed["choices"][0]["message"]["content"]
        except (OSError, ValueError, LookupError, TypeError) as error:  # OSError: of urllib, too
            raise JudgeError(f"the judge at {self.url} does not answer: {type(error).__name__}: {error}") from None
        return paid_by(text)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go to whatever host it names."""

    def redirect_request(self, *_: Any) -> None:
        """Leave the reply as it is, which is then an `HTTPError`."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def ask_openai(address: str, body: Mapping[str, Any] | None, seconds: float) -> HTTPResponse:
    """Send a request to an OpenAI-compatible server, with `body` as JSON if there is one, and the key if it is set.

    Args:
        address: begins with http:// or https://, which the caller has looked at.
        body: None for a GET.
        seconds: that it may take to connect, and each part of the reply to come.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
    reply: HTTPResponse = _OPENER.open(request, timeout=seconds)
    return reply


def paid_by(reply: str) -> float:
    """Return the number from 0 to 1 that a judge's reply begins with, after its thoughts; raise `JudgeError`."""
    match = _NUMBER.search(reply.rpartition("</think>")[2])
    if match is None:
        raise JudgeError(f"the judge replied with no number from 0 to 1: {reply[:60]!r}")
    return float(match[0])


def _text(messages: Any) -> str:
    """Return a prompt or a completion as text."""
    if isinstance(messages, str):
        return messages
    return "\n\n".join(str(message["content"]) for message in messages)
