"""Engines: what generates rollouts, in one batched call from prompts to completions.

    hf              transformers, with the very model that is being trained
    processes       that, in each process of a node
    vllm            vLLM in a child process (`vllm_worker`), on the trainer's GPU or on others
    server          vLLM's own server, anywhere
    spread          a batch over several engines of vLLM, or over several processes
    episodes        turns on any of them, from questions to whole episodes
    ahead           one of these on a thread of its own, so that a round is generated while another trains
    hand_over       how weights and adapters get into another process, and the probe that tells whether they arrived

    missing         what has to be installed, set or started before one of them can start

To add an engine: write a module with a `RolloutEngine` and a function `make`. Give it a line above and in
`make_engine`, and its name to `EngineConfig.kind` in node/config.py. Where something has to be installed for it,
`missing` says so. What it holds of the trainer's memory is a row of `node.policy.memory`, where a kind that is neither
"hf" nor "vllm" holds none. Presets choose between these two alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from node.config import EngineConfig
from node.errors import PassingError
from node.tasks import derive_seed

if TYPE_CHECKING:
    from node.policy.load import Policy
    from node.processes.worker_process import WorkerProcess


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


MakeEngine = Callable[[EngineConfig, "Policy", Path], RolloutEngine]
"""Returns an engine, for a node whose state is in a folder."""


def seed_of_prompt(seed: int, at: int) -> int:
    """Return the seed from which an engine draws for prompt number `at` of a batch.

    It takes the next ones for further completions of the prompt, so those of two prompts are far apart.
    """
    return derive_seed(seed, at) >> 1  # vLLM's are of 63 bits, with those that follow


def seeds_of_rows(seeds: Sequence[int], n: int) -> list[int]:
    """Return the seed of each of the `n` completions of each prompt, from the prompts' seeds."""
    return [seed + number for seed in seeds for number in range(n)]


def in_process(policy: "Policy") -> RolloutEngine:
    """Return the engine that needs nothing but the model: for a chat, an evaluation, the laboratory."""
    return make_engine(EngineConfig(), policy, Path())


def make_engine(
    config: EngineConfig,
    policy: "Policy",
    folder: Path,
    *,
    sleeps: bool = False,
    others: Sequence["WorkerProcess"] = (),
) -> RolloutEngine:
    """Return the engine that `config.kind` names, for a node whose state is in `folder`.

    With `sleeps` the update needs the memory that vLLM has on its GPUs. The `others` are the node's other processes,
    if each of them is to generate with transformers, too.

    Raises:
        UserError: a card will not do for it.
    """
    from node.engines import hf, server, vllm

    made: Mapping[str, MakeEngine] = {"hf": hf.make, "vllm": partial(vllm.make, sleeps=sleeps), "server": server.make}
    engine: RolloutEngine
    if others:
        from node.engines.processes import ProcessEngine

        engine = ProcessEngine(policy, hf.make(config, policy, folder), others, config.timeout)
    else:
        engine = made[config.kind](config, policy, folder)
    if config.ahead:
        from node.engines.ahead import Ahead

        return Ahead(engine)
    return engine
