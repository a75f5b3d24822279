"""Rollouts by vLLM, in child processes that are given the trainer's weights before each round.

A child (`vllm_worker.py`) may have an interpreter and packages of its own: vLLM pins versions that a trainer need not
share. Weights go to it through shared memory, or adapters alone, and each hand-over is probed (`hand_over`). Nothing is
handed over when nothing has changed.

On the trainer's own GPU vLLM sleeps while the policy is trained, if both do not fit at once by the sum of memory
(`vllm_sleeps` in `node.policy.memory`). Otherwise it stays awake.

**Several engines** (data parallel): one on each GPU of `engine.placement`, or on as many as the model needs. With
several processes and no placement, one on the GPU of each. They share a batch (`spread`). The rules:

- An engine that failed once is started anew by the next `load`, or at once where no other is left. If it fails again
  before it has generated a part, it is left out for good, and a line says so. Without any engine, `EngineError`.
- An engine that does not compute with what it was given ends the node: others would soon do the same.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch

from node.config import EngineConfig
from node.engines import EngineError, Generated, SamplingParams
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
from node.engines.spread import Spread
from node.engines.vllm_worker import EXIT_NO_VLLM
from node.errors import UserError
from node.policy.detection import detect_machine, size_of
from node.policy.load import Policy
from node.policy.memory import VLLM_CPU_CACHE, cards_of, shares_card
from node.processes.machine import free_memory
from node.processes.threads import on_daemon
from node.processes.worker_process import Message, WorkerError, WorkerProcess

WORKER = Path(__file__).with_name("vllm_worker.py")
BFLOAT16 = (8, 0)  # the least compute capability of an NVIDIA GPU that has it; T4, V100 and RTX 20 have less
LESS = 0.8  # of its last part of a GPU, if it did not start for want of memory
OUT_OF_MEMORY = ("out of memory", "outofmemory", "is less than desired gpu memory utilization")
FAILURES = 2  # in a row, after which an engine is left out

log = structlog.get_logger()


def make(config: EngineConfig, policy: Policy, folder: Path, *, sleeps: bool = False) -> "VllmEngine":
    """Return the engine; `UserError` where a card will not do for it."""
    _check_cards(config.devices)
    return VllmEngine(policy, config, folder, sleeps=sleeps)


class VllmEngine(Spread["OneEngine"]):
    """Generates with one or several engines of vLLM. A child that dies is replaced by one with the same weights.

    Generation is deterministic in (weights, prompts, n, sampling, seed) as far as vLLM is:
    on a CPU, yes. `load` and `generate` raise `EngineError`, `NonFiniteError` and `WeightMismatchError`.

    Args:
        policy: whose weights are taken, and whose tokenizer reads the completions.
        config: the engine's part of the configuration.
        folder: the node's; the children's logs are kept in it, and the shape of the model.
        sleeps: during the update, which needs the memory.
        worker: the children's program.
    """

    def __init__(
        self, policy: Policy, config: EngineConfig, folder: Path, *, sleeps: bool = False, worker: Path = WORKER
    ) -> None:
        super().__init__(policy)
        self._config = config
        longest = min(config.longest, policy.positions or config.longest)
        self._model = folder / "vllm-model"
        self._probe_ids = probe_tokens(policy, longest)
        self._adapters = AdapterFolder(folder, in_memory=True) if adapters_of(policy) else None
        self._weights = None if self._adapters else SharedWeights(DTYPE)
        self._hand_overs = 0
        self._wanted: HandOver | None = None  # the weights to generate with, which lie ready
        self._sleeps = sleeps
        self._on_own_cards = not shares_card(config)
        size = size_of(policy.model.num_parameters(), policy.model.config)
        places = cards_of(size, config, detect_machine(policy.model.device.type))
        threads = max(1, torch.get_num_threads() // len(places))
        start: Message = {
            "call": "start",
            "model": self._source(),
            "lora_rank": max((adapter.r for adapter in adapters_of(policy).values()), default=0),
            "dtype": DTYPE,
            "max_model_len": longest,
            "cpu_cache_bytes": VLLM_CPU_CACHE,
            "sleeps": self._sleeps,
        }
        self._engines = [
            OneEngine(config, cards, start, folder / f"vllm{f'-{number}' * (number > 0)}.log", worker, threads)
            for number, cards in enumerate(places)
        ]

    @property
    def restarts(self) -> int:
        """How often a child died and was replaced."""
        return sum(engine.restarts for engine in self._engines)

    def load(self, version: int) -> None:
        """Give the trainer's weights to each child, started if need be, and check that they arrived.

        A child that is to replace one on GPUs of its own starts meanwhile, and is not waited for.
        """
        wanted = self._prepare(version)
        for _ in range(FAILURES):
            left = self._left()
            if any(engine.lives for engine in left) and self._on_own_cards:
                for engine in left:
                    engine.begin_start()
                left = [engine for engine in left if not engine.starting]
            self._use_each(left, lambda engine: engine.take(wanted))
            if any(engine.lives for engine in left):
                return

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        if self._wanted is None:
            self.load(0)
        return self._generate(len(self._engines), prompts, n, sampling, seed)

    def rest(self) -> None:
        """Let children on the trainer's GPUs sleep, until they are given weights again."""
        if self._sleeps:
            self._use_each([engine for engine in self._engines if engine.lives], OneEngine.rest)

    def close(self) -> None:
        """End the children, and give back what was shared with them."""
        for engine in self._engines:
            engine.close()
        if self._adapters is not None:
            self._adapters.close()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _left(self) -> list["OneEngine"]:
        left = [engine for engine in self._engines if engine.failures < FAILURES]
        if not left:
            raise EngineError("no engine of vLLM is left: start the node again")
        return left

    def _use_each(self, engines: Sequence["OneEngine"], use: Callable[["OneEngine"], None]) -> None:
        """Use these engines at the same time; note which fail, and raise what is no failure of one alone."""
        uses = [(engine, on_daemon(partial(use, engine), "vllm")) for engine in engines]
        errors = [(engine, use.exception()) for engine, use in uses]
        for engine, error in errors:
            if isinstance(error, WorkerError | EngineError):
                self._note(engine, error)
            elif error is not None:
                raise error

    def _note(self, engine: "OneEngine", error: WorkerError | EngineError) -> None:
        """Have an engine that failed replaced, or leave it out if that is the second time in a row.

        Raises:
            EngineError: it was the last one, and ended twice or did not start.
        """
        engine.end()
        engine.failures += 1
        others = any(other.failures < FAILURES for other in self._engines if other is not engine)
        if isinstance(error, EngineError) and not others:
            raise error
        if engine.failures < FAILURES:
            engine.restarts += 1
            log.warning("vllm restarts", reason=str(error), **engine.place)
        elif others:
            log.warning("vllm is left out until the node starts again", reason=str(error), **engine.place)
        else:
            raise EngineError(f"vLLM ended twice in a row: {error}") from error

    def _ask(self, engine: "OneEngine", part: Message) -> Message:
        assert self._wanted is not None
        return engine.generate(part, self._wanted)

    def _prepare(self, version: int) -> "HandOver":
        """Put the policy's weights where children find them, if they have changed: one reads them when it starts."""
        if self._wanted is not None and digest(self._policy) == self._wanted.digest:
            return self._wanted
        self._hand_overs += 1
        expected = expected_probe(self._policy, self._probe_ids)
        source = self._weights or self._adapters
        assert source is not None
        if isinstance(source, AdapterFolder):
            message: Message = {"call": "adapt", "folder": str(source.write(self._policy)), "number": self._hand_overs}
        else:
            message = {"call": "load", **source.write(self._policy)}
        self._wanted = HandOver(digest(self._policy), message, self._probe_ids, expected, source.checksum, version)
        return self._wanted

    def _source(self) -> str:
        """Return the model to start with: the base of adapters, or a folder with nothing but the model's shape."""
        if self._adapters is not None:
            return self._policy.source
        self._model.mkdir(exist_ok=True)
        self._policy.model.config.save_pretrained(self._model)
        return str(self._model)


class HandOver(NamedTuple):
    """Weights, or adapters, that lie ready for children."""

    digest: tuple[float, ...]
    message: Message  # tells a child where they lie
    probe: list[int]  # a text in tokens
    expected: list[float]  # what a child should say of it
    checksum: Checksum
    version: int


class OneEngine:
    """An engine of vLLM: a child on some GPUs, asked one thing at a time.

    Each method raises `WorkerError` if the child ends or falls silent.

    Args:
        config: of all engines.
        cards: its GPUs by number; none for the trainer's own.
        start: the request that starts it; what depends on its GPUs is added.
        log_file: the child's.
        worker: the child's program.
        threads: of a child without a GPU.

    Attributes:
        place: what the log calls it.
        restarts: how often its child failed and was to be replaced.
        failures: how often in a row.
    """

    def __init__(
        self, config: EngineConfig, cards: Sequence[int], start: Message, log_file: Path, worker: Path, threads: int
    ) -> None:
        self.place: Mapping[str, Any] = {"gpus": list(cards)} if cards else {}
        self.restarts = 0
        self.failures = 0
        self._config = config
        self._cards = cards
        self._request = start | {"tensor_parallel_size": max(1, len(cards))}
        self._log = log_file
        self._log.unlink(missing_ok=True)
        self._worker = worker
        self._threads = threads
        self._share = config.vllm.gpu_memory_utilization
        self._child: WorkerProcess | None = None
        self._start: Future[None] | None = None  # which nobody waits for yet
        self._is_up = False
        self._closed = False
        self._sleeps = False  # the child can
        self._asleep = False
        self._receipts = Receipts()
        self._held: list[Checksum] = []  # what the child's processes hold
        self._given: tuple[float, ...] = ()  # digest of the weights that the child has

    @property
    def lives(self) -> bool:
        """Whether its child has started, and has not failed since."""
        return self._is_up

    @property
    def starting(self) -> bool:
        """Whether its child starts by `begin_start`, which has not ended."""
        return self._start is not None and not self._start.done()

    def begin_start(self) -> None:
        """Start a child, if there is none, without waiting for it; `take` raises what went wrong."""
        if not self._is_up and self._start is None:
            self._start = on_daemon(self._start_child, "vllm")

    def take(self, wanted: HandOver) -> None:
        """Have the child compute with these weights; start it if need be.

        Raises:
            EngineError: it does not start.
            WeightMismatchError: it has other weights.
        """
        if self._start is not None:
            begun, self._start = self._start, None
            begun.result()
        if not self._is_up or self._asleep:
            free_memory()  # torch keeps what the update took of the GPU, and now vLLM is to have it
        if not self._is_up:
            self._start_child()
        if self._given == wanted.digest and not self._asleep:
            return
        self._call(wanted.message)
        before, self._held = self._held, self._call({"call": "held"})["checksums"]
        theirs = self._call({"call": "score", "tokens": wanted.probe})["logprobs"]
        error = check_probe(wanted.expected, theirs, wanted.version)
        self._receipts.check(wanted.checksum, before, self._held, wanted.version)
        log.debug("vllm probed", version=wanted.version, error=error, **self.place)
        self._given, self._asleep = wanted.digest, False

    def generate(self, part: Message, wanted: HandOver) -> Message:
        """Return the child's reply to a request for completions by these weights; raise as `take` does."""
        self.take(wanted)
        reply = self._call(part)
        self.failures = 0
        return reply

    def rest(self) -> None:
        """Let the child sleep, until it is given weights again."""
        if self._sleeps and not self._asleep:
            self._call({"call": "rest"})
            self._asleep = True

    def end(self) -> None:
        """End the child, even while it is asked: that fails."""
        self._is_up, self._start = False, None
        if self._child is not None:
            self._child.kill()

    def close(self) -> None:
        """End the child for good, even while it starts."""
        self._closed = True
        self.end()

    def _call(self, request: Message) -> Message:
        assert self._child is not None
        return self._child.call(request, self._config.timeout)

    def _start_child(self) -> None:
        """Start a child with vLLM in it; on a GPU that is too full, with less and less of it."""
        while True:
            before = self._log.stat().st_size if self._log.exists() else 0
            try:
                self._start_once()
                break
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
        self._given, self._asleep = (), False
        self._held = self._call({"call": "held"})["checksums"]
        self._is_up = True

    def _start_once(self) -> None:
        python = self._config.vllm.python or sys.executable
        command, environment = [python, "-P", str(self._worker)], _environment(self._cards, self._threads)
        try:
            self._child = child = WorkerProcess(command, environment, self._log)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(CANNOT_RUN.format(python=python, reason=error.strerror)) from None
        if self._closed:
            child.kill()
        try:
            about = self._call(self._request | {"gpu_memory_utilization": self._share})
        except WorkerError as error:
            if error.status == EXIT_NO_VLLM:
                raise UserError(no_vllm(python)) from None
            raise
        self._sleeps = about["sleeps"]
        log.info("vllm started", pid=child.pid, **about, **self.place)


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


def _environment(devices: Sequence[int] = (), threads: int = 0) -> dict[str, str]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in the child itself: one process to end
        "HF_HUB_OFFLINE": "1",  # the model is here
        "PYTHONUNBUFFERED": "1",  # so that the log has the last words
        # On a CPU: as many threads as the node has itself, and not bound to cores, where every
        # node on the machine would choose the same ones.
        "OMP_NUM_THREADS": str(threads or torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[number] if number < len(visible) and visible[0] else str(number) for number in devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment
