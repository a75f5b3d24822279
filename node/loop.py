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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from node.config import NodeConfig
from node.engines import RolloutEngine, SamplingParams
from node.engines.ahead import Ahead
from node.engines.episodes import EpisodeQuestion, Episodes, Played, play
from node.errors import UserError
from node.policy.load import Policy
from node.rollouts.draw import Draw, Draws
from node.rollouts.group import EncodedGroup, Episode, Group, Question, content_id, encode
from node.rollouts.group_buffer import GroupBuffer
from node.rollouts.rule import SCALES, Rule, Sample, external_samples, local_samples
from node.swarm.sharing import GroupExchange, RewardsOutside, as_from_peers, figures_of
from node.tasks import derive_seed
from node.tasks.environments.episodes import start_of
from node.tasks.scoring.verdicts import Answer, Verdict, latest_reason, score
from node.tasks.task_set import TaskSet
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
from node.training.texts import PolicyTexts

MOST_UNSCORED = 3  # rounds from a start on without a scored answer, after which the node ends: one may be bad luck


@dataclass(slots=True)
class Loop:
    """The parts of a round, and the metrics row of the round in progress."""

    config: NodeConfig
    seed: int
    policy: Policy
    engine: RolloutEngine
    tasks: TaskSet
    buffer: GroupBuffer
    exchange: GroupExchange
    metrics: MetricsLog
    record: Callable[[int, Sequence[Group], Draw], None] = lambda *of_round: None  # logs some of the rollouts
    rule: Rule | None = None  # in place of the configuration's
    row: Row = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)  # by the end of the round in progress
    texts: PolicyTexts = field(init=False)
    draws: Draws = field(init=False)
    _outside: RewardsOutside = field(init=False)
    _handed_over: float = 0.0
    _unscored: int | None = 0  # rounds since the start, all without an answer that could be scored; None: one had some

    def __post_init__(self) -> None:
        sampling, evaluations = self.config.sampling, self.config.eval
        self.texts = PolicyTexts(self.policy, self.config.engine, self.tasks)
        self._outside = RewardsOutside(self.tasks)
        asked = evaluations.skip + evaluations.count if evaluations.every else 0
        is_fed = self.config.network.enabled or sampling.source == "self"
        looks = sampling.external and is_fed  # a node alone looks for no quotations
        self.draws = Draws(
            self.seed,
            sampling,
            self.tasks,
            self.buffer,
            self.exchange,
            self.texts.encode_prompt,
            self.texts.encode,
            partial(surprises, self.policy, temperature=self.config.engine.temperature),
            self.tasks.quotations(asked).are_in if looks else (lambda text: False),
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
            count = self.config.sampling.questions_per_round
            with self._timed("questions"), self.draws.yardstick.own_questions(count):
                questions = self._questions(version)
            draw = self._begin_draw(version)
            with self._timed("generate"):
                completions = play(self.engine, self._episodes(questions, version))
            with self._timed("verify"):
                own = self._verified(questions, completions, version)
            if isinstance(self.engine, Ahead) and version + 1 < self.config.last_round:
                ahead = self._episodes(self._questions(version + 1), version + 1)
                self.engine.begin(ahead)  # with the weights before this round's update
            self._check_held_out(own)
            groups = [encoded.group for encoded in own]
            with self.buffer.transaction():  # one a round: each commit costs a tenth of a millisecond
                with self._timed("share"):
                    self.row["rewards_outside"] = self._outside.count(groups) if self.config.network.enabled else 0
                    self.exchange.publish(groups)
                    is_own_peer = self.config.sampling.source == "self"
                    self.draws.receive(version + 1, as_from_peers(groups, self.tasks) if is_own_peer else ())
                with self._timed("draw"):
                    samples = self._samples(own, draw, version)
            self._check_held_out(draw.usable.values())
            self._describe(questions, own, completions, draw, samples)
            self.record(version + 1, groups, draw)
            if samples:
                self.engine.rest()
            self._handed_over = time.perf_counter()
            yield samples

    def save(self, checkpoint: Path) -> None:
        """Add to a checkpoint what the next rounds need beside the weights: rollouts made ahead."""
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
        self.row["time/train"] = time.perf_counter() - self._handed_over - self.row.get("time/eval", 0.0)
        self.row["time"] = time.time()
        self.row["time/round"] = self.row["time"] - self.row["began"]
        self.row |= figures_of(self.exchange, len(self.buffer))
        self.metrics.append(self.row | {key: value for key, value in logs.items() if key not in self.row})
        self.exchange.finished(self.row, self.policy.name)

    def _questions(self, version: int) -> list[Question]:
        questions, count = [], self.config.sampling.questions_per_round
        for number in range(version * count, (version + 1) * count):
            asked = self.tasks.ask(self.seed, number, lambda item: self.texts.encode_prompt(item) is not None)
            prompt = None if asked is None else self.texts.encode_prompt(asked.item)
            if asked is None or prompt is None:
                raise self.texts.no_question()
            questions.append(Question(asked.task, asked.seed, asked.item, prompt))
        return questions

    def _episodes(self, questions: Sequence[Question], version: int) -> Episodes:
        return Episodes(
            [EpisodeQuestion(question.task, question.item, question.prompt) for question in questions],
            self.config.sampling.completions,
            SamplingParams.from_config(self.config.engine),
            derive_seed(self.seed, "generate", version),
            self.texts.longest_prompt,
            self.texts.encode_observation,
        )

    def _begin_draw(self, version: int) -> Draw:
        """Begin the round's draw: where workers score, they score peers' texts while this node generates."""
        sampling, scale = self.config.sampling, SCALES[self.config.trainer.options.scale_rewards]
        draw = self.draws.begin(version + 1, sampling.external, sampling.completions, scale, self.rule)
        draw.prepare()
        return draw

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
        self.texts.turn_end = self.policy.turn_end(turn.token_ids[-1] for turn in turns if turn.finished)
        answers = [
            Answer(question.task, question.item, episode.text)
            for question, episodes in zip(questions, completions, strict=True)
            if start_of(question.task) is None
            for episode in episodes
        ]
        verdicts = iter(score(answers))
        groups = []
        for question, episodes in zip(questions, completions, strict=True):
            rewards = [episode.reward if start_of(question.task) else next(verdicts) for episode in episodes]
            if sum(reward is not None for reward in rewards) > 1:
                groups.append(self._group(question, episodes, rewards, version))
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
        scored = [(episode, reward) for episode, reward in zip(episodes, rewards, strict=True) if reward is not None]
        completions = tuple(Episode(episode.texts, episode.finished, reward) for episode, reward in scored)
        made_by, item = max(0, version - self.config.engine.ahead), question.item
        group = Group(
            question.task.key, question.seed, item.question, completions, self.policy.name, made_by, item.content
        )
        tokens = {index: episode.tokens for index, (episode, _) in enumerate(scored)}
        return EncodedGroup(group, question, tokens, content_id(encode(group)))

    def _samples(self, own: Sequence[EncodedGroup], draw: Draw, version: int) -> list[Sample]:
        """Return the round's samples: own ones and peers' ones."""
        sampling = self.config.sampling
        self.draws.record_own(version + 1, own)
        samples = local_samples(own, sampling.local, draw.rule, draw.asked)
        if sampling.external == 0:
            return samples
        draw.fill()
        draw.take()
        external = external_samples(draw.picks, draw.usable, len(own))
        self.row |= metrics_of_draw(draw, external, version)
        return samples + external

    def _check_held_out(self, groups: Iterable[EncodedGroup]) -> None:
        """Raise if a group on a held-out question is about to be published or trained on."""
        for group in groups:
            task = self.tasks.get(group.group.task)
            if task is None or self.tasks.is_held_out(task, group.group.question):
                raise AssertionError(f"a held-out question in training: {group.group.question!r:.200}")

    def _describe(
        self,
        questions: Sequence[Question],
        own: Sequence[EncodedGroup],
        completions: Sequence[Sequence[Played]],
        draw: Draw,
        samples: Sequence[Sample],
    ) -> None:
        for count in ("groups_external", "groups_unusable", *LEFT_OUT):
            self.row.setdefault(count, 0)
        iterations = self.config.trainer.num_iterations
        self.row |= {
            **metrics_of_own(own, completions, self.texts.are_retokenized(own)),
            "groups_local": min(len(own), self.config.sampling.local),
            **metrics_of_samples(samples, iterations),
            "tokens_prompts": sum(len(question.prompt) for question in questions)
            + sum(episode.observed_tokens for episodes in completions for episode in episodes)
            + draw.tokens_read
            + TRAINED_COST * prompts_trained_on(samples, iterations),
        }
        self.spent = self.spent.after(self.row)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.row[f"time/{step}"] = time.perf_counter() - began
