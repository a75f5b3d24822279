"""A model behind an OpenAI-compatible URL, on this machine (Ollama, llama.cpp, vLLM) or a rented one, which answers.

    POST URL/chat/completions     a question as a chat
    POST URL/completions          a question as a text to be continued, for models that were not taught to chat

Servers differ in what they take, and are not asked which they are. A server that gives fewer answers than `n` is asked
again for the rest, and one that refuses `n` is asked for one at a time. Where a refusal names `max_completion_tokens`,
or says that there is no system role, the request is put that way from then on.

A server that is busy, fails or does not answer is asked again, after the pause that it names, or after 1 s, then 2, 4
and so on. No pause is longer than `LONGEST_PAUSE_S`. Meanwhile no other question is sent to it. A refusal that no
waiting mends is an error, and so is a server that fails by a defect of its own (500) `DEFECTS` times in a row.

A request that was sent and not answered in time, or whose connection broke, may cost money all the same. So may one of
which a gateway says that the server behind it was late (504), and one whose reply is no answer. All count as the most
that they may use: the prompt's tokens by its bytes, and `max_tokens` for each answer.

The variable OPENAI_API_KEY is sent along if it is set, as other clients do.
"""

import json
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any, NamedTuple, cast

import structlog

from node.errors import PassingError, UserError, printable
from node.policy.prompt import chat_turns, plain_text, stop_texts
from node.processes.threads import on_daemon
from node.tasks import Item
from node.tasks.rewards.judge import ask_openai

REPLY_BYTES = 1 << 20  # that a reply may have, and for each token of its answers so many more:
REPLY_BYTES_A_TOKEN = 32
LONGEST_PAUSE_S = 60.0
CHECK_S = 10.0  # that the first look at a server may take
DEFECTS = 4
LOOK_S = 0.2  # between two looks whether the program is to end
DEFECT = 500
LATE = 504  # of a gateway: the server behind it may have answered, too late
PASSING = {408, 409, 425, 429, DEFECT, 502, 503, LATE, 529}  # statuses after which asking again may help
FORM = {400, 422, DEFECT, 501}  # statuses of a server that wants the request in another form
BYTES_A_TOKEN = 4  # of a text whose server does not count tokens
SAID_BYTES = 4096  # of a refusal
MAX_COUNT = 1 << 40  # tokens of one reply that a server may claim: more than any reply has

log = structlog.get_logger()


class EndpointAnswer(NamedTuple):
    """One answer; `finished` tells that it ended by itself, and not at a limit of length."""

    text: str
    finished: bool


class TokenUsage(NamedTuple):
    """Tokens that a server has counted, or that were estimated where its count cannot be true."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: "TokenUsage") -> "TokenUsage":  # type: ignore[override]  # sums, and does not append
        return TokenUsage(self.prompt + other.prompt, self.completion + other.completion)


class StoppedError(Exception):
    """The program is to end, or a request that was lost is not to be sent again."""


class _BusyError(PassingError):
    """Asking again may help, after so many seconds if the server says how many."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class _LostError(_BusyError):
    """The request was sent, and no reply came."""


class _RefusedRequestError(UserError):
    """The server refuses the request as it is."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(slots=True)
class ModelEndpoint:
    """Asks one endpoint, from any number of threads.

    Args:
        url: http://HOST:PORT/v1, say, to which the paths above are added.
        model: which of the server's models answers.
        max_tokens: of an answer.
        temperature: of sampling; None leaves it to the server.
        is_chat: whether a question is sent as a chat.
        seconds: that one request may take.
        requests_a_minute: at most; None for no limit of one's own.
        is_stopping: tells that the program is to end.
        sends_again: whether a request that was sent and not answered is sent again; it may cost each time.
        clock: seconds.
        sleep: waits so many seconds.
    """

    url: str
    model: str
    max_tokens: int
    temperature: float | None = 1.0
    is_chat: bool = True
    seconds: float = 300.0
    requests_a_minute: float | None = None
    is_stopping: Callable[[], object] = bool
    sends_again: bool = True
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _takes_n: bool = True
    _limit: str = "max_tokens"  # the field's name
    _takes_system: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = -float("inf")  # when the next request may go
    _failures: int = 0  # since the last answer
    _used: TokenUsage = field(default_factory=TokenUsage)  # since `take_usage`
    _sent: list[TokenUsage] = field(default_factory=list)  # the most that each request with the server may use

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the endpoint's URL has to begin with http:// or https://, and {self.url!r} does not")

    def check(self) -> None:
        """Look whether a server is there.

        Raises:
            UserError: none is, or it does not admit this key.
        """
        try:
            ask_openai(self.url + "/models", None, CHECK_S).close()
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400:
                where = printable(error.headers.get("Location") or "another address")
                raise UserError(f"{self.url} redirects to {where}: name that server with --url") from None
            if error.code in (401, 403):
                raise UserError(
                    f"{self.url} answers {error.code}: set OPENAI_API_KEY to a key that it admits"
                ) from None
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise UserError(f"no server is at {self.url} ({why}): start it first, or name another --url") from None

    def answer(self, item: Item, n: int) -> list[EndpointAnswer]:
        """Return `n` answers to a question.

        Raises:
            UserError: the server refuses the request, for its key or its model, say.
            StoppedError: the program is to end, or a request was lost and `sends_again` is false.
        """
        answers: list[EndpointAnswer] = []
        while len(answers) < n:
            wanted = n - len(answers) if self._takes_n else 1
            found = self._ask(item, wanted)
            self._takes_n = self._takes_n and len(found) == wanted
            answers += found[:wanted]
        return answers

    def take_usage(self, *, with_sent: bool = False) -> TokenUsage:
        """Return the tokens that were used since the last call.

        Args:
            with_sent: whether to add the most that the requests which are with the server may use.
        """
        with self._lock:
            used = sum(self._sent if with_sent else [], self._used)
            self._used = TokenUsage()
        return used

    def _ask(self, item: Item, n: int) -> list[EndpointAnswer]:
        """Return at most `n` answers, and at least one."""
        while True:
            body: dict[str, Any] = {"model": self.model, self._limit: self.max_tokens}
            if self.temperature is not None:
                body["temperature"] = self.temperature
            if n > 1:
                body["n"] = n
            if self.is_chat:
                body["messages"] = chat_turns(item, system_role=self._takes_system)
            else:
                stop = stop_texts(item)
                body |= {"prompt": plain_text(item), **({"stop": stop} if stop else {})}
            try:
                return self._patiently("/chat/completions" if self.is_chat else "/completions", body)
            except _RefusedRequestError as refused:
                if refused.status not in FORM or not self._adapt(str(refused), item, n):
                    raise
                n = n if self._takes_n else 1

    def _adapt(self, why: str, item: Item, n: int) -> bool:
        """Put the next request in another form, after a refusal of `n` answers to `item`; tell if there is one."""
        if "max_completion_tokens" in why and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"
        elif self.is_chat and self._takes_system and "system" in why.lower() and item.system:
            self._takes_system = False
        elif n > 1:
            self._takes_n = False
        else:
            return False
        return True

    def _read(self, reply: Any, body: Mapping[str, Any]) -> tuple[list[EndpointAnswer], TokenUsage]:
        try:
            answers = [_answer(choice) for choice in reply["choices"]]
            if not answers:
                raise LookupError("no choice")
        except (TypeError, LookupError, AttributeError) as error:
            why = f"{self.url} does not answer as an OpenAI-compatible server ({type(error).__name__}: {error})"
            raise self._no_answer(why) from None
        try:
            counted = reply["usage"]
            usage = TokenUsage(int(counted["prompt_tokens"]), int(counted["completion_tokens"]))
            least = TokenUsage(1, any(answer.text for answer in answers))
            if not all(low <= tokens <= MAX_COUNT for low, tokens in zip(least, usage, strict=True)):
                raise ValueError("no count of tokens")
        except (TypeError, LookupError, ValueError, OverflowError):
            usage = TokenUsage(_prompt_tokens(body), sum(_estimate(answer.text) for answer in answers))
        return answers, usage

    def _patiently(self, path: str, body: Mapping[str, Any]) -> list[EndpointAnswer]:
        """Return the answers to a request, which is sent again for as long as that may help."""
        was_lost = False
        while True:
            self._wait(was_lost)
            try:
                answers = self._count(path, body)
            except _BusyError as busy:
                was_lost = was_lost or isinstance(busy, _LostError)
                self._pause(busy)
                continue
            with self._lock:
                if self._failures:
                    log.info("the endpoint answers again", url=self.url)
                self._failures = 0
            return answers

    def _count(self, path: str, body: Mapping[str, Any]) -> list[EndpointAnswer]:
        """Send a request once, and count what it uses."""
        used, most = TokenUsage(), TokenUsage(_prompt_tokens(body), self.max_tokens * body.get("n", 1))
        with self._lock:
            self._sent.append(most)
        try:
            answers, used = self._read(self._send(path, body), body)
        except _LostError:
            used = most
            raise
        finally:
            with self._lock:
                self._sent.remove(most)
                self._used += used
        return answers

    def _wait(self, was_lost: bool) -> None:
        """Wait until the next request may go, and take its turn; `was_lost` tells that it was sent before, and lost."""
        while not self.is_stopping() and (self.sends_again or not was_lost):
            with self._lock:
                left = self._next - self.clock()
                if left <= 0:
                    if self.requests_a_minute:
                        self._next = self.clock() + 60.0 / self.requests_a_minute
                    return
            self.sleep(min(left, LOOK_S))
        raise StoppedError

    def _pause(self, busy: _BusyError) -> None:
        with self._lock:
            now = self.clock()
            if self._next > now + LOOK_S and self._failures:
                return  # another request has failed in the same moment
            self._failures += 1
            pause = min(LONGEST_PAUSE_S, 2.0 ** min(self._failures - 1, 10) if busy.seconds is None else busy.seconds)
            self._next = now + pause
        log.warning("the endpoint does not answer", why=str(busy), again_in_s=pause)

    def _no_answer(self, why: str) -> Exception:
        """Return the error for a reply that is no answer: the next one may be, but not for ever."""
        return _LostError(why) if self._failures < DEFECTS else UserError(why)

    def _send(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            text = on_daemon(partial(self._reply, path, body), "request").result(self.seconds)
        except urllib.error.HTTPError as error:
            why = f"{self.url}{path} answers {error.code}: {_said(error)[:300]}"
            if error.code in PASSING and (error.code != DEFECT or self._failures < DEFECTS):
                kind = _LostError if error.code == LATE else _BusyError
                raise kind(why, _seconds(error.headers.get("Retry-After"))) from None
            raise _RefusedRequestError(error.code, why) from None
        except urllib.error.URLError as error:
            raise _BusyError(f"{self.url}{path} does not answer: {error.reason}") from None
        except (OSError, HTTPException) as error:  # after it was sent
            why = str(error) or f"its reply was not whole after {self.seconds:g} s"
            raise _LostError(f"{self.url}{path} does not answer: {why}") from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            why = f"{self.url}{path} does not answer in JSON: is this the URL of an API?"
            raise self._no_answer(why) from None

    def _reply(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Send a request and return its reply, or as much as is too much of one, which is no JSON."""
        most = REPLY_BYTES + REPLY_BYTES_A_TOKEN * self.max_tokens * body.get("n", 1)
        with ask_openai(self.url + path, body, self.seconds) as reply:
            text = reply.read(most)
            if reply.length and len(text) < most:
                raise IncompleteRead(text, reply.length)
            return text


def _answer(choice: Mapping[str, Any]) -> EndpointAnswer:
    message = choice.get("message")
    text = choice.get("text") if message is None else message.get("content")
    text = text if isinstance(text, str) else ""
    whole = text.encode(errors="replace").decode()  # half of an emoji is no Unicode and cannot be sent
    return EndpointAnswer(whole, choice.get("finish_reason") == "stop")


def _said(error: urllib.error.HTTPError) -> str:
    """Return what a refusal says; nothing where that does not come."""
    try:
        with error:
            said = cast("HTTPResponse", error.fp).read1(SAID_BYTES)  # one piece: more may drip
        return printable(" ".join(said.decode(errors="replace").split()))
    except (OSError, HTTPException):
        return ""


def _prompt_tokens(body: Mapping[str, Any]) -> int:
    return _estimate(json.dumps(body.get("messages", body.get("prompt", ""))))


def _estimate(text: str) -> int:
    return -(-len(text.encode(errors="replace")) // BYTES_A_TOKEN)


def _seconds(retry_after: str | None) -> float | None:
    """Read the header, which may also be a date; that counts as not said."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None
