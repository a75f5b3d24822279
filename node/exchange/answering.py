"""A member that only answers the swarm's questions, with a model behind an OpenAI-compatible URL, for those who train.

    ask -> endpoint (node.exchange.endpoint) -> score and publish what may teach -> `answered.json`

Several questions are with the endpoint at a time. Nothing is asked while no node is known that draws peers' groups:
nobody would learn from it.
`answered.json` in the folder says what was spent, so that a budget holds over all starts. A stop counts what is with
the endpoint as the most that it may use. After `kill -9` the file lacks what was with the endpoint then.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from node.errors import UserError
from node.exchange.endpoint import EndpointAnswer, ModelEndpoint, StoppedError, TokenUsage
from node.exchange.member import AskedQuestion, Exchange
from node.processes.threads import on_daemon
from node.tasks.scoring.verdicts import Verdict
from protocol.storage import write_atomically

ANSWERED_FILE = "answered.json"
LOOK_S = 0.2  # between two looks for an end, or for peers
SAY_S = 10.0  # between two lines about progress
ALONE_S = 60.0  # between two lines that nobody is here
EMPTY_SAID = 16  # answers without a text, in a row, after which a line says so
MILLION = 1_000_000
MOST_PROMPT_BYTES = 1 << 15  # some 8,000 tokens: a founder can make prompts longer, and whoever answers pays

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class AnsweredTotals:
    """What a folder's member has answered and spent, over all its starts. `cost` is by the prices that were given."""

    questions: int = 0
    published: int = 0  # groups
    answers: int = 0
    empty: int = 0  # answers without a text, which are left out
    reward: float = 0.0  # sum over the other answers
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """All tokens that were used."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        scored = self.answers - self.empty
        reward = f", mean reward {self.reward / scored:.3f}" if scored else ""
        cost = f", cost {self.cost:.2f}" if self.cost else ""
        return (
            f"{self.questions} questions, {self.answers} answers{reward}, {self.published} groups published, "
            f"{self.tokens} tokens{cost}"
        )


@dataclass(frozen=True, slots=True)
class AnsweringBudget:
    """What may be spent over all starts; None for no limit. `price` is of a million tokens of prompts, of answers."""

    questions: int | None = None
    tokens: int | None = None
    cost: float | None = None
    price: tuple[float, float] = (0.0, 0.0)

    def is_spent(self, answered: AnsweredTotals) -> bool:
        """Tell whether no more may be asked."""
        pairs = (
            (self.questions, answered.questions),
            (self.tokens, answered.tokens),
            (self.cost, answered.cost),
        )
        return any(most is not None and spent >= most for most, spent in pairs)


def is_affordable(messages: Sequence[Mapping[str, str]]) -> bool:
    """Tell whether a question's messages are no longer than an endpoint is asked to read."""
    return sum(len(message["content"].encode()) for message in messages) <= MOST_PROMPT_BYTES


def read_answered(folder: Path) -> AnsweredTotals:
    """Return what the member in `folder` has answered so far.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / ANSWERED_FILE
    try:
        return AnsweredTotals(**json.loads(path.read_text()))
    except FileNotFoundError:
        return AnsweredTotals()
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete it; what was spent is counted from 0 then") from None


def answer(
    swarm: Exchange,
    endpoint: ModelEndpoint,
    completions: int,
    at_once: int,
    budget: AnsweringBudget,
    *,
    kept: bool = True,
) -> AnsweredTotals:
    """Answer questions until the budget is spent, or until the program is to end; return what was answered.

    Args:
        swarm: an open member.
        endpoint: that answers. It says when the program is to end. Then what is with it is dropped, and counts as the
            most that it may use.
        completions: answers to a question.
        at_once: questions that are with the endpoint at a time.
        budget: of all starts. Questions that are with the endpoint when it is spent are still answered and published,
            unless their request was lost.
        kept: whether archives may keep the groups, in a swarm that allows them.

    Raises:
        UserError: the endpoint refuses, or the swarm's tasks cannot be asked.
    """
    answered = read_answered(swarm.folder)
    asked = answered.questions  # with those that are with the endpoint
    asking: dict[Future[list[EndpointAnswer]], AskedQuestion] = {}
    said, empty, began = answered, 0, time.monotonic()
    try:
        while not endpoint.is_stopping():
            if any(usage := endpoint.take_usage()):
                answered = _count(swarm, answered, usage, budget)
            is_spent = budget.is_spent(answered)
            endpoint.sends_again = not is_spent
            is_over = is_spent or (budget.questions is not None and asked >= budget.questions)
            if is_over and not asking:
                break
            if not is_over and len(asking) < at_once:
                _wait_for_a_pupil(swarm, endpoint.is_stopping)
                (question,) = swarm.ask(1)
                asking[on_daemon(partial(endpoint.answer, question.item, completions), "endpoint")] = question
                asked += 1
                continue
            done, _ = wait(asking, LOOK_S, FIRST_COMPLETED)
            for future in done:
                question = asking.pop(future)
                try:
                    answers = future.result()
                except StoppedError:
                    continue
                answered = _take(swarm, question, answers, answered, kept=kept)
                answered = _count(swarm, answered, endpoint.take_usage(), budget)
                has_text = any(answer.text.strip() for answer in answers)
                empty = 0 if has_text else empty + len(answers)
                if empty >= EMPTY_SAID:
                    log.warning("the model's answers are empty: raise --max-tokens, if it thinks first", answers=empty)
                    empty = 0
            if done:
                swarm.draw(0)
            if answered != said and time.monotonic() - began >= SAY_S:
                log.info(str(answered), peers=swarm.statistics()["swarm/peers"])
                said, began = answered, time.monotonic()
    finally:
        answered = _count(swarm, answered, endpoint.take_usage(with_sent=True), budget)
    return answered


def _count(swarm: Exchange, answered: AnsweredTotals, usage: TokenUsage, budget: AnsweringBudget) -> AnsweredTotals:
    """Return what was answered with `usage` more, once it is on disk."""
    prices = zip(usage, budget.price, strict=True)
    answered = replace(
        answered,
        prompt_tokens=answered.prompt_tokens + usage.prompt,
        completion_tokens=answered.completion_tokens + usage.completion,
        cost=answered.cost + sum(tokens * price for tokens, price in prices) / MILLION,
    )
    write_atomically(swarm.folder / ANSWERED_FILE, f"{json.dumps(asdict(answered))}\n".encode())
    return answered


def _wait_for_a_pupil(swarm: Exchange, is_stopping: Callable[[], object]) -> None:
    said_at = None
    while not is_stopping() and not swarm.drawing:
        if said_at is None or time.monotonic() - said_at >= ALONE_S:
            said_at = time.monotonic()
            log.info("no node that learns from others is here: nothing is asked until one is")
        time.sleep(LOOK_S)


def _take(
    swarm: Exchange,
    question: AskedQuestion,
    answers: Sequence[EndpointAnswer],
    answered: AnsweredTotals,
    *,
    kept: bool,
) -> AnsweredTotals:
    """Publish the answers to a question if they may teach; return what was answered with them."""
    with_text = [answer for answer in answers if answer.text.strip()]
    texts, finished = [answer.text for answer in with_text], [answer.finished for answer in with_text]
    rewards: list[Verdict] = []
    is_sent = False
    try:
        rewards = swarm.score(question, texts)
        is_sent = swarm.publish(question, texts, finished, kept=kept)
    except (TimeoutError, UserError) as error:  # late, or longer than peers take
        log.warning("a question's answers are dropped", why=str(error))
    return replace(
        answered,
        questions=answered.questions + 1,
        published=answered.published + is_sent,
        answers=answered.answers + len(answers),
        empty=answered.empty + len(answers) - len(with_text),
        reward=answered.reward + sum(reward or 0.0 for reward in rewards),
    )
