"""An endpoint that answers: servers that differ, are busy, refuse or make no sense, over sockets of this machine."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest
import structlog

from node.errors import UserError
from node.exchange.endpoint import DEFECTS, LONGEST_PAUSE_S, EndpointAnswer, ModelEndpoint, StoppedError, TokenUsage
from node.tasks import Item
from tests.chat_server import Asked, Body, Reply, chat_server, says

pytestmark = pytest.mark.slow

ITEM = Item("3+4=", "7", "Add.")
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4="}]
PROMPT, STOP = "Add.\n\n3+4=", ["\n"]


class Clock:
    """Time that passes by being waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waited.append(seconds)


class Made(NamedTuple):
    """Answers, and what they took."""

    answers: tuple[EndpointAnswer, ...]
    usage: TokenUsage


def answers(
    reply: Callable[[Body], Reply], n: int = 2, is_stopping: Callable[[], object] = bool, **options: Any
) -> tuple[Made, list[Asked], Clock]:
    """Ask a server for `n` answers; return them, what it was asked, and the clock."""
    clock = Clock()
    with chat_server(reply) as (url, asked):
        endpoint = ModelEndpoint(
            url, "tiny", 16, is_stopping=is_stopping, clock=clock, sleep=clock.sleep, seconds=20.0, **options
        )
        endpoint.check()
        return Made(tuple(endpoint.answer(ITEM, n)), endpoint.take_usage()), asked, clock


def in_turn(*replies: Reply) -> Callable[[Body], Reply]:
    """Give these replies one after the other."""
    left: Iterator[Reply] = iter(replies)
    return lambda body: next(left)


def test_a_question_is_a_chat_and_its_answers_come_with_their_ends_and_what_they_took() -> None:
    made, asked, _ = answers(lambda body: says("7", "8"))
    assert made.answers == (EndpointAnswer("7", True), EndpointAnswer("8", True)) and made.usage == TokenUsage(10, 3)
    (request,) = asked
    assert request.path == "/v1/chat/completions" and request.key is None
    assert request.body == {"model": "tiny", "max_tokens": 16, "temperature": 1.0, "n": 2, "messages": CHAT}
    made, _, _ = answers(lambda body: says("7", "8", reason="length"))
    assert not any(answer.finished for answer in made.answers)


def test_a_model_that_does_not_chat_continues_a_text_to_the_next_question() -> None:
    made, asked, _ = answers(lambda body: says("7"), n=1, is_chat=False, temperature=None)
    assert made.answers == (EndpointAnswer("7", True),)
    assert asked[0].path == "/v1/completions"
    assert asked[0].body == {"model": "tiny", "max_tokens": 16, "prompt": PROMPT, "stop": STOP}


def test_a_key_is_sent_if_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    _, asked, _ = answers(lambda body: says("7", "8"))
    assert asked[0].key == "Bearer secret"


def test_a_server_that_gives_one_answer_is_asked_for_the_rest_and_then_for_one_at_a_time() -> None:
    made, asked, _ = answers(lambda body: says("7"), n=4)
    assert len(made.answers) == 4 and made.usage == TokenUsage(40, 12)
    assert [request.body.get("n") for request in asked] == [4, None, None, None]


def test_more_answers_than_were_asked_for_are_not_taken() -> None:
    made, _, _ = answers(lambda body: says("7", "8", "9"))
    assert [answer.text for answer in made.answers] == ["7", "8"]


@pytest.mark.parametrize("status", [400, 422, 501])
def test_a_server_that_refuses_n_is_asked_for_one_at_a_time(status: int) -> None:
    made, asked, _ = answers(lambda body: Reply(status, "n is not supported") if "n" in body else says("7"))
    assert len(made.answers) == 2 and len(asked) == 3


def test_a_limit_by_its_newer_name() -> None:
    refusal = Reply(400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}})
    made, asked, _ = answers(lambda body: refusal if "max_tokens" in body else says("7", "8"))
    assert len(made.answers) == 2 and asked[-1].body["max_completion_tokens"] == 16


@pytest.mark.parametrize("status", [400, 500])
def test_a_model_without_a_system_role_gets_the_instruction_in_the_first_turn(status: int) -> None:
    def reply(body: Body) -> Reply:
        return Reply(status, "System role not supported") if len(body["messages"]) == 2 else says("7", "8")

    made, asked, _ = answers(reply)
    assert len(made.answers) == 2
    assert asked[-1].body["messages"] == [{"role": "user", "content": "Add.\n\n3+4="}]


def test_a_busy_server_is_asked_again_after_the_pause_that_it_names() -> None:
    made, _, clock = answers(in_turn(Reply(429, "slow down", {"Retry-After": "7"}), says("7", "8")))
    assert len(made.answers) == 2 and clock.now == pytest.approx(7.0)


def test_no_pause_that_a_server_names_is_longer_than_a_minute() -> None:
    _, _, clock = answers(in_turn(Reply(429, "slow down", {"Retry-After": "3600"}), says("7", "8")))
    assert clock.now == pytest.approx(LONGEST_PAUSE_S)


def test_a_server_that_fails_is_asked_again_after_longer_and_longer_pauses() -> None:
    fails = [Reply(503, "loading")] * 8
    made, asked, clock = answers(in_turn(*fails, says("7", "8")))
    assert len(made.answers) == 2 and len(asked) == 9
    assert clock.now == pytest.approx(sum(min(2.0**at, LONGEST_PAUSE_S) for at in range(8)))


def test_a_server_with_a_defect_is_no_endless_wait() -> None:
    with pytest.raises(UserError, match="answers 500: out of memory"):
        answers(lambda body: Reply(500, "out of memory"), n=1)
    made, asked, _ = answers(in_turn(*[Reply(500, "once")] * DEFECTS, says("7")), n=1)
    assert len(made.answers) == 1 and len(asked) == DEFECTS + 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(401, {"error": "no such key"}), "answers 401: .*no such key"),
        (Reply(404, "model 'tiny' not found"), "answers 404: model 'tiny' not found"),
        (Reply(200, "<html>"), "does not answer in JSON: is this the URL of an API"),
        (Reply(200, "[" * 200_000), "does not answer in JSON: is this the URL of an API"),
        (Reply(401, "not in chunks", {"Transfer-Encoding": "chunked"}), "answers 401: $"),
        (Reply(200, {"choices": []}), "does not answer as an OpenAI-compatible server"),
        (Reply(200, ["7"]), "does not answer as an OpenAI-compatible server"),
        (Reply(200, {"choices": ["7"]}), "does not answer as an OpenAI-compatible server"),
    ],
)
def test_what_no_waiting_mends_is_one_line(reply: Reply, error: str) -> None:
    with pytest.raises(UserError, match=error):
        answers(lambda body: reply, n=1)


def test_where_no_server_is_that_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"no server is at {url} .*start it first"):
            ModelEndpoint(url, "tiny", 16).check()
    with pytest.raises(UserError, match="has to begin with http:// or https://"):
        ModelEndpoint("file:///etc/passwd", "tiny", 16)


def test_tokens_that_a_server_does_not_count_are_estimated() -> None:
    made, _, _ = answers(lambda body: says("a" * 40, "", usage=None))
    assert made.usage.completion == 10 and made.usage.prompt > 10


@pytest.mark.parametrize("count", [-100, 0, "1e400", "NaN", 10**30, None, "many"])
def test_a_count_of_tokens_that_is_none_is_replaced_by_an_estimate(count: object) -> None:
    reply = json.dumps({**says("a" * 40).content, "usage": {"prompt_tokens": 0, "completion_tokens": "COUNT"}})
    text = reply.replace('"COUNT"', count if count in ("1e400", "NaN") else json.dumps(count))  # type: ignore[arg-type]
    made, _, _ = answers(lambda body: Reply(200, text), n=1)
    assert made.usage.completion == 10 and made.usage.prompt > 10


def test_a_request_that_is_not_answered_in_time_counts_as_the_most_that_it_may_use() -> None:
    goes_on, clock = threading.Event(), Clock()
    hangs = iter([60.0])

    def reply(body: Body) -> Reply:
        goes_on.wait(next(hangs, 0.0))
        return says("7", "8")

    with chat_server(reply) as (url, asked):
        endpoint = ModelEndpoint(url, "tiny", 16, clock=clock, sleep=clock.sleep, seconds=0.5)
        assert len(endpoint.answer(ITEM, 2)) == 2
        goes_on.set()
    used, lost = endpoint.take_usage(), len(asked) - 1
    assert lost and used.completion == 3 + lost * 2 * 16 and used.prompt > 10 * (1 + lost)
    assert endpoint.take_usage(with_sent=True) == TokenUsage()


def test_a_gateway_that_waited_in_vain_may_have_cost_money() -> None:
    made, asked, _ = answers(in_turn(Reply(504, "the upstream is slow"), says("7", "8")))
    assert len(asked) == 2 and made.usage.completion == 3 + 2 * 16
    with pytest.raises(StoppedError):
        answers(in_turn(Reply(504, "the upstream is slow"), says("7", "8")), sends_again=False)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"


@contextmanager
def raw_server(head: bytes, then: bytes, *, drips: bool) -> Iterator[str]:
    """Serve one reply on loopback, of which what follows the head drips, or comes at once; yield the URL."""
    is_over = threading.Event()

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as connection, connection.makefile("rb") as request:
            lines = iter(lambda: request.readline().strip().lower(), b"")
            length = sum(int(line.split()[1]) for line in lines if line.startswith(b"content-length:"))
            request.read(length)  # what is not read makes the end of a connection a reset
            connection.sendall(head)
            while drips and not is_over.wait(0.05):
                connection.sendall(then)
            connection.sendall(then)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ("head", "then", "drips", "why"),
    [
        (HEAD[:15], b"X", True, "not whole after 0.5 s"),
        (HEAD.replace(b"30", b"3000"), b" ", True, "not whole after 0.5 s"),
        (HEAD, b"{}", False, "IncompleteRead"),
    ],
)
def test_a_reply_that_drips_or_breaks_off_is_lost(head: bytes, then: bytes, drips: bool, why: str) -> None:
    with raw_server(head, then, drips=drips) as url, structlog.testing.capture_logs() as logged:
        endpoint = ModelEndpoint(url, "tiny", 16, seconds=0.5, sends_again=False)
        with pytest.raises(StoppedError):
            endpoint.answer(ITEM, 1)
    assert why in logged[0]["why"] and endpoint.take_usage().completion == 16


def test_a_refusal_that_drips_is_told_at_once() -> None:
    refusal = HEAD.replace(b"200 OK", b"404 No")
    with (
        raw_server(refusal, b"\x1b[2Jno", drips=True) as url,
        pytest.raises(UserError, match=r"answers 404: .x1b.2Jno$"),
    ):
        ModelEndpoint(url, "tiny", 16, seconds=20.0).answer(ITEM, 1)


def test_a_redirect_is_not_followed_for_the_key_would_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with chat_server(lambda body: says("7")) as (elsewhere, asked):
        moved = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere}/models\r\nContent-Length: 0\r\n\r\n".encode()
        with raw_server(moved, b"", drips=False) as url, pytest.raises(UserError, match=f"redirects to {elsewhere}"):
            ModelEndpoint(url, "tiny", 16).check()
        with raw_server(moved, b"", drips=False) as url, pytest.raises(UserError, match="answers 302"):
            ModelEndpoint(url, "tiny", 16).answer(ITEM, 1)
    assert asked == []


def test_a_reply_that_is_no_answer_costs_the_most_and_may_be_an_answer_the_next_time() -> None:
    for reply in (Reply(200, "<html>busy"), Reply(200, {"choices": []}), Reply(200, " " * (2 << 20))):
        made, asked, _ = answers(in_turn(reply, says("7")), n=1)
        assert len(asked) == 2 and made.usage.completion == 3 + 16


def test_a_request_that_reached_no_server_counts_nothing() -> None:
    with chat_server(lambda body: says("7")) as (url, _):
        pass
    clock = Clock()
    endpoint = ModelEndpoint(url, "tiny", 16, clock=clock, sleep=clock.sleep, is_stopping=lambda: clock.waited)
    with pytest.raises(StoppedError):
        endpoint.answer(ITEM, 1)
    assert clock.waited and endpoint.take_usage(with_sent=True) == TokenUsage()


def test_half_an_emoji_in_an_answer_is_replaced() -> None:
    made, _, _ = answers(lambda body: says("hm \ud83d", "\U0001f600"))
    assert [answer.text for answer in made.answers] == ["hm ?", "\U0001f600"]


def test_requests_keep_to_a_rate_of_ones_own() -> None:
    _, asked, clock = answers(lambda body: says("7"), n=4, requests_a_minute=30)
    assert len(asked) == 4 and clock.now == pytest.approx(6.0)


def test_a_pause_ends_with_the_program() -> None:
    stops: list[int] = []

    def reply(body: Body) -> Reply:
        stops.append(1)
        return Reply(503, "loading", {"Retry-After": "3600"})

    with pytest.raises(StoppedError):
        answers(reply, is_stopping=lambda: stops)
