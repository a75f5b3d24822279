"""The loop of a node: Algorithm 1 of "Sharing is Caring" (arXiv 2509.08721).

    sample questions -> generate -> verify -> share -> draw own and external groups -> (update) -> repeat

`rounds` is a generator. Each `yield` hands the trainer one round's samples, and the
update happens there, inside TRL's training loop; when the generator is resumed the
policy is one version newer. Nothing here waits for a peer. All randomness derives
from the node's seed and the round's number, so a round that is done again after a
crash asks the same questions and draws the same completions.
"""

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from node.config import EngineConfig, NodeConfig
from node.engines import Generated, RolloutEngine, SamplingParams
from node.errors import UserError
from node.journal import NoJournal, RoundJournal
from node.policy.load import Policy
from node.rollouts.group import Completion, EncodedGroup, Group, GroupError, Question, content_id, encode
from node.rollouts.lengths import OwnLength, OwnLengths, own_length
from node.rollouts.replay_buffer import ReplayBuffer, Shared, own_shared
from node.rollouts.rules import RULES
from node.rollouts.sampling import (
    RIGHT,
    SCALES,
    Candidate,
    Choose,
    Draw,
    Pick,
    Place,
    Rule,
    Sample,
    drop_negatives,
    effective_size,
    external_pulls,
    external_samples,
    external_share,
    is_informative,
    local_samples,
)
from node.rollouts.screening import BLAMELESS, Refused, says_nothing_else, verify
from node.rollouts.usefulness import Lesson, choose_by_worth, worths
from node.swarm.sharing import Exchange, traffic_row
from node.tasks import Item, TaskSet, derive_seed
from node.telemetry.metrics import MetricsLog
from node.telemetry.rollout_log import Drawn, external_rows, own_rows
from node.training.budget import Spent, is_done
from node.training.likelihood import mean_logprobs, surprises

Row = dict[str, Any]
LOOKED_AT = 4  # times as many of peers' completions as a draw has are looked at in a round: a flood costs no more
PROMPT_TRIES = 20  # questions looked at for each one asked, when many are too long for the policy


def longest_prompt(engine: EngineConfig, policy: Policy) -> int:
    """Return how many tokens a prompt may have, so that the longest completion still has positions after it.

    Raises:
        UserError: the completions leave no room for a question.
    """
    if policy.positions is None:
        return engine.max_prompt_length
    room = policy.positions - engine.max_completion_length
    if room < 1:
        raise UserError(
            f"engine.max_completion_length={engine.max_completion_length} leaves no room for a question: "
            f"the policy has {policy.positions} positions"
        )
    return min(engine.max_prompt_length, room)


@dataclass(slots=True)
class _Judged:
    """Peers' groups that a round has looked at: those that are true, and why others are not."""

    own_lengths: OwnLengths
    true: dict[bytes, tuple[Group, Question]] = field(default_factory=dict)  # and the question that it answers
    false: dict[bytes, str] = field(default_factory=dict)
    unfit: dict[Place, str] = field(default_factory=dict)  # of completions looked at: why one is left out, or ""
    bare: set[Place] = field(default_factory=set)  # of completions looked at: right ones that have room for nothing
    tokens: dict[Place, Sequence[int]] = field(default_factory=dict)  # of completions looked at, if not too many
    usual: dict[str, float] = field(default_factory=dict)  # length of an answer, by task
    room: int | None = None  # completions that may still be looked at


@dataclass(slots=True)
class Loop:
    """What a round needs, and the metrics row of the round in progress."""

    config: NodeConfig
    seed: int
    policy: Policy
    engine: RolloutEngine
    tasks: TaskSet
    pool: ReplayBuffer
    exchange: Exchange
    metrics: MetricsLog
    record: Callable[[Sequence[Row]], None] = lambda rows: None  # takes what is kept of a round's rollouts
    journal: RoundJournal = field(default_factory=NoJournal)
    row: Row = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)  # until the end of the round in progress
    _handed_over: float = 0.0
    _longest_text: int = field(init=False)
    _longest_prompt: int = field(init=False)
    _probe: list[tuple[Sequence[int], Sequence[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Characters that fit a completion if each token is the longest there is: more are not worth encoding.
        longest_token = max(map(len, self.policy.tokenizer.get_vocab()))
        self._longest_text = self.config.engine.max_completion_length * longest_token
        self._longest_prompt = longest_prompt(self.config.engine, self.policy)

    def rounds(self, first: int) -> Iterator[Sequence[Sample]]:
        """Yield the samples of round `first` (counted from 0) and of each after it.

        Args:
            first: rounds already done, which is also the policy's version.
        """
        sampling = self.config.sampling
        for version in range(first, self.config.last_round):
            self.row = {"round": version + 1, "policy_version": version, "began": time.time()}
            with self._timed("load"):
                self.engine.load(version)
            with self._timed("questions"):
                questions = self._questions(version, sampling.questions_per_round)
            with self._timed("generate"):
                completions = self._generate(questions, version)
            with self._timed("verify"):
                own = [
                    self._verified(question, made, version)
                    for question, made in zip(questions, completions, strict=True)
                ]
            with self.pool.transaction():  # one a round: each commit costs a tenth of a millisecond
                with self._timed("share"):
                    self.exchange.publish([one.group for one in own])
                    received = self.exchange.receive(self.pool.__contains__)
                    now = self.journal.now()
                    if sampling.source == "self":
                        self.pool.add(self._own_shared(own, now), now, first_round=version + 2)
                    elif sampling.external:
                        self.pool.add(received, now, first_round=version + 1)
                with self._timed("draw"):
                    samples, drawn = self._draw(own, version)
            self.journal.end_round(version + 1, completions, [one.group for one in own], samples)
            self._describe(own, samples)
            self.spent = self.spent.after(self.row)
            self._record(own, drawn)
            self._handed_over = time.perf_counter()
            yield samples

    def is_last(self) -> bool:
        """Tell whether the node ends with the round in progress, at its last round or at its budget."""
        return is_done(self.config, self.row["round"], self.spent)

    def figures(self) -> dict[str, float]:
        """Return the numbers of the round in progress, as far as they are known."""
        return {key: value for key, value in self.row.items() if isinstance(value, int | float) and key != "began"}

    def finish(self, round_number: int, logs: Mapping[str, float]) -> None:
        """Complete the row of `round_number` with the trainer's `logs` and write it."""
        self.row["time/train"] = time.perf_counter() - self._handed_over - self.row.get("time/eval", 0.0)
        self.row["time"] = time.time()
        self.row["time/round"] = self.row["time"] - self.row["began"]
        self.row |= {"swarm/pool": len(self.pool), **traffic_row(self.exchange.traffic())}
        self.metrics.append(self.row | {key: value for key, value in logs.items() if key not in self.row})

    def _encode_prompt(self, item: Item) -> list[int] | None:
        prompt = self.policy.encode_prompt(item)
        return prompt if len(prompt) <= self._longest_prompt else None

    def _questions(self, version: int, count: int) -> list[Question]:
        questions = []
        for task, seed in self.tasks.sample(derive_seed(self.seed, "questions", version), count * PROMPT_TRIES):
            item = task.make(seed)
            prompt = self._encode_prompt(item)
            if prompt is not None:
                questions.append(Question(task, seed, item, prompt))
            if len(questions) == count:
                return questions
        raise UserError(
            f"too many questions exceed {self._longest_prompt} tokens: "
            "raise engine.max_prompt_length if the policy has room, or ask other tasks"
        )

    def _generate(self, questions: Sequence[Question], version: int) -> list[list[Generated]]:
        params = SamplingParams.from_config(self.config.engine)
        prompts = [question.prompt for question in questions]
        seed = derive_seed(self.seed, "generate", version)
        return self.engine.generate(prompts, self.config.sampling.completions, params, seed)

    def _verified(self, question: Question, made: Sequence[Generated], version: int) -> EncodedGroup:
        task, seed, item, prompt = question
        completions = tuple(Completion(one.text, one.finished, float(task.verify(item, one.text))) for one in made)
        group = Group(task.key, seed, item.question, completions, self.policy.name, version, item.content)
        tokens = {index: one.token_ids for index, one in enumerate(made)}
        logprobs = {index: one.logprobs for index, one in enumerate(made) if one.logprobs is not None}
        return EncodedGroup(group, prompt, tokens, logprobs, content_id(encode(group)))

    def _own_shared(self, own: Sequence[EncodedGroup], now: float) -> list[Shared]:
        """Return what peers get of these groups, as a peer gets it."""
        return [
            own_shared(one.group, now)
            for one in own
            if self.config.network.share == "all" or is_informative(one.group.rewards)
        ]

    def _draw(self, own: Sequence[EncodedGroup], version: int) -> tuple[list[Sample], list[Drawn]]:
        sampling = self.config.sampling
        rng = random.Random(derive_seed(self.seed, "draw", version))
        judged = _Judged(self.pool.made(version + 1, list(map(_own_length, own))))
        score = self._probe_score() if sampling.probe and sampling.external else None
        draw = Draw(
            sampling.external,
            sampling.completions,
            SCALES[self.config.trainer.scale_rewards],
            rng,
            None if score is None else self._preference(score, version + 1),
            self._per_signer(),
        )
        rule = RULES[sampling.rule]
        local = local_samples(own, sampling.local, rule, draw)
        if sampling.external == 0:
            return local, []
        now = self.journal.now()
        picks = self._drawn(rule, draw, judged, version, now)
        if sampling.external_negatives == "drop":
            picks = drop_negatives(picks)
        groups = _drawn_groups(picks, judged)
        self.pool.use(groups, version + 1)
        self.exchange.drew(len(groups), self.pool.left)
        came = {key: self.pool.candidate(key) for key in groups}
        taught = Counter(one.peer for one in came.values())
        external = external_samples(picks, groups, sampling.external_weight, first=len(own))
        self.row |= {
            "groups_external": len({sample.group for sample in external}),
            **{f"swarm/{why}": count for why, count in Counter(filter(None, judged.unfit.values())).items()},
            "swarm/taught_by": dict(taught),
            **_staleness(list(came.values()), groups, now, version),
        }
        if score is not None:
            peers = {one.id: one.peer for one in came.values()}
            pulls = external_pulls(local + external, peers)
            self.pool.learned(version + 1, Lesson(score, pulls))
            self.row["swarm/probe"] = score
        drawn = [Drawn(came[key].peer, now - came[key].received, one.group) for key, one in groups.items()]
        return local + external, drawn

    def _drawn(self, rule: Rule, draw: Draw, judged: _Judged, version: int, now: float) -> list[Pick]:
        """Draw again from peers' groups until all that was drawn is of use; what is not is buried, which ends it."""
        self.row["groups_unusable"] = 0
        while True:
            candidates = self.pool.candidates(now, version + 1, self.config.sampling.max_uses)
            picks = rule.peers(candidates, draw)
            self._verify((pick.id for pick in picks), judged)
            if not judged.false:
                self._look_at(picks, judged)
            if not judged.false:
                return [pick for pick in picks if not judged.unfit[pick.id, pick.index]]
            self.pool.bury(judged.false, version + 1)
            for one in candidates:
                if (reason := judged.false.get(one.id)) is not None:
                    self.exchange.report(one.id, reason)
                    self.journal.refused(Refused(one.id, one.peer, reason))
                    self.row["groups_unusable"] += reason in BLAMELESS
            judged.false.clear()

    def _per_signer(self) -> int | None:
        sampling = self.config.sampling
        if not sampling.max_signer_share or not self.pool.signers:
            return None
        return math.ceil(sampling.max_signer_share * sampling.external / self.pool.signers)

    def _look_at(self, picks: Sequence[Pick], judged: _Judged) -> None:
        """Find the picks that are true and not to be trained on; a group without a good one left is given up.

        No more are looked at than a round has room for: those beyond are left out, and not given up.
        """
        if judged.room is None:
            judged.room = LOOKED_AT * len(picks)
        new = [place for place in dict.fromkeys((pick.id, pick.index) for pick in picks) if place not in judged.unfit]
        judged.unfit |= dict.fromkeys(new[judged.room :], "not_looked_at")
        new = new[: judged.room]
        judged.room -= len(new)
        for place in new:
            group, question = judged.true[place[0]]
            made = group.completions[place[1]]
            if (tokens := self._encode(made)) is not None:
                judged.tokens[place] = tokens
            if says_nothing_else(question, made):
                judged.bare.add(place)
            judged.unfit[place] = self._too_long(place, group.task.name, judged)
        asked = [place for place in new if not judged.unfit[place] and place not in judged.bare]
        bound = self.config.sampling.max_surprise
        if bound and self.config.sampling.source == "peers":
            asked = [place for place in asked if judged.tokens[place]]  # it may be empty
            rows = [(judged.true[place[0]][1].prompt, judged.tokens[place]) for place in asked]
            found = self.journal.measured(
                len(rows), lambda: surprises(self.policy, rows, self.config.engine.temperature)
            )
            self._count_scored(made for _, made in rows)
            judged.unfit |= {
                place: "too_surprising" for place, one in zip(asked, found, strict=True) if not one <= bound
            }
        good: dict[bytes, list[str]] = {}
        for pick in picks:
            if pick.advantage > 0:
                good.setdefault(pick.id, []).append(judged.unfit[pick.id, pick.index])
        judged.false |= {key: why[0] for key, why in good.items() if all(why) and "not_looked_at" not in why}

    def _too_long(self, place: Place, task: str, judged: _Judged) -> str:
        """Return why a peer's completion is too long, or nothing."""
        sampling = self.config.sampling
        tokens = judged.tokens.get(place)
        if tokens is None:
            return "too_long"
        if not sampling.max_length_ratio or sampling.source != "peers" or place in judged.bare:
            return ""
        if task not in judged.usual:
            judged.usual[task] = judged.own_lengths.usual(task)
        usual = judged.usual[task]
        return "over_long" if usual and len(tokens) > sampling.max_length_ratio * usual else ""

    def _verify(self, ids: Iterable[bytes], judged: _Judged) -> None:
        """Judge those of peers' groups that are not judged yet."""
        for key, group in self.pool.read(one for one in ids if one not in judged.true).items():
            try:
                judged.true[key] = group, verify(group, self.tasks, self._encode_prompt)
            except GroupError as error:
                judged.false[key] = error.reason

    def _preference(self, score: float, round_number: int) -> Choose:
        """Return a draw by what peers have been worth, the probe standing at `score`."""
        known = worths(self.pool.lessons(round_number), score)
        return lambda candidates, count, rng: choose_by_worth(candidates, count, known, rng)

    def _probe_score(self) -> float:
        """Return the mean log-probability of the probe's right answers, nats a token."""
        if not self._probe:
            self._probe = self._probe_rows()
        rows = self._probe
        found = self.journal.measured(len(rows), lambda: mean_logprobs(self.policy, rows))
        self._count_scored(made for _, made in rows)
        return statistics.fmean(found)

    def _probe_rows(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return questions that neither training nor an evaluation meets, each with its right answer, as tokens.

        Raises:
            UserError: hardly any has an answer that is known and short enough.
        """
        rows: list[tuple[Sequence[int], Sequence[int]]] = []
        count = self.config.sampling.probe
        for task, seed in self.tasks.sample(derive_seed(self.seed, "probe"), count * PROMPT_TRIES):
            item = task.make(seed)
            prompt = self._encode_prompt(item)
            answer = self.policy.encode_completion(item.solution or item.answer, finished=True)
            fits = len(answer) <= self.config.engine.max_completion_length
            if prompt is not None and fits and task.verify(item, item.solution or item.answer) >= RIGHT:
                rows.append((prompt, answer))
            if len(rows) == count:
                return rows
        raise UserError("sampling.probe wants tasks whose right answers are known and fit a completion: set it to 0")

    def _count_scored(self, completions: Iterable[Sequence[int]]) -> None:
        self.row["tokens_scored"] = self.row.get("tokens_scored", 0) + sum(map(len, completions))

    def _record(self, own: Sequence[EncodedGroup], drawn: Sequence[Drawn]) -> None:
        bounds, number = self.config.rollout_log, self.row["round"]
        rows = own_rows(number, [one.group for one in own[: bounds.own]])
        self.record(rows + external_rows(number, drawn[: bounds.external]))

    def _encode(self, made: Completion) -> list[int] | None:
        """Return a peer's completion as tokens; None if it is longer than an own one may be.

        What is cut is not what was rewarded.
        """
        if len(made.text) > self._longest_text:
            return None
        tokens = self.policy.encode_completion(made.text, made.finished)
        return tokens if len(tokens) <= self.config.engine.max_completion_length else None

    def _describe(self, own: Sequence[EncodedGroup], samples: Sequence[Sample]) -> None:
        made = [completion for one in own for completion in one.group.completions]
        rewards = [completion.reward for completion in made]
        left_out = ("swarm/too_long", "swarm/over_long", "swarm/too_surprising")
        for count in ("groups_external", "groups_unusable", *left_out):
            self.row.setdefault(count, 0)
        self.row |= {
            "reward": statistics.fmean(rewards),
            **_rewards_by_task(own),
            "reward_std": statistics.pstdev(rewards),
            "groups_local": min(len(own), self.config.sampling.local),
            "groups_informative": sum(is_informative(one.group.rewards) for one in own),
            "generated": len(made),
            "tokens_generated": sum(len(ids) for one in own for ids in one.completions.values()),
            "trained": sum(sample.advantage != 0 for sample in samples),
            "tokens_trained": self.config.trainer.num_iterations
            * sum(len(sample.completion) for sample in samples if sample.advantage != 0),
            "swarm/external_share": external_share(samples),
            "effective_samples": effective_size(samples),
            "completions/finished": statistics.fmean(completion.finished for completion in made),
            "completions/retokenized": statistics.fmean(
                self._is_retokenized(one, at) for one in own for at in one.completions
            ),
            "completions/mean_length": statistics.fmean(len(ids) for one in own for ids in one.completions.values()),
        }

    def _is_retokenized(self, own: EncodedGroup, index: int) -> bool:
        """Whether a completion's text, which is all that peers get, stands for other tokens than were sampled."""
        completion = own.group.completions[index]
        return self.policy.encode_completion(completion.text, completion.finished) != list(own.completions[index])

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.row[f"time/{step}"] = time.perf_counter() - began


def _drawn_groups(picks: Sequence[Pick], judged: _Judged) -> dict[bytes, EncodedGroup]:
    """Return the groups of these picks, with the tokens of what is picked of them."""
    tokens: dict[bytes, dict[int, Sequence[int]]] = {}
    for pick in picks:
        tokens.setdefault(pick.id, {})[pick.index] = judged.tokens[pick.id, pick.index]
    groups = {}
    for key, made in tokens.items():
        group, question = judged.true[key]
        groups[key] = EncodedGroup(group, question.prompt, made, id=key)
    return groups


def _own_length(own: EncodedGroup) -> OwnLength:
    lengths = [len(own.completions[index]) for index in range(len(own.group.completions))]
    return own_length(own.group.task.name, lengths, own.group.rewards)


def _rewards_by_task(own: Sequence[EncodedGroup]) -> Row:
    """Return the mean reward of each task that was asked, by a name as TRL's for a reward function."""
    rewards: dict[str, list[float]] = {}
    for one in own:
        rewards.setdefault(one.group.task.name, []).extend(one.group.rewards)
    return {f"rewards/{task}/mean": statistics.fmean(values) for task, values in rewards.items()}


def _staleness(
    drawn: Sequence[Candidate], groups: Mapping[bytes, EncodedGroup], now: float, version: int
) -> dict[str, float]:
    """Return how long the drawn groups have waited here, and how far behind us their makers say that they were.

    What a peer says of its version is its own count of rounds and may be anything: it is shown, by its median, and
    decides nothing.
    """
    if not drawn:
        return {}
    seconds = [now - one.received for one in drawn]
    rounds = [version + 1 - one.first_round for one in drawn]
    return {
        "swarm/age_seconds": statistics.fmean(seconds),
        "swarm/age_seconds_max": max(seconds),
        "swarm/age_rounds": statistics.fmean(rounds),
        "swarm/age_rounds_max": max(rounds),
        "swarm/claimed_lag": statistics.median(version - one.group.policy_version for one in groups.values()),
    }
