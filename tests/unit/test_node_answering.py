"""A member that only answers, with a server of this machine, for a peer that draws."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gossamer import Exchange, UserError

from node.config import parse_config
from node.exchange.answering import ANSWERED_FILE, EMPTY_SAID, AnsweredTotals, AnsweringBudget, answer, read_answered
from node.exchange.endpoint import ModelEndpoint
from node.swarm.peering import Network, open_network
from tests.chat_server import Asked, Body, Reply, chat_server, says, sum_of
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_log_setup")]
SUMS = {"tasks": ["builtin/sums"], "sampling": {"max_length_ratio": 0.0}}


@pytest.fixture
def pupil(tmp_path: Path) -> Iterator[Exchange]:
    with Exchange(tmp_path / "pupil", **SUMS) as member:
        yield member


def half_right(body: Body) -> Reply:
    """Two answers, of which one is right."""
    return says(str(sum_of(body)), "no")


@contextmanager
def answering(folder: Path, peer: Exchange | Network) -> Iterator[Exchange]:
    settings = {"tasks": ["builtin/sums"], "sampling": {"external": 0}, "network": {"seeds": [str(peer.address)]}}
    with Exchange(folder, policy="tiny", **settings) as member:
        yield member


@pytest.mark.parametrize(
    ("budget", "last"),
    [
        (AnsweringBudget(questions=3), AnsweredTotals(questions=3)),
        (AnsweringBudget(tokens=10), AnsweredTotals(prompt_tokens=4, completion_tokens=6)),
        (AnsweringBudget(cost=0.5), AnsweredTotals(cost=0.5)),
    ],
)
def test_a_budget_is_spent_once_as_much_as_it_says_was_used(budget: AnsweringBudget, last: AnsweredTotals) -> None:
    less = AnsweredTotals(max(0, last.questions - 1), completion_tokens=last.tokens - 1, cost=last.cost - 1e-9)
    assert budget.is_spent(last) and not budget.is_spent(less)


def answer_some(member: Exchange, url: str, budget: AnsweringBudget, is_stopping: object = False) -> AnsweredTotals:
    return answer(member, ModelEndpoint(url, "tiny", 16, is_stopping=lambda: is_stopping), 2, 3, budget)


def test_a_peer_draws_what_an_endpoint_answered_as_it_is_scored_there(pupil: Exchange, tmp_path: Path) -> None:
    with chat_server(half_right) as (url, asked), answering(tmp_path / "a", pupil) as member:
        answered = answer_some(member, url, AnsweringBudget(questions=4))
        groups = pupil.draw(8, least=4)
        assert {(group.signer, group.policy, group.rewards) for group in groups} == {(member.node, "tiny", (1.0, 0.0))}
        assert {group.question.text for group in groups} == {
            request.body["messages"][-1]["content"] for request in asked
        }
    assert answered == AnsweredTotals(4, 4, 8, 0, 4.0, 40, 12)
    assert str(answered) == "4 questions, 8 answers, mean reward 0.500, 4 groups published, 52 tokens"


def test_a_budget_holds_over_all_starts_and_no_question_comes_again(pupil: Exchange, tmp_path: Path) -> None:
    requests: list[Asked] = []
    for most in (2, 5, 5):
        with chat_server(half_right) as (url, asked), answering(tmp_path / "a", pupil) as member:
            assert answer_some(member, url, AnsweringBudget(questions=most)).questions == most
            requests += asked
    assert len(requests) == 5
    seeds = {group.question.seed for group in pupil.draw(8, least=5)}  # two seeds may make the same sum
    assert len(seeds) == 5


@pytest.mark.parametrize(
    "budget",
    [
        AnsweringBudget(tokens=40),
        AnsweringBudget(cost=0.00004, price=(1.0, 1.0)),
        AnsweringBudget(cost=0.00001, price=(0.0, 1.0)),
    ],
)
def test_no_more_is_asked_once_the_tokens_or_the_money_are_spent(
    budget: AnsweringBudget, pupil: Exchange, tmp_path: Path
) -> None:
    with chat_server(half_right) as (url, asked), answering(tmp_path / "a", pupil) as member:
        answered = answer_some(member, url, budget)
    assert 4 <= answered.questions == len(asked) <= 4 + 2  # 13 tokens each; two more were with the endpoint
    assert read_answered(tmp_path / "a") == answered and budget.is_spent(answered)


def test_nothing_is_asked_while_all_peers_relay_or_answer(tmp_path: Path) -> None:
    stopping: list[int] = []
    (tmp_path / "relay").mkdir()
    with (
        open_network(
            parse_config({"role": "relay", "network": {"enabled": True}}), tmp_path / "relay", relays=True
        ) as network,
        chat_server(half_right) as (url, asked),
        answering(tmp_path / "a", network) as member,
        answering(tmp_path / "b", network),
    ):
        thread = threading.Thread(target=answer_some, args=(member, url, AnsweringBudget(questions=1), stopping))
        thread.start()
        wait_until(lambda: len(member._parts.network.host.records()) == 2, 30, "both others")
        assert member.drawing == 0
        with Exchange(tmp_path / "pupil", network={"seeds": [str(network.address)]}, **SUMS):
            assert not asked
            wait_until(lambda: asked, 30, "a question, as a node that draws is here")
            thread.join(30)
    assert not thread.is_alive() and len(asked) == 1


def test_a_stop_waits_for_no_server_that_hangs(pupil: Exchange, tmp_path: Path) -> None:
    hangs, stopping = threading.Event(), list[int]()

    def hang(body: Body) -> Reply:
        stopping.append(1)
        hangs.wait(60)
        return half_right(body)

    with chat_server(hang) as (url, _), answering(tmp_path / "a", pupil) as member:
        try:
            answered = answer_some(member, url, AnsweringBudget(), stopping)
        finally:
            hangs.set()
    # What was with the server counts as the most that it may use: two answers of 16 tokens.
    assert answered.questions == 0 and answered.prompt_tokens
    assert answered.completion_tokens in (32, 64, 96)
    assert read_answered(tmp_path / "a") == answered


def test_requests_that_are_not_answered_in_time_end_with_the_budget(pupil: Exchange, tmp_path: Path) -> None:
    hangs = threading.Event()

    def hang(body: Body) -> Reply:
        hangs.wait(60)
        return half_right(body)

    budget = AnsweringBudget(cost=0.00003, price=(0.0, 1.0))  # 30 tokens: a request may use 32
    with chat_server(hang) as (url, _), answering(tmp_path / "a", pupil) as member:
        try:
            answered = answer(member, ModelEndpoint(url, "tiny", 16, seconds=0.2), 2, 1, budget)
        finally:
            hangs.set()
    assert (answered.questions, answered.answers) == (0, 0)
    assert answered.completion_tokens in (32, 64) and budget.is_spent(read_answered(tmp_path / "a"))


def test_answers_without_a_text_are_left_out_and_said(
    pupil: Exchange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = itertools.count()

    def thinks(body: Body) -> Reply:
        return half_right(body) if next(number) == 0 else says(" ", "", reason="length")

    with chat_server(thinks) as (url, _), answering(tmp_path / "a", pupil) as member:
        # Whenever the answer with a text comes, enough without one come before it or after it.
        answered = answer_some(member, url, AnsweringBudget(questions=EMPTY_SAID + 1))
    assert (answered.empty, answered.published, answered.reward) == (2 * EMPTY_SAID, 1, 1.0)
    assert "the model's answers are empty" in caplog.text


def test_answers_that_are_longer_than_peers_take_are_dropped_and_said(
    pupil: Exchange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        chat_server(lambda body: says(str(sum_of(body)), "n" * 131073)) as (url, _),
        answering(tmp_path / "a", pupil) as member,
    ):
        answered = answer_some(member, url, AnsweringBudget(questions=1))
    assert (answered.questions, answered.published, answered.reward) == (1, 0, 1.0)
    assert "an answer has at most 131072 bytes" in caplog.text


def test_a_refusal_ends_it_and_keeps_what_was_done(pupil: Exchange, tmp_path: Path) -> None:
    number = itertools.count()

    def reply(body: Body) -> Reply:
        return half_right(body) if next(number) < 4 else Reply(402, "no credit is left")

    with (
        chat_server(reply) as (url, _),
        answering(tmp_path / "a", pupil) as member,
        pytest.raises(UserError, match="answers 402: no credit is left"),
    ):
        answer_some(member, url, AnsweringBudget())
    assert 1 <= read_answered(tmp_path / "a").questions <= 4


def test_a_damaged_count_is_one_line(tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"questions": 1, "other": 2})):
        (tmp_path / ANSWERED_FILE).write_text(text)
        with pytest.raises(UserError, match="is damaged: delete it"):
            read_answered(tmp_path)
