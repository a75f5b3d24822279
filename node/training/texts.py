"""Questions and texts as tokens of the local policy, and what has no room there."""

from collections.abc import Iterable, Sequence

import structlog

from node.config import EngineConfig
from node.errors import UserError
from node.policy.load import Policy
from node.rollouts.group import EncodedGroup, Episode, Tokens
from node.tasks import Item
from node.tasks.environments.episodes import start_of
from node.tasks.task_set import TaskSet

ROWS_MEASURED = 4096  # of a task, before training: some seconds' work
TOOLS_LEFT_OUT = "; an environment's option tell = false leaves its tools out"

log = structlog.get_logger()


class PolicyTexts:
    """Encodes for a policy, within the bounds of the configuration.

    Args:
        policy: that is asked, and trained.
        engine: the bounds on a prompt and on a completion, in tokens.
        tasks: that are asked.

    Attributes:
        longest_prompt: tokens that a prompt may have.
        encode_observation: returns the tokens of an environment's text.
        turn_end: the token that closes peers' turns, in the round in progress.
    """

    def __init__(self, policy: Policy, engine: EngineConfig, tasks: TaskSet) -> None:
        self._policy = policy
        self._engine = engine
        self._tasks = tasks
        self.longest_prompt = engine.longest_prompt(policy.positions)
        self.encode_observation = policy.observations(chats=any(map(start_of, tasks.tasks)))
        self.turn_end = policy.turn_end()
        # Characters that fit a completion if each token is the longest there is: more are not worth encoding.
        self._longest_text = engine.max_completion_length * max(map(len, policy.tokenizer.get_vocab()))

    def encode_prompt(self, item: Item) -> list[int] | None:
        """Return the tokens that ask an item; None if they are too many."""
        prompt = self._policy.encode_prompt(item)
        return prompt if len(prompt) <= self.longest_prompt else None

    def encode(self, prompt: Sequence[int], episode: Episode) -> Tokens | None:
        """Return a peer's episode as tokens; None if a turn, or its prompt, is longer than an own one may be.

        It is not truncated: that would not be the text that was scored.
        """
        if any(len(text) > self._longest_text for text in episode.texts[::2]):
            return None
        turns = self._turns(episode)
        before = len(prompt) + sum(map(len, turns[:-1]))
        is_longer = before > max(self.longest_prompt, len(prompt)) or any(
            len(turn) > self._engine.max_completion_length for turn in turns[::2]
        )
        return None if is_longer else Tokens.of(turns)

    def are_retokenized(self, own: Iterable[EncodedGroup]) -> list[bool]:
        """Tell of each own completion whether its texts, which are all that peers get, stand for other tokens."""
        return [
            Tokens.of(self._turns(encoded.group.completions[index])).ids != tuple(tokens.ids)
            for encoded in own
            for index, tokens in encoded.completions.items()
        ]

    def _turns(self, episode: Episode) -> list[list[int]]:
        """Return the tokens of each text of an episode."""
        last = len(episode.texts) - 1
        return [
            self.encode_observation(text)
            if at % 2
            else self._policy.encode_completion(text, episode.finished or at < last, self.turn_end)
            for at, text in enumerate(episode.texts)
        ]

    def no_question(self) -> UserError:
        """Return what to say where no question fits."""
        has_tools = any(task.make(0).tools for task in self._tasks.tasks)
        return UserError(
            f"no question to train on is found: too many exceed {self.longest_prompt} tokens (raise "
            "engine.max_prompt_length if the policy has room"
            + (TOOLS_LEFT_OUT if has_tools else "")
            + "), or all are held out for evaluation"
        )

    def check_rows(self) -> None:
        """Tell the log how the rows of each task are split, and how many are too long to be asked.

        Of more than `ROWS_MEASURED` rows, as many are drawn and measured.

        Raises:
            UserError: most of a task's rows are too long.
        """
        for task, training, held_out, items in self._tasks.rows(ROWS_MEASURED):
            log.info("rows", task=task.key.name, for_training=training, held_out_for_evaluation=held_out)
            asked = list(items)
            lengths = [len(self._policy.encode_prompt(item)) for item in asked]
            too_long = sum(length > self.longest_prompt for length in lengths)
            if too_long:
                line = (
                    f"task {task.key.name!r}: the prompts of {too_long} of {len(lengths)} rows have more than "
                    f"{self.longest_prompt} tokens and are not asked: {self._remedy(max(lengths))}"
                    + (TOOLS_LEFT_OUT if any(item.tools for item in asked) else "")
                )
                if 2 * too_long > len(lengths):
                    raise UserError(line)
                log.warning(line)

    def _remedy(self, longest: int) -> str:
        """Return how to have prompts of `longest` tokens asked."""
        engine, positions = self._engine, self._policy.positions
        if positions is None or longest + engine.max_completion_length <= positions:
            return f"set engine.max_prompt_length={longest} to ask all"
        return (
            f"the longest has {longest}, and engine.max_completion_length={engine.max_completion_length} leaves "
            f"{positions - engine.max_completion_length} of the policy's {positions} positions: set "
            "engine.max_prompt_length and engine.max_completion_length to fit, or shorten the rows"
        )
