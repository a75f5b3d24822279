"""The worker that scores each text in a cage (`node.processes.cage`): it loads a task's code and runs no text itself.

    worker            loads the code: the node owner's, trusted as the node is
      cage            a process a request, forked from the worker, which has loaded the code
    or
    worker            where the code starts threads or uses a GPU when it is loaded, so that it cannot be forked
      cage            loads the code anew for each request, and has the time for it that loading took at first

The worker holds the channel to the node. It gets the answer from the cage by a channel of that call, and sends it on as
the reply to the node's request.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from node.errors import UserError, one_line
from node.processes.cage import Cage, fork_clean
from node.processes.call_supervisor import CageError, CageTimeoutError
from node.processes.worker_process import Message, Requests

CODE_CHANGED = "its code has changed since this node began: start the node again"
MAX_ANSWER = 1 << 20  # bytes
LOAD_S = 120.0  # for loading in a cage
AGAIN = 3.0  # times what loading took at first that it may take again


@dataclass(frozen=True)
class CageWork:
    """What a worker does in cages.

    Attributes:
        load: loads the task's code; raises `UserError`.
        describe: what to tell the node of the code, with its "code" if that may change.
        answer: answers a request with the code.
        first: the node's first message: the "seconds" for a text, whether a cage has to be "whole", maybe its "code".
        hint: put before an error.
        files: to be read beside what every cage may read.
    """

    load: Callable[[], Any]
    describe: Callable[[Any], Message]
    answer: Callable[[Any, Message], Message]
    first: Message
    hint: str
    files: Iterable[str]


def serve_in_cages(requests: Requests, work: CageWork, folder: Path) -> None:
    """Load a task's code, then answer the node's requests, until it ends this process."""
    try:
        loaded = fork_clean(work.load)
    except UserError as error:
        requests.reply({"error": one_line(error)})
        return
    cage = Cage(folder, filter(None, work.files))
    lacks = cage.lacks()
    if lacks and work.first["whole"]:
        requests.reply({"error": f"a text cannot be caged: {lacks}"})
        return
    more = 0.0
    if loaded is None:
        began = time.monotonic()
        description = _told(partial(cage.call, partial(_described, work), LOAD_S, MAX_ANSWER))
        more = AGAIN * (time.monotonic() - began)
    else:
        description = work.describe(loaded)
    if "error" not in description and work.first.get("code", description.get("code")) != description.get("code"):
        description = {"error": CODE_CHANGED}  # peers would take its rewards for lies
    requests.reply({**description, "loads_for": more})
    while "error" not in description:
        request = requests.receive()
        answer = partial(_answered, work, loaded, request)
        seconds = float({**work.first, **request}["seconds"])
        reply = _told(partial(cage.call, answer, seconds + more, MAX_ANSWER, request.get("patience", 0.0)))
        requests.reply({**reply, "error": f"{work.hint}{reply['error']}"} if "error" in reply else reply)


def _answered(work: CageWork, loaded: Any, request: Message) -> Message:
    """Answer a request; in a cage."""
    return work.answer(work.load() if loaded is None else loaded, request)


def _described(work: CageWork) -> Message:
    try:
        return work.describe(work.load())
    except UserError as error:
        return {"error": one_line(error)}


def _told(call: Callable[[], Message]) -> Message:
    try:
        return call()
    except CageError as error:
        return {"error": str(error), "late": isinstance(error, CageTimeoutError)}
