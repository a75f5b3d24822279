"""Does the runs of an experiment that are missing, as many at once as the cores allow.

Each is a process of its own, so nothing that one leaves behind reaches the next. A run that is complete is not done
again, and kill -9 at any moment costs no more than what was under way: real nodes go on from their checkpoints, a run
of the runner "memory" is begun again.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from node.config import flatten, parse_config
from node.errors import UserError
from node.lab.plan import Lab, Run
from node.processes.machine import usable_cores
from node.training.budget import is_done, spent_by
from protocol.storage import write_atomically

POLL = 0.2  # seconds between looks at the processes
# For the end of a run that was asked to stop: its nodes have half a minute to stop, and two minutes to save.
PATIENCE_S = 300.0
PROGRESS = 30.0  # seconds between two lines that say how far runs have come
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

Say = Callable[[str], object]


class _StartedRun(NamedTuple):
    run: Run
    process: "subprocess.Popen[bytes]"


def do_missing(lab: Lab, jobs: int, say: Say, on: str = "") -> None:
    """Do what is missing of `lab`.

    Args:
        lab: the experiment.
        jobs: runs at once; 0: as many as there are cores for their nodes.
        say: called with a line when a run ends, and each `PROGRESS` seconds for each that is under way.
        on: "ray" or "ray=ADDRESS" to do them as tasks of a cluster (`node.lab.on_ray`).

    Raises:
        UserError: a run failed; the others that had begun are ended.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    waiting = [run for run in lab.runs if not is_complete(run)]
    say(f"{len(lab.runs)} runs, {len(lab.runs) - len(waiting)} of them done")
    try:
        if on:
            from node.lab.on_ray import do_on_ray

            do_on_ray(lab.config.runner, waiting, on, jobs, say)
        else:
            _do_here(lab, waiting, jobs or _at_once(lab), say)
    except KeyboardInterrupt:
        say(f"stopped with {len(done_runs(lab))} of {len(lab.runs)} runs done: the same command does the others")
        raise


def _do_here(lab: Lab, waiting: list[Run], most: int, say: Say) -> None:
    began = spoke = time.monotonic()
    running: list[_StartedRun] = []
    try:
        while waiting or running:
            while waiting and len(running) < most:
                run = waiting.pop(0)
                running.append(_StartedRun(run, start(lab.config.runner, run)))
            time.sleep(POLL)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                raise_failure(job.run, job.process.returncode)
                say(f"{name_of(job.run)}: done; {len(waiting) + len(running)} to go, {time.monotonic() - began:.0f} s")
            if time.monotonic() - spoke >= PROGRESS:
                spoke = time.monotonic()
                for job in running:
                    say(f"{name_of(job.run)}: {progress(job.run)}, {spoke - began:.0f} s")
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            wait_or_kill(job.process)


def done_runs(lab: Lab) -> list[Run]:
    """Return the runs of `lab` that are complete."""
    return [run for run in lab.runs if is_complete(run)]


def time_table(lab: Lab) -> str:
    """Return what is missing of each arm on each base, by the processor time that its complete runs took in a mean.

    Runs of the runner "processes" and of earlier releases do not say what they took.
    """
    rows = [["base", "arm", "runs", "done", "minutes a run", "minutes missing"]]
    missing = unknown = 0  # runs
    known = 0.0  # minutes
    for base, arm in dict.fromkeys((run.base, run.arm) for run in lab.runs):
        runs = [run for run in lab.runs if (run.base, run.arm) == (base, arm)]
        done = [run for run in runs if is_complete(run)]
        took = [seconds / 60 for run in done if (seconds := _summary(run)["run"].get("cpu_seconds"))]
        left = len(runs) - len(done)
        missing += left
        if took:
            each = statistics.fmean(took)
            known += left * each
            minutes = [f"{each:.1f}", f"{left * each:.0f}"]
        else:
            unknown += left
            minutes = ["", "not known" if left else "0"]
        rows.append([base, arm, str(len(runs)), str(len(done)), *minutes])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, say_missing(missing, unknown, known / 60)])


def say_missing(runs: int, unknown: int, hours: float) -> str:
    """Say that `runs` are missing, of which all but the `unknown` ones take `hours` of one processor together."""
    if runs == 0:
        return "no run is missing"
    are_missing = f"{runs} run{'s are' if runs > 1 else ' is'} missing"
    if unknown == runs:
        return f"{are_missing}: how long that takes is not known"
    without = f", without {unknown} whose time is not known" if unknown else ""
    return f"{are_missing}: about {hours:.1f} hours of one processor{without}"


def _summary(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "summary.json").read_text())


def wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a run that was asked to stop, longer than it waits for its own nodes; then kill it."""
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(PATIENCE_S)


def is_complete(run: Run) -> bool:
    """Tell whether `run` has been done to its end, with these settings.

    Raises:
        UserError: its folder holds a run of other settings.
    """
    try:
        summary = _summary(run)
    except FileNotFoundError:
        return False
    except ValueError:
        return False
    _check_same(run, summary["run"])
    nodes = zip(map(parse_config, run.by_node), summary["nodes"].values(), strict=True)
    return all(is_done(config, node["rounds"], spent_by(node)) for config, node in nodes)


def progress(run: Run) -> str:
    """Say how far a run has come that is under way: the rounds of its slowest node."""
    done = min((path.read_bytes().count(b"\n") for path in run.folder.glob("nodes/*/metrics.jsonl")), default=0)
    most = run.settings.get("rounds")
    return f"round {done} of {most}" if most else f"round {done}"


def _settings_files(run: Run) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return where the settings of a run are kept, and which, by the name of its part; its own have none."""
    files = {"": (run.folder.with_suffix(".json"), _plain(run.settings))}
    for at, part in enumerate(run.parts):
        files[part.name] = (run.folder.with_suffix(f".{at}.json"), _plain(part.settings))
    return files


def _check_same(run: Run, before: Mapping[str, Any]) -> None:
    old = {"nodes": before["nodes"], "delay": 0, "attack": None, "churn": None, "control": None}
    old |= {"moments": "kept", "tempo": {}}
    old |= {key: before[key] for key in old if key in before}
    old["parts"] = [[name, part["nodes"]] for name, part in before.get("parts", {}).items()]
    new = {
        "nodes": run.nodes,
        "delay": run.delay,
        "attack": run.attack and run.attack.model_dump(),
        "churn": run.churn and run.churn.model_dump(),
        "control": run.control,
        "moments": run.moments,
        "tempo": run.tempo,
        "parts": [[part.name, part.nodes] for part in run.parts],
    }
    for name, (path, settings) in _settings_files(run).items():
        prefix = f"{name}." if name else ""
        with suppress(FileNotFoundError):
            old |= flatten(json.loads(path.read_text()), prefix)
            new |= flatten(settings, prefix)
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing:
        raise UserError(
            f"{run.folder} was run with other settings ({', '.join(differing)}): delete it, or choose another --out"
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def write_settings(run: Run) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Write the settings of a run beside its folder; return where and which, by the name of its part."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    files = _settings_files(run)
    for path, settings in files.values():
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())
    return files


def start(runner: str, run: Run) -> "subprocess.Popen[bytes]":
    """Start the process of a run; it ends when its standard input is closed."""
    files = write_settings(run)
    command = [sys.executable, "-m", "node.lab", runner, str(files[""][0]), "-n", str(run.nodes)]
    for part in run.parts:
        command += ["--part", part.name, str(part.nodes), str(files[part.name][0])]
    command += ["--seed", str(run.seed), "--out", str(run.folder), "--delay", str(run.delay), "--moments", run.moments]
    command += ["--attack", run.attack.model_dump_json()] if run.attack else []
    command += ["--churn", run.churn.model_dump_json()] if run.churn else []
    command += ["--control", run.control] if run.control else []
    command += ["--tempo", json.dumps(run.tempo)] if run.tempo else []
    with run.folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=os.environ | THREADS
        )


def _at_once(lab: Lab) -> int:
    """Return how many runs go at once: a core for each under "memory", else a core for each of its nodes."""
    cores = usable_cores()
    largest = max((run.nodes for run in lab.runs), default=1)
    return cores if lab.config.runner == "memory" else max(1, cores // largest)


def raise_failure(run: Run, status: int) -> None:
    """Raise a `UserError` with the last line that a run said, if it failed."""
    if status:
        log = run.folder.with_suffix(".log")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else "it said nothing"
        raise UserError(f"{name_of(run)} ended with status {status} ({reason}): see {log}")


def name_of(run: Run) -> str:
    """Return a run's base, arm and seed in words."""
    return ", ".join([*([run.base] if run.base else []), run.arm, f"seed {run.seed}"])
