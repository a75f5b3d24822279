"""The next round is generated while this one trains: an engine on a thread of its own.

Each call to the engine below is made on that thread, one after another, so that new weights wait for the batch that the
old ones generate. What was begun is asked for like any other batch, by the same prompts and seed.
"""

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from node.engines import Generated, RolloutEngine, SamplingParams

FILE = "ahead.json"  # in a checkpoint: the batch that was begun before it

T = TypeVar("T")
Groups = list[list[Generated]]


class Ahead:
    """An engine that can begin a batch and answer for it later.

    Args:
        engine: that generates; it has a copy of the weights of its own.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._begun: tuple[int, Future[Groups]] | None = None
        # A daemon: a node that gives up a round does not wait for it.
        threading.Thread(target=self._work, name="generation", daemon=True).start()

    def begin(self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int) -> None:
        """Begin to generate with the weights of now; a batch that was begun before and not asked for is forgotten."""
        self._begun = seed, self._submit(lambda: self._engine.generate(prompts, n, sampling, seed))

    def save(self, checkpoint: Path) -> None:
        """Write the batch that was begun, once it is done, into a checkpoint: the weights that made it are in none."""
        if self._begun is not None:
            seed, future = self._begun
            groups = [[astuple(one) for one in group] for group in future.result()]
            (checkpoint / FILE).write_text(json.dumps({"seed": seed, "groups": groups}))

    def resume(self, checkpoint: Path) -> None:
        """Take the batch in a checkpoint as begun and done; nothing where there is none."""
        try:
            saved = json.loads((checkpoint / FILE).read_text())
        except FileNotFoundError:
            return
        done: Future[Groups] = Future()
        done.set_result([[_generated(*one) for one in group] for group in saved["groups"]])
        self._begun = saved["seed"], done

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int) -> Groups:
        """Return the batch that was begun with this seed, or generate it; see `RolloutEngine.generate`."""
        if self._begun is not None and self._begun[0] == seed:
            groups = self._begun[1].result()
            self._begun = None
            if [len(group) for group in groups] == [n] * len(prompts):  # it may be of settings that have changed
                return groups
        return self._submit(lambda: self._engine.generate(prompts, n, sampling, seed)).result()

    def load(self, version: int) -> None:
        """Take the trainer's current weights, once the batch in work is done."""
        self._submit(lambda: self._engine.load(version)).result()

    def rest(self) -> None:
        """Do nothing: this generates while the policy is trained."""

    def close(self) -> None:
        """Close the engine at once, though a batch be in work."""
        self._engine.close()

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
                future.set_exception(error)


def _generated(token_ids: Sequence[int], text: str, finished: bool, logprobs: Sequence[float] | None) -> Generated:
    return Generated(tuple(token_ids), text, finished, None if logprobs is None else tuple(logprobs))
