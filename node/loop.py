"""The loop of a node: Algorithm 1 of "Sharing is Caring" (arXiv 2509.08721).

    sample questions -> generate -> verify -> share -> draw own and external groups -> (update) -> repeat

`rounds` is a generator. Each `yield` hands the trainer one round's samples, and the
update happens there, inside TRL's training loop; when the generator is resumed the
policy is one version newer. Nothing here waits for a peer. All randomness derives
from the node's seed and the round's number, so a round that is done again after a
crash asks the same questions and draws the same completions.

No sample, own or a peer's, is on a held-out question (`node.tasks.questions`). Training never asks one, a peer's group
on one is refused, and `_check_held_out` ends the node if one got through all the same.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import structlog

from node.archive.backfill import Backfill, NoBackfill
from node.config import NodeConfig
from node.engines import RolloutEngine, SamplingParams
from node.engines.ahead import Ahead
from node.engines.episodes import EpisodeQuestion, Episodes, Played, play
from node.errors import UserError
from node.exchange.rounds import SwarmRounds
from node.journal import NoJournal, RoundJournal
from node.policy.load import Policy
from node.rollouts.group import EncodedGroup, Episode, Group, Question, Tokens, content_id, encode
from node.rollouts.group_buffer import GroupBuffer
from node.rollouts.rule import SCALES, Rule, Sample, external_samples, local_samples
from node.rollouts.screening import ScoredRow, Screening, ScreeningContext
from node.swarm.sharing import GroupExchange
from node.tasks import UNIT, Item, TaskKey, derive_seed, is_in_range, told_outside
from node.tasks.environments.episodes import start_of
from node.tasks.scoring.verdicts import Answer, Scored, Verdict, late_as_none, latest_reason
from node.tasks.task_set import TaskSet, outside
from node.telemetry.metrics_file import MetricsLog, Row
from node.telemetry.round_metrics import (
    LEFT_OUT,
    metrics_of_draw,
    metrics_of_own,
    metrics_of_samples,
    prompts_trained_on,
)
from node.training.budget import TRAINED_COST, Spent, is_done
from node.training.likelihood import surprises

log = structlog.get_logger()

ROWS_MEASURED = 4096  # of a task, before training: some seconds' work
MOST_UNSCORED = 3  # rounds from a start on without a scored answer, after which the node ends: one may be bad luck
# A round waits for peers' verdicts so many seconds, or as long as generating and scoring its own answers took in the
# fastest of the last `OWN_PARTS` rounds: what peers slow down does not lengthen the wait.
PEERS_S, OWN_PARTS = 5.0, 8

TOOLS_LEFT_OUT = "; an environment's option tell = false leaves its tools out"


@dataclass(slots=True)
class Loop:
    """The parts of a round, and the metrics row of the round in progress."""

    config: NodeConfig
    seed: int
    policy: Policy
    engine: RolloutEngine
    tasks: TaskSet
    buffer: GroupBuffer
    exchange: InitVar[GroupExchange]
    metrics: MetricsLog
    record: Callable[[int, Sequence[Group], Screening], None] = lambda *of_round: None  # logs some of the rollouts
    journal: RoundJournal = field(default_factory=NoJournal)
    rule: Rule | None = None  # in place of the configuration's
    backfill: Backfill | NoBackfill = field(default_factory=NoBackfill)
    row: Row = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)  # by the end of the round in progress
    _measurable: dict[str, Answer] = field(default_factory=dict)  # by task: an answer of this node's own to be timed
    _own_parts: deque[float] = field(default_factory=lambda: deque(maxlen=OWN_PARTS))  # in seconds
    _handed_over: float = 0.0
    _unscored: int | None = 0  # rounds since the start, all without an answer that could be scored; None: one had some
    _told_outside: set[TaskKey] = field(
        init=False
    )  # tasks of which a person was told so, when they were loaded or since
    _longest_text: int = field(init=False)
    _longest_prompt: int = field(init=False)
    _encode_observation: Callable[[str], list[int]] = field(init=False)
    _turn_end: int = field(init=False)  # closes peers' turns in the round in progress
    swarm: SwarmRounds = field(init=False)

    def __post_init__(self, exchange: GroupExchange) -> None:
        self._told_outside = {task.key for task in self.tasks.tasks if outside(task)}
        # Characters that fit a completion if each token is the longest there is: more are not worth encoding.
        longest_token = max(map(len, self.policy.tokenizer.get_vocab()))
        self._longest_text = self.config.engine.max_completion_length * longest_token
        self._longest_prompt = self.config.engine.longest_prompt(self.policy.positions)
        self._encode_observation = self.policy.observations(chats=any(map(start_of, self.tasks.tasks)))
        asked = self.config.eval.skip + self.config.eval.count if self.config.eval.every else 0
        sampling = self.config.sampling
        is_fed = self.config.network.enabled or sampling.source == "self" or isinstance(self.backfill, Backfill)
        draws = sampling.external and is_fed  # a node alone looks for no quotations
        context = ScreeningContext(
            self.config.sampling,
            self.tasks,
            self.buffer.read,
            self._encode_prompt,
            self._encode,
            self._surprises,
            self.journal.judged,
            self.tasks.quotations(asked).are_in if draws else (lambda text: False),
            self.journal.barred,
        )
        journal = self.journal
        self.swarm = SwarmRounds(
            self.seed, context, self.buffer, exchange, journal.now, journal.barred, journal.refused
        )

    def check_rows(self) -> None:
        """Tell the log how the rows of each task are split, and how many are too long to be asked.

        Of more than `ROWS_MEASURED` rows, as many are drawn and measured.

        Raises:
            UserError: most of a task's rows are too long.
        """
        for task, training, held_out, items in self.tasks.rows(ROWS_MEASURED):
            log.info("rows", task=task.key.name, for_training=training, held_out_for_evaluation=held_out)
            asked = list(items)
            lengths = [len(self.policy.encode_prompt(item)) for item in asked]
            too_long = sum(length > self._longest_prompt for length in lengths)
            if too_long:
                line = (
                    f"task {task.key.name!r}: the prompts of {too_long} of {len(lengths)} rows have more than "
                    f"{self._longest_prompt} tokens and are not asked: {self._remedy(max(lengths))}"
                    + (TOOLS_LEFT_OUT if any(item.tools for item in asked) else "")
                )
                if 2 * too_long > len(lengths):
                    raise UserError(line)
                log.warning(line)

    def _remedy(self, longest: int) -> str:
        """Return how to have prompts of `longest` tokens asked."""
        engine, positions = self.config.engine, self.policy.positions
        if positions is None or longest + engine.max_completion_length <= positions:
            return f"set engine.max_prompt_length={longest} to ask all"
        return (
            f"the longest has {longest}, and engine.max_completion_length={engine.max_completion_length} leaves "
            f"{positions - engine.max_completion_length} of the policy's {positions} positions: set "
            "engine.max_prompt_length and engine.max_completion_length to fit, or shorten the rows"
        )

    def rounds(self, first: int) -> Iterator[Sequence[Sample]]:
        """Yield the samples of round `first` (counted from 0) and of each after it.

        Args:
            first: rounds already done, which is also the policy's version.
        """
        for version in range(first, self.config.last_round):
            self.row = {"round": version + 1, "policy_version": version, "began": time.time()}
            with self._timed("load"):
                self.engine.load(version)
            with self._timed("questions"):
                questions = self._questions(version)
            self._count_prompts(sum(len(question.prompt) for question in questions))
            screening = self._screening(version)
            began = time.monotonic()
            with self._timed("generate"):
                completions = play(self.engine, self._episodes(questions, version))
            with self._timed("verify"):
                own = self._verified(questions, completions, version)
            self._own_parts.append(time.monotonic() - began)
            if isinstance(self.engine, Ahead) and version + 1 < self.config.last_round:
                ahead = self._episodes(self._questions(version + 1), version + 1)
                self.engine.begin(ahead)  # with the weights before this round's update
            self._check_held_out(own)
            groups = [encoded.group for encoded in own]
            with self.buffer.transaction():  # one a round: each commit costs a tenth of a millisecond
                with self._timed("share"):
                    self.row["rewards_outside"] = self._outside(groups)
                    self.swarm.publish(groups)
                    self.swarm.receive(version + 1, groups)
                with self._timed("draw"):
                    samples = self._draw(own, version, screening)
            self._check_held_out(screening.usable.values())
            self.journal.end_round(version + 1, completions, groups, samples)
            self._describe(own, completions, samples)
            self.record(version + 1, groups, screening)
            if samples:
                self.engine.rest()
            self._handed_over = time.perf_counter()
            yield samples

    def save(self, checkpoint: Path) -> None:
        """Add to a checkpoint what the next rounds need beside the weights: rollouts made ahead, uses of archives."""
        self.backfill.save(checkpoint)
        if isinstance(self.engine, Ahead):
            self.engine.save(checkpoint)

    def settle(self) -> None:
        """Wait for what `save` adds."""
        if isinstance(self.engine, Ahead):
            self.engine.wait()

    def give_up(self) -> None:
        """Drop rollouts that are not made yet, so that `save` does not wait for them: a restart makes them."""
        if isinstance(self.engine, Ahead):
            self.engine.give_up()

    def resume(self, checkpoint: Path | None) -> None:
        """Load what `save` added."""
        self.backfill.resume(checkpoint)
        if checkpoint is not None and isinstance(self.engine, Ahead):
            self.engine.resume(checkpoint)

    def is_last(self) -> bool:
        """Tell whether the node ends with the round in progress, at its last round or at its budget."""
        return is_done(self.config, self.row["round"], self.spent)

    def figures(self) -> dict[str, float]:
        """Return the numbers of the round in progress, as far as they are known."""
        return {key: value for key, value in self.row.items() if isinstance(value, int | float) and key != "began"}

    def finish(self, round_number: int, logs: Mapping[str, float]) -> None:
        """Complete the row of `round_number` with the trainer's `logs` and write it."""
        self.backfill.commit()
        self.row["time/train"] = time.perf_counter() - self._handed_over - self.row.get("time/eval", 0.0)
        self.row["time"] = time.time()
        self.row["time/round"] = self.row["time"] - self.row["began"]
        self.row |= self.swarm.figures()
        self.metrics.append(self.row | {key: value for key, value in logs.items() if key not in self.row})
        self.swarm.finish(self.row, self.policy.name)

    def _encode_prompt(self, item: Item) -> list[int] | None:
        prompt = self.policy.encode_prompt(item)
        return prompt if len(prompt) <= self._longest_prompt else None

    def _questions(self, version: int) -> list[Question]:
        questions, count = [], self.config.sampling.questions_per_round
        for number in range(version * count, (version + 1) * count):
            asked = self.swarm.ask(number)
            prompt = None if asked is None else self._encode_prompt(asked.item)
            if asked is None or prompt is None:
                has_tools = any(task.make(0).tools for task in self.tasks.tasks)
                raise UserError(
                    f"no question to train on is found: too many exceed {self._longest_prompt} tokens (raise "
                    "engine.max_prompt_length if the policy has room"
                    + (TOOLS_LEFT_OUT if has_tools else "")
                    + "), or all are held out for evaluation"
                )
            questions.append(Question(asked.task, asked.seed, asked.item, prompt))
        return questions

    def _episodes(self, questions: Sequence[Question], version: int) -> Episodes:
        return Episodes(
            [EpisodeQuestion(question.task, question.item, question.prompt) for question in questions],
            self.config.sampling.completions,
            SamplingParams.from_config(self.config.engine),
            derive_seed(self.seed, "generate", version),
            self._longest_prompt,
            self._encode_observation,
        )

    def _verified(
        self, questions: Sequence[Question], completions: Sequence[Sequence[Played]], version: int
    ) -> list[EncodedGroup]:
        """Return the completions as groups, without those that cannot be scored here.

        An episode in an environment is scored already. A group with fewer than two scored completions is left out.

        Raises:
            UserError: no answer could be scored since the start, in rounds enough or to the last one.
        """
        turns = [turn for episodes in completions for episode in episodes for turn in episode.turns]
        # By this round's own turns alone, so that a round that is done again finds the same.
        self._turn_end = self.policy.turn_end(turn.token_ids[-1] for turn in turns if turn.finished)
        answers = [
            Answer(question.task, question.item, episode.text)
            for question, episodes in zip(questions, completions, strict=True)
            if start_of(question.task) is None
            for episode in episodes
        ]
        verdicts = iter(late_as_none(self.swarm.score(answers)))
        groups = []
        for question, episodes in zip(questions, completions, strict=True):
            rewards = [episode.reward if start_of(question.task) else next(verdicts) for episode in episodes]
            if sum(reward is not None for reward in rewards) > 1:
                groups.append(self._group(question, episodes, rewards, version))
                if self.tasks.shared(question.task.key) is None:
                    continue
                scored = next(episode for episode, reward in zip(episodes, rewards, strict=True) if reward is not None)
                answer = Answer(question.task, question.item, scored.texts[-1], tuple(scored.texts[:-1]))
                self._measurable[question.task.key.name] = answer
        self._check_scored(questions, groups, version)
        return groups

    def _check_scored(self, questions: Sequence[Question], own: Sequence[EncodedGroup], version: int) -> None:
        """Raise `UserError` where no answer could be scored since the start, in rounds enough or to the last one."""
        if own or self._unscored is None:
            self._unscored = None
            return
        self._unscored += 1
        if self._unscored == min(MOST_UNSCORED, self.config.last_round) or version + 1 == self.config.last_round:
            names = dict.fromkeys(question.task.key.name for question in questions)
            why = "; ".join(f"task {name!r}: {latest_reason(name)}" for name in names)
            rounds = "a round" if self._unscored == 1 else f"{self._unscored} rounds"
            raise UserError(f"nothing can be learnt: no group of {rounds} has two answers that can be scored ({why})")

    def _group(
        self, question: Question, episodes: Sequence[Played], rewards: Sequence[Verdict], version: int
    ) -> EncodedGroup:
        task, seed, item, prompt = question
        scored = [(episode, reward) for episode, reward in zip(episodes, rewards, strict=True) if reward is not None]
        completions = tuple(Episode(episode.texts, episode.finished, reward) for episode, reward in scored)
        made_by = max(0, version - self.config.engine.ahead)
        group = Group(task.key, seed, item.question, completions, self.policy.name, made_by, item.content)
        tokens = {index: episode.tokens for index, (episode, _) in enumerate(scored)}
        return EncodedGroup(group, prompt, tokens, content_id(encode(group)))

    def _outside(self, own: Sequence[Group]) -> int:
        """Count the rewards outside of the range of a task that is shared with peers; tell of a task's first."""
        if not self.config.network.enabled:
            return 0
        count = 0
        for group in own:
            task = self.tasks.shared(group.task)
            outside_range = [] if task is None else [reward for reward in group.rewards if not is_in_range(reward)]
            count += len(outside_range)
            if outside_range and group.task not in self._told_outside:
                self._told_outside.add(group.task)
                first = outside_range[0]
                parts = first.parts if isinstance(first, Scored) else {}
                log.warning(told_outside(group.task.name, first, parts, getattr(task, "range", UNIT)))
        return count

    def _screening(self, version: int) -> Screening:
        """Begin the round's draw; where workers score, they begin with peers' texts while this node generates."""
        sampling, scale = self.config.sampling, SCALES[self.config.trainer.options.scale_rewards]
        screening = self.swarm.begin(version + 1, sampling.external, sampling.completions, scale, self.rule)
        if self.tasks.scores_in_workers:
            if self.buffer.signers:
                self.swarm.yardstick.measure(self._measurable)
            screening.draw(self.swarm.candidates(screening, version + 1))
        return screening

    def _draw(self, own: Sequence[EncodedGroup], version: int, screening: Screening) -> list[Sample]:
        """Return the round's samples: own ones, peers' ones, and archived ones where these leave room."""
        sampling, number, seconds = self.config.sampling, version + 1, max(min(self._own_parts), PEERS_S)
        self.swarm.record_own(number, own)
        samples = local_samples(own, sampling.local, screening.rule, screening.asked)
        if sampling.external == 0:
            return samples
        candidates = self.swarm.fill(screening, number, seconds)
        used = self.swarm.take(screening, number, candidates)
        external = external_samples(screening.picks, screening.usable, sampling.external_weight, len(own))
        self.row |= metrics_of_draw(screening, external, version)
        archived = self.backfill.fill(self.swarm, screening, number, sampling.external - len(used), seconds)
        if archived is not None:
            self._check_held_out(archived.usable.values())
            self.row["groups_archived"] = len(archived.usable)
            first = len(own) + len(screening.usable)
            external += external_samples(archived.picks, archived.usable, sampling.external_weight, first)
        return samples + external

    def _check_held_out(self, groups: Iterable[EncodedGroup]) -> None:
        """Raise if a group on a held-out question is about to be published or trained on."""
        for group in groups:
            task = self.tasks.get(group.group.task)
            if task is None or self.tasks.is_held_out(task, group.group.question):
                raise AssertionError(f"a held-out question in training: {group.group.question!r:.200}")

    def _surprises(self, rows: Sequence[ScoredRow]) -> list[float]:
        """Return how surprising completions are under the policy, and count their tokens as spent."""
        temperature = self.config.engine.temperature
        nats = self.journal.measured(len(rows), lambda: surprises(self.policy, rows, temperature))
        self.row["tokens_scored"] = self.row.get("tokens_scored", 0) + sum(tokens.sampled for _, tokens in rows)
        self._count_prompts(sum(len(prompt) + len(tokens.given) for prompt, tokens in rows))
        return nats

    def _count_prompts(self, tokens: int) -> None:
        self.row["tokens_prompts"] = self.row.get("tokens_prompts", 0) + tokens

    def _encode(self, prompt: Sequence[int], episode: Episode) -> Tokens | None:
        """Return a peer's episode as tokens; None if a turn, or its prompt, is longer than an own one may be.

        It is not truncated: that would not be the text that was scored.
        """
        if any(len(text) > self._longest_text for text in episode.texts[::2]):
            return None
        turns = self._turns(episode)
        before = len(prompt) + sum(map(len, turns[:-1]))
        is_longer = before > max(self._longest_prompt, len(prompt)) or any(
            len(turn) > self.config.engine.max_completion_length for turn in turns[::2]
        )
        return None if is_longer else Tokens.of(turns)

    def _turns(self, episode: Episode) -> list[list[int]]:
        """Return the tokens of each text of an episode."""
        last = len(episode.texts) - 1
        return [
            self._encode_observation(text)
            if at % 2
            else self.policy.encode_completion(text, episode.finished or at < last, self._turn_end)
            for at, text in enumerate(episode.texts)
        ]

    def _describe(
        self, own: Sequence[EncodedGroup], completions: Sequence[Sequence[Played]], samples: Sequence[Sample]
    ) -> None:
        for count in ("groups_external", "groups_unusable", *LEFT_OUT):
            self.row.setdefault(count, 0)
        retokenized = [self._is_retokenized(group, index) for group in own for index in group.completions]
        self.row |= {
            **metrics_of_own(own, completions, retokenized),
            "groups_local": min(len(own), self.config.sampling.local),
            **metrics_of_samples(samples, self.config.trainer.num_iterations),
        }
        observed = sum(episode.observed_tokens for episodes in completions for episode in episodes)
        self._count_prompts(observed + TRAINED_COST * prompts_trained_on(samples, self.config.trainer.num_iterations))
        self.spent = self.spent.after(self.row)

    def _is_retokenized(self, own: EncodedGroup, index: int) -> bool:
        """Whether a completion's texts, which are all that peers get, stand for other tokens than were sampled."""
        return Tokens.of(self._turns(own.group.completions[index])).ids != tuple(own.completions[index].ids)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.row[f"time/{step}"] = time.perf_counter() - began
