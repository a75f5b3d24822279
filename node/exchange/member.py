"""`Exchange`: a member of a swarm for any trainer. It asks, scores, publishes and draws; it trains nothing.

    from gossamer import Exchange

    with Exchange.join(invite, state="member") as swarm:
        for question in swarm.ask(8):                               # never held out
            texts, finished = generate(question.messages)           # yours
            rewards = swarm.score(question, texts)
            swarm.publish(question, texts, finished)                # only what may teach is sent
        for group in swarm.draw(16):                                # peers': scored here, each given once
            train(group.question.messages, group.texts, group.advantages)

A folder that has joined, or founded, is opened by `Exchange("member")`. It is a node's folder: one process at a time
holds it, and after `kill -9` the next one goes on with the same key, asks new questions, and draws no group again that
was drawn before.

What a node does with its peers is done here by the same parts (`node.rollouts.draw`, `node.swarm.sharing`). A member
differs from a node in these:
- Lengths are counted in characters: there is no tokenizer. A peer's answer of more than `sampling.max_length_ratio`
  times the usual length of the member's own is left out.
- There is no policy, so nothing bounds how surprising a peer's text may be: `sampling.max_surprise` has no effect.
- Whole groups are drawn, uniformly among those whose rewards differ: the rule is the paper's (`sapo`).
- Tasks with environments are left out: none of their questions is asked, and none of their groups is drawn.

Calls take a `timeout` in seconds. Those that cannot end in time raise `TimeoutError`, at most `GRACE_S` later, which
says what was waited for. Calls from several threads go one after the other. A waiting `draw` lets others through.
"""

import asyncio
import hashlib
import statistics
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import structlog

from node.config import NodeConfig, anchor_files, merge, parse_config
from node.errors import UserError
from node.exchange.opening import open_buffer, open_swarm
from node.policy.prompt import chat_turns, plain_text
from node.processes.threads import CallThread
from node.rollouts.draw import Draw, Draws
from node.rollouts.group import (
    MAX_COMPLETIONS,
    MAX_NAME_BYTES,
    MAX_TEXT_BYTES,
    EncodedGroup,
    Episode,
    Group,
    Question,
    Tokens,
    encode,
    one_turn,
)
from node.rollouts.rule import mean_advantages
from node.rollouts.screening import GroupBounds
from node.state_folder import check_begun, exclusive, first_start, full_disk_is_clear, keep_config, recall, resolve_seed
from node.swarm import joining, swarm_folder
from node.swarm.peering import LEAVE_S, Network, count_drawing
from node.swarm.sharing import GroupExchange, figures_of, published_form
from node.tasks import Item, Task, TaskKey, load_tasks
from node.tasks.environments.episodes import start_of
from node.tasks.scoring.verdicts import LATE, Answer, Scoring, Verdict
from node.tasks.task_set import TRIES, TaskSet
from node.telemetry.logs import log_by_logging
from node.telemetry.metrics_file import MAX_BYTES, MetricsLog
from protocol.credentials.invite import Invite
from protocol.limits.timing import WAN

ASKED, DRAWN = "asked", "drawn"  # counts of questions, and of draws, over all starts
SCORE_S = 120.0
START_S = 300.0  # joining takes half a minute at most; other people's tasks may take minutes to load
CALL_S = 30.0
GRACE_S = 1.0  # that a call may take beyond its `timeout`: what it began is ended in order
MISSES = 32  # turns of tasks, one after the other, in which no question fits, after which `ask` gives up
POLL_S = 0.05  # between two looks for groups while a draw waits
MAX_OWN = 1 << 10  # groups that are remembered between two draws
MAX_VERDICTS = 1 << 16  # that are remembered between `score` and `publish`: some 15 MB

Messages = Sequence[Mapping[str, str]]
T = TypeVar("T")

log = structlog.get_logger()


class AskedQuestion(NamedTuple):
    """A question of a task of the swarm: `item` is what the task makes of `seed`."""

    task: TaskKey
    seed: int
    item: Item

    @property
    def text(self) -> str:
        """The bare question."""
        return self.item.question

    @property
    def messages(self) -> Messages:
        """The question as a chat: instruction, solved examples and the question, as a chat template takes them."""
        return chat_turns(self.item, system_role=True)

    @property
    def prompt(self) -> str:
        """The question as a text to be continued."""
        return plain_text(self.item)


class DrawnGroup(NamedTuple):
    """A peer's group: answers to one question, with rewards as they were scored here.

    Completions that are not fit to teach are left out: those much longer than this member's own, and those that quote a
    held-out question with its answer. `advantages` are rewards less the mean of the whole group, those included.

    `signer` is the id of the node that signed it. `policy` is the model that made it, as that node says. `id` is the
    group's content id.
    """

    id: bytes
    signer: str
    policy: str
    question: AskedQuestion
    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]


class _OpenFolder(NamedTuple):
    """What an open folder has; all of it is used by the member's own thread alone, but for the network's host."""

    config: NodeConfig
    tasks: TaskSet
    network: Network
    bounds: GroupBounds
    exchange: GroupExchange
    draws: Draws
    metrics: MetricsLog


class Exchange:
    """A member of a swarm, open until `close`; a context manager, also an asynchronous one.

    Args:
        state: the member's folder, made if it is not there.
        invite: to the swarm that the folder joins first, gossamer://...; without one, it has joined or founded, or
            `settings` say where its peers are.
        allow_tasks: tasks of that swarm to take with all that its founder chose, as `gossamer join --allow-task` does.
        policy: the name of the model that answers, which peers are told.
        fits: tells of a question's messages whether it may be asked, and whether a peer's group on it may be drawn.
        timeout: seconds until it is open.
        settings: tables of a node's configuration, such as `tasks=[{"name": "builtin"}]` and
            `network={"listen": "tcp://0.0.0.0:4001"}`; they are remembered in the folder.

    Raises:
        TimeoutError: it was not open in time.
        UserError: something that is given is of no use.
        JoinError: no member of the swarm admitted it.
    """

    def __init__(  # each is a thing of its own
        self,
        state: str | Path,
        *,
        invite: str | None = None,
        allow_tasks: Sequence[str] = (),
        policy: str = "unnamed",
        fits: Callable[[Messages], bool] = lambda messages: True,
        timeout: float = START_S,
        **settings: Any,
    ) -> None:
        if not 0 < len(policy.encode()) <= MAX_NAME_BYTES:
            raise UserError(
                f"the policy's name has to have 1 to {MAX_NAME_BYTES} bytes, and not {len(policy.encode())}"
            )
        log_by_logging()
        self.folder = Path(state)
        self._policy = policy
        self._fits = fits
        self._asked = 0
        self._round = 0
        self._own: deque[EncodedGroup] = deque(maxlen=MAX_OWN)  # published since the last draw
        self._verdicts: OrderedDict[tuple[TaskKey, int, bytes], Verdict] = OrderedDict()
        self._drawing = threading.Lock()
        self._closing = threading.Lock()
        self._stack = ExitStack()  # what is open
        self._thread = CallThread("exchange")
        self._left = weakref.finalize(self, _leave, self._thread, self._stack)  # what its program forgot, at the latest
        try:
            self._parts = self._do(lambda: self._open(settings, invite, allow_tasks), timeout, f"opening {self.folder}")
        except BaseException:
            self._close()
            raise

    @classmethod
    def join(cls, invite: str, *, state: str | Path, **others: Any) -> Self:
        """Join a swarm by its invite, in the folder `state`; open the folder again if it has joined it before.

        Args and errors are those of the class.
        """
        return cls(state, invite=invite, **others)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def node(self) -> str:
        """This member's id, by which peers know it."""
        return self._parts.network.identity.node_id

    @property
    def address(self) -> str | None:
        """Where peers dial this member; None if it only dials."""
        address = self._parts.network.address
        return None if address is None else str(address)

    @property
    def drawing(self) -> int:
        """How many nodes draw peers' groups, of those that are here or were within a day; 0 without a peer.

        Relays, boards, archives and members that only answer draw none.
        """
        host = self._parts.network.host
        return count_drawing(record.agent for record in host.records()) if host.counters().peers else 0

    @property
    def max_answers(self) -> int:
        """How many answers a group of this swarm has at most."""
        return self._parts.bounds.completions

    def ask(self, count: int, *, timeout: float = CALL_S) -> list[AskedQuestion]:
        """Return the next `count` questions: none held out for evaluation, none asked before in this folder.

        Tasks take turns by their weights. A task with rows asks each row once before any row comes again.

        Raises:
            TimeoutError: the tasks did not make them in time.
            UserError: a task makes no question, or none that fits.
            ValueError: `count` is no whole number of 0 or more.
        """
        _check_counts(count=count)
        return self._do(lambda: self._ask(count), timeout, f"{count} questions")

    def score(self, question: AskedQuestion, texts: Sequence[str], *, timeout: float = SCORE_S) -> list[Verdict]:
        """Return the reward of each answer to a question; None for one that cannot be scored here.

        Raises:
            TimeoutError: some were not scored in time; a further call goes on from there.
            TypeError: `texts` is no list of texts.
            UserError: the question is of no task here.
        """
        _check_texts(texts)
        return self._do(lambda: self._score(question, texts, timeout), timeout, f"{len(texts)} answers to be scored")

    def publish(
        self,
        question: AskedQuestion,
        texts: Sequence[str],
        finished: Sequence[bool],
        *,
        kept: bool = True,
        timeout: float = SCORE_S,
    ) -> bool:
        """Send the answers to a question as one group, if it may teach; tell whether it was sent.

        A group whose rewards differ is sent whole. Of one that is all right, two answers are sent. Other groups teach
        nobody and are not sent, nor are groups of tasks that are not shared. Answers that cannot be scored are left
        out. What `score` found is not scored again.

        Args:
            question: from `ask`, or of a drawn group.
            texts: all answers of the group, wrong ones too.
            finished: whether each ended by itself, and not at a limit of length: peers train the end of those alone.
            kept: whether archives may keep the group, in a swarm that allows them; its signed bytes say so.
            timeout: seconds.

        Raises:
            TimeoutError: some could not be scored in time; nothing is sent.
            TypeError: `texts` is no list of texts, or `finished` no list of truths.
            UserError: the question is of no task here, or is held out; the group is larger than its swarm allows; or a
                text is no Unicode, for it has half of a surrogate pair.
            ValueError: there are not as many `finished` as `texts`.
        """
        _check_texts(texts)
        if not hasattr(finished, "__len__") or any(isinstance(value, str) for value in finished):
            raise TypeError("finished: give a list with True or False for each answer")
        if len(texts) != len(finished):
            raise ValueError(f"{len(texts)} texts have {len(finished)} values of finished: give one for each")
        return self._do(
            lambda: self._publish(question, texts, finished, kept, timeout), timeout, f"{len(texts)} answers to be sent"
        )

    def draw(self, count: int, *, least: int = 0, timeout: float = CALL_S) -> list[DrawnGroup]:
        """Return at most `count` of the peers' groups that are here.

        Each has been verified: its question was made again, its answers were scored here. A group that lies is reported
        to the swarm, and its signer's other groups are not drawn any more. A group is returned once, also if it comes
        again under another id.

        Args:
            count: of groups.
            least: to wait for, at most `count`; without it, nothing is waited for but the scoring of what is here.
            timeout: seconds.

        Raises:
            TimeoutError: fewer than `least` came in time; those that came may be drawn by a later call.
            ValueError: `count` or `least` is no whole number of 0 or more, or `least` is more than `count`.
        """
        _check_counts(count=count, least=least)
        if least > count:
            raise ValueError(f"a draw of at most {count} groups cannot have least={least}")
        timeout = min(timeout, threading.TIMEOUT_MAX)
        deadline = time.monotonic() + timeout
        if not self._drawing.acquire(timeout=max(0.0, timeout)):
            raise TimeoutError(f"another draw did not end in {timeout:g} s")
        try:
            draw = self._do(lambda: self._begin(count), timeout, "the draw to begin")
            while True:
                left = max(0.0, deadline - time.monotonic())
                self._do(lambda: self._fill(draw, left), left, "peers' answers to be scored")  # noqa: B023  # at once
                if len(draw.usable) >= least:
                    return self._do(lambda: self._take(draw), None, "")
                if time.monotonic() >= deadline:
                    peers = self._parts.network.host.counters().peers
                    raise TimeoutError(f"{len(draw.usable)} of {least} groups came from {peers} peers in {timeout:g} s")
                time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        finally:
            self._drawing.release()

    def statistics(self) -> dict[str, Any]:
        """Return what came and went so far, by the names of a node's metrics: `swarm/peers`, `swarm/rejected`, ..."""
        return {"swarm/taught": {}} | self._figures()

    def close(self, *, timeout: float = CALL_S) -> None:
        """Leave the network and let go of the folder. Closing twice does nothing.

        It waits for some seconds (`node.swarm.peering.LEAVE_S`) until peers have what was published last, and says how
        many groups nobody took.

        Raises:
            TimeoutError: a call in progress did not end in time; it is closed once that ends.
        """
        with self._closing:
            if self._left.alive:
                _result(self._close(), timeout, "the call in progress to end")

    async def aask(self, count: int, *, timeout: float = CALL_S) -> list[AskedQuestion]:  # as `ask`
        """Do what `ask` does."""
        return await asyncio.to_thread(self.ask, count, timeout=timeout)

    async def ascore(
        self,
        question: AskedQuestion,
        texts: Sequence[str],
        *,
        timeout: float = SCORE_S,  # as `score`
    ) -> list[Verdict]:
        """Do what `score` does."""
        return await asyncio.to_thread(self.score, question, texts, timeout=timeout)

    async def apublish(
        self,
        question: AskedQuestion,
        texts: Sequence[str],
        finished: Sequence[bool],
        *,
        kept: bool = True,
        timeout: float = SCORE_S,  # as `publish`
    ) -> bool:
        """Do what `publish` does."""
        return await asyncio.to_thread(self.publish, question, texts, finished, kept=kept, timeout=timeout)

    async def adraw(self, count: int, *, least: int = 0, timeout: float = CALL_S) -> list[DrawnGroup]:
        """Do what `draw` does. A task that is cancelled loses the groups that the call would have returned."""
        return await asyncio.to_thread(self.draw, count, least=least, timeout=timeout)

    async def aclose(self, *, timeout: float = CALL_S) -> None:  # as `close`
        """Do what `close` does."""
        await asyncio.to_thread(self.close, timeout=timeout)

    def _close(self) -> "Future[None]":
        """Let all be closed after the calls that wait."""
        self._left.detach()
        return _end(self._thread, self._stack)

    def _do(self, work: Callable[[], T], timeout: float | None, what: str) -> T:
        """Return what `work` returns on the member's own thread, after all that was given to it before."""
        if not self._left.alive:
            raise UserError(f"the exchange in {self.folder} is closed: open it again")
        return _result(self._thread.submit(work), timeout, what)

    def _open(self, settings: Mapping[str, Any], invite: str | None, allow_tasks: Sequence[str]) -> _OpenFolder:
        config = _settled(self.folder, settings, invite)
        if invite is not None:
            config = joining.join(Invite.parse(invite), config, self.folder, allow_tasks)
        with full_disk_is_clear(self.folder), ExitStack() as stack:
            stack.enter_context(exclusive(self.folder))
            stack.enter_context(first_start(config, self.folder))
            seed = resolve_seed(config, self.folder)
            tasks = _answered_at_once(
                load_tasks(config.tasks, swarm_folder.split_of(swarm_folder.load_manifest(self.folder)))
            )
            metrics = MetricsLog(self.folder / "metrics.jsonl", MAX_BYTES)
            network, sharing, bounds = stack.enter_context(
                open_swarm(config, self.folder, tasks, metrics, rounds=None, external=0)
            )
            assert network is not None, "_settled has seen to it"
            buffer = stack.enter_context(open_buffer(config, self.folder, bounds.life))
            self._asked, self._round = buffer.count(ASKED), buffer.count(DRAWN)
            metrics.rewind(self._round)
            external = max(1, config.sampling.external)
            sampling = {"rule": "sapo", "max_surprise": 0.0, "source": "peers", "external": external}
            draws = Draws(
                seed,
                config.sampling.model_copy(update=sampling),
                tasks,
                buffer,
                sharing,
                self._encode_prompt,
                _in_characters,
                surprises=lambda rows: [],
                quotes_held_out=tasks.quotations(0).are_in,
            )
            keep_config(config, seed, self.folder)
            self._stack.enter_context(stack.pop_all())
        return _OpenFolder(config, tasks, network, bounds, sharing, draws, metrics)

    def _encode_prompt(self, item: Item) -> Sequence[int] | None:
        return () if self._fits(chat_turns(item, system_role=True)) else None

    def _task(self, question: AskedQuestion) -> Task:
        task = self._parts.tasks.get(question.task)
        if task is None:
            raise UserError(
                f"the question is of task {question.task.name!r}, which is none here: ask, or draw, another"
            )
        return task

    def _ask(self, count: int) -> list[AskedQuestion]:
        questions: list[AskedQuestion] = []
        without = 0
        while len(questions) < count:
            with self._parts.draws.yardstick.own_questions(1):
                question = self._parts.tasks.ask(
                    self._parts.draws.seed, self._asked, lambda item: self._encode_prompt(item) is not None
                )
            self._asked += 1
            without = without + 1 if question is None else 0
            if question is not None:
                questions.append(AskedQuestion(question.task.key, question.seed, question.item))
            if without == MISSES:
                raise UserError(f"none of {MISSES * TRIES} questions fits: they are too long, or `fits` refuses them")
        self._parts.draws.buffer.set_count(ASKED, self._asked)  # on disk before anybody sees them
        return questions

    def _score(self, question: AskedQuestion, texts: Sequence[str], seconds: float) -> list[Verdict]:
        task = self._task(question)
        keys = {
            text: (question.task, question.seed, hashlib.sha256(text.encode(errors="replace")).digest())
            for text in texts
        }
        new = [text for text, key in keys.items() if key not in self._verdicts]
        answers = [Answer(task, question.item, text) for text in new]
        verdicts = Scoring(answers, is_own=True).wait(min(seconds, threading.TIMEOUT_MAX))
        known = {text: self._verdicts[key] for text, key in keys.items() if key in self._verdicts}
        known |= {text: verdict for text, verdict in zip(new, verdicts, strict=True) if verdict != LATE}
        for text, verdict in known.items():
            self._verdicts[keys[text]] = verdict
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        if late := len(keys) - len(known):
            raise TimeoutError(f"{late} of {len(keys)} answers were not scored in {seconds:g} s")
        return [known[text] for text in texts]

    def _publish(
        self, question: AskedQuestion, texts: Sequence[str], finished: Sequence[bool], kept: bool, seconds: float
    ) -> bool:
        task = self._task(question)
        if self._parts.tasks.is_held_out(task, question.text):
            raise UserError(f"a held-out question is not published: {question.text!r:.200}")
        if len(texts) > self._parts.bounds.completions:
            raise UserError(f"a group of this swarm has at most {self._parts.bounds.completions} answers: send fewer")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise UserError(f"an answer has half of a character (U+{half:X}): leave it out, or replace it") from None
        verdicts = self._score(question, texts, seconds)
        episodes = [
            one_turn(text, bool(ended), reward)
            for text, ended, reward in zip(texts, finished, verdicts, strict=True)
            if reward is not None
        ]
        if len(episodes) < 2:
            return False
        item = question.item
        group = Group(
            question.task, question.seed, item.question, tuple(episodes), self._policy, self._round, item.content, kept
        )
        self._check_size(group)
        tokens = {place: _in_characters((), episode) for place, episode in enumerate(episodes)}
        self._own.append(EncodedGroup(group, Question(task, question.seed, item, ()), tokens))
        return self._parts.exchange.publish([group]) == 1

    def _check_size(self, group: Group) -> None:
        """Raise `UserError` if what is to be sent of a group is larger than peers take."""
        sent, most = published_form(group, self._parts.tasks), self._parts.bounds.bytes
        if sent is None:
            return
        if (longest := max(len(completion.text.encode()) for completion in sent.completions)) > MAX_TEXT_BYTES:
            raise UserError(f"an answer has at most {MAX_TEXT_BYTES} bytes, and one has {longest}: send shorter ones")
        if (size := len(encode(sent))) > most:
            raise UserError(f"a group of this swarm has at most {most} bytes, and this one {size}: send less")

    def _begin(self, count: int) -> Draw:
        draw = self._parts.draws.begin(self._round + 1, count, MAX_COMPLETIONS, mean_advantages)
        draw.prepare()
        return draw

    def _fill(self, draw: Draw, seconds: float) -> None:
        draws, number = self._parts.draws, self._round + 1
        with draws.buffer.transaction():
            draws.receive(number)
            draws.record_own(number, self._own)
            draw.fill(seconds)

    def _take(self, draw: Draw) -> list[DrawnGroup]:
        """Record the uses, which are on disk before anybody sees the groups."""
        parts, number = self._parts, self._round + 1
        with parts.draws.buffer.transaction():
            used = draw.take()
            parts.draws.buffer.set_count(DRAWN, number)
        self._round = number
        by_task: dict[str, list[float]] = {}
        for own in self._own:
            by_task.setdefault(own.group.task.name, []).extend(own.group.rewards)
        rewards_made = [reward for rewards in by_task.values() for reward in rewards]
        row: dict[str, Any] = {
            "round": number,
            "time": time.time(),
            **({"reward": statistics.fmean(rewards_made)} if rewards_made else {}),
            **{f"rewards/{task}/mean": statistics.fmean(rewards) for task, rewards in by_task.items()},
            "generated": len(rewards_made),
            "groups_external": len(used),
            "swarm/taught_by": dict(Counter(candidate.peer for candidate in used)),
            **self._figures(),
        }
        parts.metrics.append(row)
        parts.exchange.finished(row, self._policy)
        self._own.clear()
        return [self._drawn(draw.usable[candidate.id], candidate.peer) for candidate in used]

    def _figures(self) -> dict[str, object]:
        return figures_of(self._parts.exchange, len(self._parts.draws.buffer))

    def _drawn(self, encoded: EncodedGroup, signer: str) -> DrawnGroup:
        group, places = encoded.group, sorted(encoded.completions)
        completions = [group.completions[place] for place in places]
        advantages = mean_advantages(group.rewards)
        return DrawnGroup(
            encoded.id,
            signer,
            group.policy,
            AskedQuestion(group.task, group.seed, encoded.question.item),
            tuple(episode.text for episode in completions),
            tuple(episode.finished for episode in completions),
            tuple(episode.reward for episode in completions),
            tuple(advantages[place] for place in places),
        )


def _end(thread: CallThread, stack: ExitStack) -> "Future[None]":
    """Have all closed that is open, after the calls that wait, and then the thread ended."""
    done = thread.submit(stack.close)
    thread.end()
    return done


def _leave(thread: CallThread, stack: ExitStack) -> None:
    """Close what a program that ends, or has forgotten its exchange, has left open."""
    done = _end(thread, stack)
    if not thread.is_current:
        with suppress(TimeoutError):
            done.result(LEAVE_S[WAN] + GRACE_S)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not hasattr(count, "__index__") or count < 0:
            raise ValueError(f"{name} has to be a whole number of 0 or more, and not {count!r}")


def _check_texts(texts: Any) -> None:
    """Raise `TypeError` unless it is a list of texts; a text is none, though each of its letters is a text."""
    if isinstance(texts, str) or not hasattr(texts, "__len__") or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts: give a list with a text for each answer")


def _result(future: "Future[T]", timeout: float | None, what: str) -> T:
    try:
        return future.result(None if timeout is None else min(max(0.0, timeout) + GRACE_S, threading.TIMEOUT_MAX))
    except TimeoutError:
        if future.done() and not future.cancelled():
            raise
        future.cancel()
        raise TimeoutError(f"waited {timeout:g} s for {what}") from None


def _settled(folder: Path, settings: Mapping[str, Any], invite: str | None) -> NodeConfig:
    """Return what a member in `folder` runs: what is given, over what the folder remembers."""
    tree = deepcopy(dict(settings))
    if "tasks" in tree:
        tree["tasks"] = [{"name": task} if isinstance(task, str) else dict(task) for task in tree["tasks"]]
        anchor_files(tree, Path())
    remembered = recall(folder).settings
    if not tree and not remembered and invite is None:
        raise UserError(f"{folder} has joined no swarm: Exchange.join(invite, state=...), or say tasks and network")
    config = parse_config(merge(remembered, tree))
    if invite is None:
        check_begun(config, folder)
    if not config.network.enabled:
        raise UserError("an exchange needs its network: leave out network.enabled")
    return config


def _answered_at_once(tasks: TaskSet) -> TaskSet:
    """Return the tasks whose answers are one text."""
    kept = tasks.only(lambda task: start_of(task) is None)
    for task in tasks.tasks:
        if task not in kept.tasks:
            log.warning("an exchange leaves out a task with an environment", task=task.key.name)
    return kept


def _in_characters(prompt: Sequence[int], made: Episode) -> Tokens:
    """Return as many places as an answer has characters: its length, where there is no tokenizer."""
    return Tokens(range(len(made.text)))
