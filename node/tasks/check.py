"""The trials of `gossamer tasks check`, before anybody trains on a task.

`python -m node.tasks.check` is its other process: it reads a task's configuration as JSON from its standard
input and prints what the task makes of some seeds, as a digest.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from node.config import TaskConfig
from node.processes.cage import lacking
from node.tasks import Item, Task, derive_seed, has_own_code, is_in_range, load_tasks
from node.tasks.answers import MAX_TEXT, show
from node.tasks.environments.episodes import Done, Observation, StartEpisode, start_of, step
from node.tasks.prompting import own_mode, solution
from node.tasks.rewards.rows import RewardsTask
from node.tasks.scoring.verdicts import Submission, Workers, submit_of
from node.tasks.task_set import bare_of, outside, unshared

SEEDS = 64
TIMED = 5  # texts
HASH_SEEDS = ("1", "2")
OTHER_PROCESS_S = 120.0
RUBBISH = ("", " ", "7", "rubbish", "<answer></answer>", "\\boxed{", "é½ﷺ🂡\u202e\x00", "9" * 1000, "x" * (MAX_TEXT + 1))


class Finding(NamedTuple):
    """One thing that was tried: whether it holds, and a line that says it."""

    holds: bool
    line: str


def check(config: TaskConfig, task: Task) -> Iterator[Finding]:
    """Try `task`, one of those that `config` names. Raises what the task raises, and `UserError` for a bad reward."""
    seeds = [derive_seed("check", *task.key, index) for index in range(SEEDS)]
    began = time.perf_counter()
    items = [task.make(seed) for seed in seeds]
    took = (time.perf_counter() - began) / SEEDS
    different = len({item.question for item in items})
    yield Finding(different > 1, f"{SEEDS} questions, {different} of them different")
    yield Finding(took < 1.0, f"a question takes {_ms(took)}")
    yield Finding(items == [task.make(seed) for seed in seeds], "the same seeds give the same questions again")
    same = all(digest_elsewhere(config, hash_seed) == digest([config]) for hash_seed in HASH_SEEDS)
    yield Finding(same, f"and in other processes, with PYTHONHASHSEED {' and '.join(HASH_SEEDS)}")
    start = start_of(task)
    if start is None:
        yield _right_answers(task, items)
    else:
        alike = all(_told(start, item) == _told(start, item) for item in items[:8])
        yield Finding(alike, "the same turns are answered alike again")
    # A text may be right by chance for one item, and not for all.
    asked = (items[0], next((item for item in items if item.answer != items[0].answer), items[0]))
    rewards = [min(task.verify(item, text) or 0.0 for item in asked) for text in RUBBISH]  # in the first turn
    least = min(rewards)
    if line := outside(task):
        yield Finding(True, line)
    yield from how_paid(task)
    yield from peers_text(task, items[0])
    beyond = "" if is_in_range(least) else f", {least:g} at least: groups with rewards outside of 0 to 1 are not shared"
    yield Finding(max(rewards) < 1, f"rubbish earns {max(rewards):g} at most{beyond}")


def how_paid(task: Task) -> Iterator[Finding]:
    """Say of each reward function how texts are given to it and what one costs, and what a cage lacks here."""
    bare = bare_of(task)
    if not isinstance(bare, RewardsTask):
        return
    peers = "a peer's text is never scored" if unshared(task) else f"a peer's text has {_ways(bare.apart)}"
    own = "own texts have one call a round" if bare.together else f"an own text has {_ways(bare.workers)}"
    for name, seconds in zip(bare.names, bare.seconds, strict=True):
        yield Finding(True, f"function {name} takes {_ms(seconds)} a text: {own}, {peers}")
    if lacks := lacking():
        yield Finding(True, f"a cage lacks on this machine: {lacks}")
    else:
        yield Finding(True, "a cage lacks nothing on this machine")


def _ways(workers: Workers) -> str:
    """Return how workers run a text."""
    ways = {None: "a call of its own", 0.0: "a fork of the loaded code, in a cage"}
    return ways.get(workers.begin().get("loads_for"), "a fresh process that loads the code, in a cage")


def peers_text(task: Task, item: Item) -> Iterator[Finding]:
    """Say how long scoring a peer's text takes, and where it is scored; nothing of a task that is not shared."""
    apart: Workers | None = getattr(bare_of(task), "apart", None)
    submit = submit_of(task)
    if apart is None or submit is None or unshared(task):
        return
    loads_for = apart.begin().get("loads_for")  # seconds in a cage
    where = {None: "in its worker", 0.0: "in a cage"}.get(loads_for, "in a cage that loads the code anew")
    text, took = show(solution(item), own_mode(task)), []
    for _ in range(TIMED):
        began = time.perf_counter()
        submit([Submission(item, text)], False)[0].result()
        took.append(time.perf_counter() - began)
    yield Finding(True, f"a peer's text takes {_ms(statistics.median(took))}, {where}")


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.2g} ms"  # from which on .2g has an exponent


def digest(configs: list[TaskConfig]) -> str:
    """Return a hash over the keys of the tasks and what they make of some seeds."""
    contents = [
        (*task.key, *(task.make(derive_seed("check", *task.key, index)) for index in range(SEEDS)))
        for task in load_tasks(configs).tasks
    ]
    return hashlib.sha256(repr(contents).encode(errors="backslashreplace")).hexdigest()


def digest_elsewhere(config: TaskConfig, hash_seed: str) -> str:
    """Return `digest` of `config` as another process computes it; empty if it fails."""
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "node.tasks.check"],
        input=config.model_dump_json(),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=OTHER_PROCESS_S,
        check=False,
    )
    return done.stdout.strip()


def _told(start: StartEpisode, item: Item) -> list[Observation | Done]:
    """Return what a game answers to rubbish."""
    environment, turns = start(item), []
    for text in RUBBISH:
        turns.append(step(environment, text))
        if isinstance(turns[-1], Done):
            break
    return turns


def _right_answers(task: Task, items: list[Item]) -> Finding:
    solved = [item for item in items if solution(item)]
    if not solved:
        return Finding(True, "its questions come without an answer: only its own verify can tell what is right")
    if has_own_code(task.key.name):  # whose functions may pay for more than the answer
        verdicts = [task.verify(item, solution(item)) for item in solved]
        earned = [verdict for verdict in verdicts if verdict is not None]
        if not earned:
            return Finding(False, "none of the rows' bare answers can be scored")
        unscored = len(verdicts) - len(earned)
        but = f", but {unscored} of {len(verdicts)} cannot be scored" if unscored else ""
        none = "" if max(earned) > 0 else ": the right answer is not paid, unless it comes in another form"
        return Finding(True, f"the rows' bare answers earn {min(earned):.3g} to {max(earned):.3g}{but}{none}")
    wrong = [item for item in solved if task.verify(item, show(solution(item), own_mode(task))) != 1.0]
    if wrong:
        return Finding(False, f"the answer {solution(wrong[0])!r} to {wrong[0].question!r} does not earn 1")
    return Finding(True, "the right answers earn 1")


if __name__ == "__main__":
    print(digest([TaskConfig.model_validate_json(sys.stdin.read())]))  # noqa: T201  # its answer
