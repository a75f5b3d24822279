"""TRL's own `GRPOTrainer`, unchanged, as a member of a swarm: its `rollout_func` draws, answers and publishes.

A step's batch is made of groups of `num_generations` completions. A part of them are peers'; the others are answers of
this model to questions of the swarm, which are published. The rows of the data set are mere places in the batch:
questions and rewards come from the swarm, so that every peer's group can be used. The update is TRL's alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from node.errors import UserError
from node.exchange import Exchange
from node.exchange.member import AskedQuestion, DrawnGroup

if TYPE_CHECKING:
    from node.policy.completion_text import CompletionText


class SwarmRollouts:
    """A `rollout_func` of TRL's `GRPOTrainer`; its `reward` is the trainer's only reward function.

    This policy's sampler did not make a peer's answer. Where the trainer corrects for vLLM's log-probabilities, those
    of a peer's answer are NaN, and TRL takes them as an importance ratio of 1. Elsewhere TRL computes by a forward pass
    what it needs.

    Args:
        swarm: a member; its owner closes it once training is over.
        share: the part of a batch's groups that peers' groups may fill.
    """

    SAMPLING: ClassVar[Mapping[str, float]] = {"max_length_ratio": 0.0}
    """`sampling` of `Exchange.join`: peers' groups come with all their answers."""

    def __init__(self, swarm: Exchange, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"share is {share}: give a part of the batch, from 0 to 1")
        self._swarm = swarm
        self._share = share
        self.drawn = 0  # groups of peers so far
        self._text: CompletionText | None = None  # of the trainer's tokenizer, once a batch was asked for

    def reward(self, reward: Sequence[float | None], **_: Any) -> Sequence[float | None]:
        """Return the rewards that the swarm's tasks have paid; TRL leaves out completions of which that is None."""
        return reward

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any] | None]:
        """Return rollouts in place of these prompts: peers' groups first, then own ones.

        Raises:
            UserError: the trainer evaluates, or its processes or batches do not take whole groups.
        """
        size = trainer.num_generations
        count, rest = divmod(len(prompts), size)
        if not trainer.model.training:
            raise UserError("a swarm's rollouts are for training: set eval_strategy to 'no'")
        if rest or trainer.accelerator.num_processes > 1:
            raise UserError(
                f"a swarm's rollouts are whole groups in one process: give per_device_train_batch_size a multiple of "
                f"num_generations ({size}), and start one process"
            )
        if self._text is None:
            from node.policy.completion_text import CompletionText

            self._text = CompletionText(_tokenizer_of(trainer), trainer.eos_token_ids)
        rows: list[_Row] = []
        for group in self._swarm.draw(round(count * self._share)):
            rows += _of_peer(group, self._text, trainer, size)
        drawn = len(rows) // size
        self.drawn += drawn
        if drawn < count:
            rows += self._own(count - drawn, self._text, trainer, size)
        prompt_ids, completion_ids, logprobs, rewards = map(list, zip(*rows, strict=True))
        is_corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": logprobs if is_corrected else None,
            "reward": rewards,
        }

    def _own(self, count: int, text: "CompletionText", trainer: Any, size: int) -> list["_Row"]:
        """Answer `count` questions of the swarm, and publish the answers."""
        questions = self._swarm.ask(count)
        repeated = [ids for question in questions for ids in [_prompt_of(question, trainer)] * size]
        made, logprobs = trainer._generate_single_turn(repeated, None, {}, size)  # as TRL itself does
        texts = [text.decode(ids) for ids in made]
        rows: list[_Row] = []
        for at, question in zip(range(0, len(made), size), questions, strict=True):
            group = slice(at, at + size)
            finished = [ids[-1] in trainer.eos_token_ids for ids in made[group]]
            rewards = self._swarm.score(question, texts[group])
            self._swarm.publish(question, texts[group], finished)
            known = logprobs[group] if logprobs is not None else [_unknown(ids) for ids in made[group]]
            rows += zip(repeated[group], made[group], known, rewards, strict=True)
        return rows


_Row = tuple[list[int], list[int], list[float], float | None]  # prompt, completion, log-probabilities, reward


def _of_peer(group: DrawnGroup, text: "CompletionText", trainer: Any, size: int) -> list[_Row]:
    """Return `size` rows of a peer's group, the last of them without a reward where it has fewer answers.

    Empty and over-long answers are left out; if what is left teaches nothing, so is the group.
    """
    end = _tokenizer_of(trainer).eos_token_id
    prompt = _prompt_of(group.question, trainer)
    rows: list[_Row] = []
    for answer, finished, reward in zip(group.texts, group.finished, group.rewards, strict=True):
        ids = [*text.encode(answer), *([end] if finished else [])]
        if 0 < len(ids) <= trainer.max_completion_length:
            rows.append((prompt, ids, _unknown(ids), reward))
    rows = rows[:size]
    if len({reward for *_, reward in rows}) < 2:
        return []
    filler: _Row = (*rows[-1][:3], None)
    return [*rows, *[filler] * (size - len(rows))]


def _prompt_of(question: AskedQuestion, trainer: Any) -> list[int]:
    """Return a question's tokens as TRL makes them: by the model's chat template, or of a text to be continued."""
    is_chat = trainer.chat_template or _tokenizer_of(trainer).chat_template
    prompt = [dict(message) for message in question.messages] if is_chat else question.prompt
    (ids,), *_ = trainer._tokenize_prompts([prompt])
    return list(ids)


def _tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _unknown(ids: Sequence[int]) -> list[float]:
    return [math.nan] * len(ids)
