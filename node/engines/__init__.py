"""Engines: what generates rollouts, in one batched call from prompts to completions.

    hf              transformers, with the very model that is being trained
    vllm            vLLM in a child process (`vllm_worker`), on the trainer's GPU or on others
    server          vLLM's own server, anywhere
    episodes        turns on any of them, from questions to whole episodes
    ahead           one of these on a thread of its own, so that a round is generated while another trains
    hand_over       how weights and adapters get into another process, and the probe that tells whether they arrived

    missing         what has to be installed, set or started before one of them can start

To add an engine: write a module with an `EngineKind` and a `RolloutEngine`. Give it a line above and in `kind_of`, and
its name to `EngineConfig.kind` in node/config.py. Where something has to be installed for it, `missing` says so.

Presets, doctor, evaluations and the laboratory ask nothing else of an engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from node.config import EngineConfig, NodeConfig
from node.errors import PassingError
from node.tasks import derive_seed

if TYPE_CHECKING:
    from node.policy.load import Policy
    from node.policy.memory import Machine, MemoryPart, ModelSize

BY_PREFERENCE = ("vllm", "hf")  # engines that a preset may choose, the best first


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

    def as_list(self) -> list[Any]:
        """Return it as the list that `from_list` takes, for a file."""
        return [self.token_ids, self.text, self.finished, self.logprobs]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> "Generated":
        """Return the completion that `as_list` made a list of."""
        token_ids, text, finished, logprobs = values
        return cls(tuple(token_ids), text, finished, None if logprobs is None else tuple(logprobs))


class EngineError(PassingError):
    """An engine cannot be started, or failed twice in a row."""


class RolloutEngine(Protocol):
    """Generates with the policy version that it was last given."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each of `prompts` (token ids), in the prompts' order.

        Leaves every global random state as it found it.

        Raises:
            NonFiniteError: the policy's logits are not finite.
            EngineError: it failed, and was tried again.
        """
        ...

    def load(self, version: int) -> None:
        """Take the trainer's current weights as policy `version`; costs nothing where they have not changed."""
        ...

    def rest(self) -> None:
        """Leave the device's memory to the update, until the next `load`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it generates no more."""
        ...


class DeviceShare(NamedTuple):
    """An engine's share of the device that trains, in bytes."""

    generating: int  # while it generates
    resting: int  # while the policy is trained


class EngineKind(ABC):
    """An engine before it runs: what presets, doctor and the laboratory ask of it. Each engine's module has one."""

    @abstractmethod
    def make(self, config: EngineConfig, policy: "Policy", folder: Path) -> RolloutEngine:
        """Return the engine, for a node whose state is in `folder`."""

    def memory(self, size: "ModelSize", config: NodeConfig, width: int, gpu_memory: int) -> "list[MemoryPart]":
        """Return what it takes of the memory of the device that trains: here nothing.

        Args:
            size: of the policy's model.
            config: of the node.
            width: bytes of a number in the key-value cache.
            gpu_memory: of the GPU that trains, in bytes; 0 for a processor.
        """
        return []

    def device_share(self, size: "ModelSize", machine: "Machine", config: EngineConfig) -> DeviceShare | None:
        """Return what it takes beside the trainer on this machine: here nothing. None if it is not worth it there."""
        return DeviceShare(0, 0)

    def holds(self, size: "ModelSize", machine: "Machine", left: int, rows: int, tokens: int) -> bool:
        """Tell whether it gets through `rows` completions of so many `tokens` each, prompts included: here yes.

        Args:
            size: of the policy's model.
            machine: one node's part of it.
            left: bytes of the device that the weights leave.
            rows: completions of a round.
            tokens: of each of them, prompt and all.
        """
        return True

    def settings(self, machine: "Machine", config: EngineConfig, resident: int) -> dict[str, tuple[Any, str]]:
        """Return the settings, by dotted key, that it wants there, each with its reason: here none.

        Args:
            machine: one node's part of it.
            config: of the engine, as far as a person set it.
            resident: bytes that the trainer holds while the engine generates; with `ahead`, in its update.
        """
        return {}


def seed_of_prompt(seed: int, at: int) -> int:
    """Return the seed from which vLLM draws for prompt number `at` of a batch.

    It takes the next ones for further completions of the prompt, so those of two prompts are far apart.
    """
    return derive_seed(seed, at) >> 1  # vLLM's are of 63 bits, with those that follow


def kind_of(name: str) -> EngineKind:
    """Return the engine of this name."""
    from node.engines import hf, server, vllm

    kinds: dict[str, type[EngineKind]] = {"hf": hf.HfKind, "vllm": vllm.VllmKind, "server": server.ServerKind}
    return kinds[name]()


def in_process(policy: "Policy") -> RolloutEngine:
    """Return the engine that needs nothing but the model: for a chat, an evaluation, the laboratory."""
    return kind_of("hf").make(EngineConfig(), policy, Path())


def make_engine(config: EngineConfig, policy: "Policy", folder: Path) -> RolloutEngine:
    """Return the engine that `config.kind` names, for a node whose state is in `folder`."""
    engine = kind_of(config.kind).make(config, policy, folder)
    if config.ahead:
        from node.engines.ahead import Ahead

        return Ahead(engine)
    return engine
