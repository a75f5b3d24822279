"""Engines: what generates rollouts, in one batched call from prompts to completions.

    hf              `transformers.generate`, with the very model that is being trained
    vllm            vLLM in a child process that is given the trainer's weights (`vllm_worker`)

To add one: write a class with the methods of `RolloutEngine`, and name it in `make_engine` and in `EngineConfig.kind`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from node.config import EngineConfig

if TYPE_CHECKING:
    from node.policy.load import Policy


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: softmax of logits over `temperature`, then the nucleus of mass `top_p`; no top-k.

    Temperature 0 takes the likeliest token, always (greedy).
    """

    temperature: float
    top_p: float
    max_completion_length: int

    @classmethod
    def from_config(cls, config: EngineConfig) -> "SamplingParams":
        """Take the sampling part of an engine's configuration."""
        return cls(config.temperature, config.top_p, config.max_completion_length)


@dataclass(frozen=True, slots=True)
class Generated:
    """One completion.

    `token_ids` end with an end-of-text token when `finished`, and `text` never shows it.
    `logprobs`, where the engine gives them, holds the log-probability in nats of each of
    `token_ids` under the temperature-scaled distribution before `top_p` cuts it: the
    quantity that the trainer computes for the same tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    logprobs: tuple[float, ...] | None = None


class RolloutEngine(Protocol):
    """Generates with the policy version that it was last given."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each of `prompts` (token ids), in the prompts' order.

        Leaves every global random state as it found it.

        Raises:
            NonFiniteError: the policy's logits are not finite.
        """
        ...

    def load(self, version: int) -> None:
        """Take the trainer's current weights as policy `version`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it generates no more."""
        ...


def make_engine(config: EngineConfig, policy: "Policy", folder: Path) -> RolloutEngine:
    """Return the engine that `config.kind` names, for a node whose state is in `folder`."""
    if config.kind == "hf":
        from node.engines.hf import HfEngine

        return HfEngine(policy)
    from node.engines.vllm import VllmEngine

    return VllmEngine(policy, config, folder)
