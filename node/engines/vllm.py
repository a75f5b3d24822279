"""Rollouts by vLLM, in a child process that is given the trainer's weights before each round.

The child (`vllm_worker.py`) may have an interpreter and packages of its own: vLLM pins versions that a trainer need not
share. Weights go to it through shared memory, or adapters alone, and each hand-over is probed (`hand_over`). Nothing is
handed over when nothing has changed.

On the trainer's own GPU the two take turns: vLLM sleeps while the policy is trained. It stays awake on other GPUs, and
where it generates ahead.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from node.config import EngineConfig
from node.engines import EngineError, Generated, SamplingParams, seed_of_prompt
from node.engines.hand_over import (
    DTYPE,
    AdapterFolder,
    Checksum,
    Receipts,
    SharedWeights,
    adapters_of,
    check_probe,
    digest,
    expected_probe,
    probe_tokens,
)
from node.engines.missing import CANNOT_RUN, no_vllm
from node.engines.vllm_worker import EXIT_NO_VLLM
from node.errors import UserError
from node.policy.load import Policy
from node.policy.memory import VLLM_CPU_CACHE, vllm_sleeps
from node.processes.machine import free_memory
from node.processes.worker_process import Message, WorkerError, WorkerProcess

WORKER = Path(__file__).with_name("vllm_worker.py")
BFLOAT16 = (8, 0)  # the least compute capability of an NVIDIA GPU that has it; T4, V100 and RTX 20 have less
LESS = 0.8  # of its last part of a GPU, if it did not start for want of memory
OUT_OF_MEMORY = ("out of memory", "outofmemory", "is less than desired gpu memory utilization")

log = structlog.get_logger()
T = TypeVar("T")


def make(config: EngineConfig, policy: Policy, folder: Path) -> "VllmEngine":
    """Return the engine; `UserError` where a card will not do for it."""
    _check_cards(config.devices)
    return VllmEngine(policy, config, folder)


class VllmEngine:
    """Generates with vLLM. A child that dies is replaced by one with the same weights, but not twice in a row.

    Generation is deterministic in (weights, prompts, n, sampling, seed) as far as vLLM is:
    on a CPU, yes. `load` and `generate` raise `EngineError`, `NonFiniteError` and `WeightMismatchError`.

    Args:
        policy: whose weights are taken, and whose tokenizer reads the completions.
        config: the engine's part of the configuration.
        folder: the node's; the child's log is kept in it, and the shape of the model.
        worker: the child's program.

    Attributes:
        restarts: how often a child died and was replaced.
    """

    def __init__(self, policy: Policy, config: EngineConfig, folder: Path, *, worker: Path = WORKER) -> None:
        self.restarts = 0
        self._policy = policy
        self._config = config
        self._settings = config.vllm
        self._max_model_len = min(config.longest, policy.positions or config.longest)
        self._worker = worker
        self._log = folder / "vllm.log"
        self._log.unlink(missing_ok=True)
        self._model = folder / "vllm-model"
        self._share = config.vllm.gpu_memory_utilization
        self._probe_ids = probe_tokens(policy, self._max_model_len)
        self._adapters = AdapterFolder(folder, in_memory=True) if adapters_of(policy) else None
        self._weights = None if self._adapters else SharedWeights(DTYPE)
        self._hand_overs = 0
        self._receipts = Receipts()
        self._held: list[Checksum] = []  # what the child's processes hold
        self._version = 0
        self._wanted: tuple[float, ...] = ()  # digest of the weights to generate with, which lie ready
        self._ready_message: Message = {}  # which tells a child where they lie
        self._expected: list[float] = []  # what it should say of the probe
        self._given: tuple[float, ...] = ()  # digest of the weights that the child has
        self._sleeps = False  # the child shares the trainer's GPU
        self._asleep = False
        self._child: WorkerProcess | None = None

    def load(self, version: int) -> None:
        """Give the trainer's weights to the child, started if need be, and check that they arrived."""
        self._version = version
        self._prepare()
        self._with_child(lambda _: None)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        if not self._wanted:
            self._prepare()
        request: Message = {
            "call": "generate",
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": [seed_of_prompt(seed, at) for at in range(len(prompts))],
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_completion_length,
            "stop": list(self._policy.eos_token_ids),
            "logprobs": sampling.top_p == 1,  # else vLLM's are of the nucleus: another quantity than the trainer's
        }
        reply = self._with_child(lambda child: child.call(request, self._config.timeout))
        return [[self._read(*one) for one in group] for group in reply["completions"]]

    def rest(self) -> None:
        """Let a child on the trainer's GPU sleep, until it is given weights again."""
        if self._child is None or not self._sleeps:
            return
        try:
            self._child.call({"call": "rest"}, self._config.timeout)
            self._asleep = True
        except WorkerError as error:  # the next round starts another
            log.warning("vllm ended", reason=str(error))
            self._child = None

    def close(self) -> None:
        """End the child, and give back what was shared with it."""
        self._end_child()
        if self._adapters is not None:
            self._adapters.close()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _end_child(self) -> None:
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
            self._end_child()
        try:
            return use(self._ready())
        except WorkerError as error:
            self._end_child()
            raise EngineError(f"vLLM ended twice in a row: {error}") from error

    def _ready(self) -> WorkerProcess:
        """Return a child that has the current weights."""
        if self._child is None or self._asleep:
            free_memory()  # torch keeps what the update took of the GPU, and now vLLM is to have it
        if self._child is None:
            self._child, self._given, self._asleep = self._start(), (), False
            self._held = self._child.call({"call": "held"}, self._config.timeout)["checksums"]
        if self._given != self._wanted or self._asleep:
            self._hand_over(self._child)
        return self._child

    def _prepare(self) -> None:
        """Put the policy's weights where a child finds them, if they have changed: it reads them whenever it starts."""
        if (now := digest(self._policy)) == self._wanted:
            return
        self._hand_overs += 1
        self._expected = expected_probe(self._policy, self._probe_ids)
        if self._adapters is not None:
            folder = self._adapters.write(self._policy)
            self._ready_message = {"call": "adapt", "folder": str(folder), "number": self._hand_overs}
        if self._weights is not None:
            self._ready_message = {"call": "load", **self._weights.write(self._policy)}
        self._wanted = now

    def _hand_over(self, child: WorkerProcess) -> None:
        source = self._weights or self._adapters
        assert source is not None
        child.call(self._ready_message, self._config.timeout)
        before, self._held = self._held, child.call({"call": "held"}, self._config.timeout)["checksums"]
        theirs = child.call({"call": "score", "tokens": self._probe_ids}, self._config.timeout)["logprobs"]
        try:
            error = check_probe(self._expected, theirs, self._version)
            self._receipts.check(source.checksum, before, self._held, self._version)
        except BaseException:
            self._end_child()
            raise
        log.debug("vllm probed", version=self._version, error=error)
        self._given, self._asleep = self._wanted, False

    def _start(self) -> WorkerProcess:
        """Return a child with vLLM in it; on a GPU that is too full, with less and less of it."""
        while True:
            before = self._log.stat().st_size if self._log.exists() else 0
            try:
                return self._start_once()
            except WorkerError as error:
                said = self._log.read_bytes()[before:].decode(errors="replace").lower()
                if not any(words in said for words in OUT_OF_MEMORY) or self._share * LESS < 0.1:
                    raise EngineError(f"vLLM did not start: {error}") from error
                self._share = round(self._share * LESS, 3)
                log.warning(
                    "vllm starts again with less memory",
                    set=f"engine.vllm.gpu_memory_utilization={self._share:g}",
                    reason=str(error),
                )

    def _start_once(self) -> WorkerProcess:
        settings, devices = self._settings, self._config.devices
        python = settings.python or sys.executable
        try:
            child = WorkerProcess([python, "-P", str(self._worker)], _environment(devices), self._log)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(CANNOT_RUN.format(python=python, reason=error.strerror)) from None
        try:
            request = {
                "call": "start",
                "model": self._source(),
                "lora_rank": max((one.r for one in adapters_of(self._policy).values()), default=0),
                "dtype": DTYPE,
                "max_model_len": self._max_model_len,
                "tensor_parallel_size": max(1, len(devices)),
                "gpu_memory_utilization": self._share,
                "cpu_cache_bytes": VLLM_CPU_CACHE,
                "sleeps": vllm_sleeps(self._config),
            }
            about = child.call(request, self._config.timeout)
        except WorkerError as error:
            if error.status == EXIT_NO_VLLM:
                raise UserError(no_vllm(python)) from None
            raise
        except BaseException:
            child.kill()
            raise
        self._sleeps = about["sleeps"]
        log.info("vllm started", pid=child.pid, version=self._version, **about)
        return child

    def _source(self) -> str:
        """Return the model to start with: the base of adapters, or a folder with nothing but the model's shape."""
        if self._adapters is not None:
            return self._policy.source
        self._model.mkdir(exist_ok=True)
        self._policy.model.config.save_pretrained(self._model)
        return str(self._model)


def _check_cards(devices: Sequence[int]) -> None:
    """Raise `UserError` for a card that cannot compute in `DTYPE`, in which vLLM is started."""
    count = torch.cuda.device_count()
    for number in devices or range(min(count, 1)):
        capability = torch.cuda.get_device_capability(number) if number < count else BFLOAT16
        if capability < BFLOAT16:
            raise UserError(
                f"vLLM computes in bfloat16 here, which GPU {number} lacks ({torch.cuda.get_device_name(number)}, "
                f"compute capability {capability[0]}.{capability[1]}): set engine.kind='hf'"
            )


def _environment(devices: Sequence[int] = ()) -> dict[str, str]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in the child itself: one process to end
        "HF_HUB_OFFLINE": "1",  # the model is here
        "PYTHONUNBUFFERED": "1",  # so that the log has the last words
        # On a CPU: as many threads as the node has itself, and not bound to cores, where every
        # node on the machine would choose the same ones.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[number] if number < len(visible) and visible[0] else str(number) for number in devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment
