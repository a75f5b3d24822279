"""Rollouts by transformers in each process of a node (`--processes N`): each generates its part of a batch.

Number 0, the node, spreads a batch as it does over several engines of vLLM (`spread`). It asks the others through their
channels (`node.processes.worker_process`). Another process answers on a thread of its own (`answer_all`): its main
thread waits meanwhile for the next round. With `engine.ahead` it generates by a copy of the weights while it trains.

A prompt has the same seed whichever process has it, so the batch is that of one process up to rounding, and with
continuous batching up to chance.

A process that dies, or is late, ends the node: it would be missing in the update. Other processes generate nothing

    under FSDP2                 each has only a part of the weights
    with weights from peers     these come to number 0, and to the others at the update
    by a launcher               number 0 has no channel to them
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from node.engines import EngineError, Generated, SamplingParams
from node.engines.hf import HfEngine
from node.engines.spread import Spread
from node.errors import AGAIN, NonFiniteError, UserError
from node.policy.load import Policy
from node.processes.threads import on_daemon
from node.processes.worker_process import Message, Requests, WorkerError, WorkerProcess


class ProcessEngine(Spread["RankEngine"]):
    """Generates in all processes of a node.

    Args:
        policy: number 0's.
        own: the engine of number 0.
        others: the other processes, from number 1 on.
        timeout: seconds that one of them may take for an answer.
    """

    def __init__(self, policy: Policy, own: HfEngine, others: Sequence[WorkerProcess], timeout: float) -> None:
        super().__init__(policy)
        self._own = own
        self._places = [
            RankEngine(0, partial(answer, own)),
            *(OtherRank(at, one, timeout) for at, one in enumerate(others, 1)),
        ]

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        return self._generate(len(self._places), prompts, n, sampling, seed)

    def load(self, version: int) -> None:
        """Bring the copies of all processes up to date, where they have them."""
        self._tell("load")

    def rest(self) -> None:
        """Have all processes give the memory back that torch keeps for the next generation."""
        self._tell("rest")

    def close(self) -> None:
        """End a batch in work here; the other processes end with the node."""
        self._own.close()

    def _tell(self, call: str) -> None:
        told = [(place, on_daemon(partial(place.ask, {"call": call}), "engine")) for place in self._places]
        for place, answered in told:
            if isinstance(error := answered.exception(), WorkerError):
                self._note(place, error)
            answered.result()

    def _left(self) -> Sequence["RankEngine"]:
        return self._places

    def _ask(self, engine: "RankEngine", part: Message) -> Message:
        return engine.ask(part)

    def _note(self, engine: "RankEngine", error: WorkerError | EngineError) -> None:
        if isinstance(error, EngineError):  # number 0's own
            raise error
        number = engine.place["process"]
        raise EngineError(f"process {number} of this node has died ({error}): {AGAIN}") from error


class RankEngine:
    """A process that generates: number 0 itself.

    Attributes:
        place: what the log calls it.
        ask: returns the answer to a request.
    """

    lives, starting = True, False

    def __init__(self, number: int, ask: Any) -> None:
        self.place: Mapping[str, Any] = {"process": number}
        self.ask = ask

    def end(self) -> None:
        """Do nothing: number 0 is waited for, as it is when it is alone."""


class OtherRank(RankEngine):
    """Another process.

    Its `ask` raises `WorkerError` if the process ends or falls silent, `NonFiniteError` for logits that are not finite,
    and `UserError` where its memory does not suffice for one completion.
    """

    def __init__(self, number: int, process: WorkerProcess, timeout: float) -> None:
        super().__init__(number, self._call)
        self._process = process
        self._timeout = timeout

    def end(self) -> None:
        """End the process."""
        self._process.kill()

    def _call(self, request: Message) -> Message:
        reply = self._process.call(request, self._timeout)
        if "error" not in reply:
            return reply
        raise UserError(reply["error"]) if reply["error"] else NonFiniteError


def answer_all(requests: Requests, engine: HfEngine, device: torch.device) -> None:
    """Answer number 0's requests until it is gone."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has one of its own
    while True:
        try:
            request = requests.receive()
        except EOFError:
            return
        try:
            reply = answer(engine, request)
        except NonFiniteError:
            reply = {"error": ""}
        except UserError as error:
            reply = {"error": str(error)}
        requests.reply(reply)


def answer(engine: HfEngine, request: Message) -> Message:
    """Do what a request asks of this process's engine."""
    if request["call"] == "load":
        engine.load(0)
    elif request["call"] == "rest":
        engine.rest()
    else:
        sampling = SamplingParams(request["temperature"], request["top_p"], request["max_tokens"])
        made = engine.generate_from(request["seeds"], request["prompts"], request["n"], sampling)
        return {
            "completions": [[[completion.token_ids, completion.logprobs] for completion in group] for group in made]
        }
    return {}
