"""The next round is generated while this one trains: an engine on a thread of its own.

Each call to the engine beneath is made on that thread, one after another. So new weights wait until the batch of the
old ones is done. A batch that was begun is asked for like any other, by the same prompts, sampling and seed. Episodes
of several turns are played on that thread to their end.
"""

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from node.engines import Generated, RolloutEngine, SamplingParams
from node.engines.episodes import Episodes, Groups, Played, play
from node.processes.threads import settle

FILE = "ahead.json"  # in a checkpoint: the batch that was begun before it

T = TypeVar("T")


class Ahead:
    """An engine that can begin a batch and answer for it later.

    Args:
        engine: that generates; it has a copy of the weights of its own.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._begun: tuple[list[Any], Future[list[Any]]] | None = None  # the request, and its result
        # A daemon: a node that gives up a round does not wait for it.
        threading.Thread(target=self._work, name="generation", daemon=True).start()

    def begin(self, episodes: Episodes) -> None:
        """Begin to play with the weights of now; a batch that was begun before and not asked for is forgotten."""
        self._begun = episodes.request(), self._submit(lambda: _as_lists(play(self._engine, episodes)))

    def wait(self) -> None:
        """Return when the batch that was begun, if any, is done or has failed."""
        if self._begun is not None:
            self._begun[1].exception()

    def give_up(self) -> None:
        """Forget the batch that was begun, unless it is done: nobody waits for it any more."""
        if self._begun is not None and not self._begun[1].done():
            self._begun = None

    def save(self, checkpoint: Path) -> None:
        """Write the batch that was begun into a checkpoint, once it is done: none has the weights that made it.

        A batch that failed is not written: `play` raises its error.
        """
        if self._begun is not None and self._begun[1].exception() is None:
            request, future = self._begun
            (checkpoint / FILE).write_text(json.dumps({"request": request, "groups": future.result()}))

    def resume(self, checkpoint: Path) -> None:
        """Take the batch in a checkpoint as begun and done; nothing where there is none."""
        try:
            saved = json.loads((checkpoint / FILE).read_text())
        except FileNotFoundError:
            return
        done: Future[list[Any]] = Future()
        done.set_result(saved["groups"])
        self._begun = saved["request"], done

    def play(self, episodes: Episodes) -> Groups:
        """Return the batch that was begun if it is this one, or play it.

        The batch of a checkpoint may be another: tasks or settings have changed since, or the release.
        """
        if self._begun is not None and self._begun[0] == episodes.request():
            (_, future), self._begun = self._begun, None
            return [[Played.from_list(tree) for tree in group] for group in future.result()]
        return self._submit(lambda: play(self._engine, episodes)).result()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        return self._submit(lambda: self._engine.generate(prompts, n, sampling, seed)).result()

    def load(self, version: int) -> None:
        """Take the trainer's current weights, once the batch in work is done."""
        self._submit(lambda: self._engine.load(version)).result()

    def rest(self) -> None:
        """Do nothing: this generates while the policy is trained."""

    def close(self) -> None:
        """Close the engine at once, even while it works on a batch."""
        self._engine.close()

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            settle(future, call)


def _as_lists(groups: Groups) -> list[Any]:
    return [[played.as_list() for played in group] for group in groups]
