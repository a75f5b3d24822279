"""The runs of an experiment as tasks of a Ray cluster: `gossamer lab run FILE --on ray[=ADDRESS]`.

Each missing run is one task. It asks for the processors, GPUs and memory that its nodes need, so Ray places as many at
once as the cluster holds. Gossamer has to be installed on each machine.

No shared disk is assumed. The local files and folders that a run's settings name travel with the task, and its records
(JSON, logs, reports; no checkpoints) travel back into the folder where the laboratory looks for them. A run on Ray is
the same process as one without: the runner "memory" gives the same numbers to the last digit.

A task whose machine dies is done again elsewhere, from its beginning. A run that fails by itself is not: it would fail
again. When the driver ends, its tasks end too, for a run ends with its standard input.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from node.config import parse_config
from node.errors import UserError
from node.fleet.ray_cluster import connected, memory_of, packed, packed_files, relocated, unpack, unpack_files
from node.lab.plan import Run, RunPart
from node.lab.runs import POLL, PROGRESS, Say, name_of, progress, raise_failure, start, wait_or_kill, write_settings
from node.operations.presets import with_preset

RETRIES = 3  # of a task whose machine died
RECORDS = frozenset({".json", ".jsonl", ".html", ".log", ".svg", ".md"})
START_S = 60.0  # for the cluster to answer


class Needs(NamedTuple):
    """The resources of a run, as Ray counts them: processors, GPUs, and bytes of memory."""

    num_cpus: int
    num_gpus: int
    memory: int


def do_on_ray(runner: str, runs: Sequence[Run], on: str, jobs: int, say: Say) -> None:
    """Do all `runs` on the cluster that `on` names.

    Args:
        runner: "memory" or "processes".
        runs: those that are missing.
        on: "ray", for the cluster that this machine belongs to, or a new one on its loopback; or "ray=ADDRESS".
        jobs: runs at once; 0: as many as the cluster holds.
        say: called with a line when a run ends, and each `PROGRESS` seconds.

    Raises:
        UserError: Ray is not installed, no cluster answers, no machine of it is large enough, or a run failed; the
            others are ended.
    """
    ray = connected(on)
    waiting, needs = list(runs), {}
    running: dict[Any, Run] = {}
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for run in runs:
            needs[run.folder] = _fitted(needs_of(runner, run), machines, name_of(run))
        news = ray.remote(num_cpus=0)(_RunLines).remote()
        do = ray.remote(max_retries=RETRIES)(_do_here)
        began = spoke = time.monotonic()
        while waiting or running:
            while waiting and len(running) < (jobs or len(runs)):
                run = waiting.pop(0)
                settings = [run.settings, *(part.settings for part in run.parts)]
                options = do.options(name=name_of(run), **needs[run.folder]._asdict())
                running[options.remote(runner, run, packed_files(settings, name_of(run)), news)] = run
            for done in ray.wait(list(running), timeout=POLL)[0]:
                run = running.pop(done)
                _take(ray, done, run)
                say(f"{name_of(run)}: done; {len(waiting) + len(running)} to go, {time.monotonic() - began:.0f} s")
            if time.monotonic() - spoke >= PROGRESS:
                spoke = time.monotonic()
                for line in _told(ray, news):
                    say(f"{line}, {spoke - began:.0f} s")
    finally:
        for task in running:
            ray.cancel(task, force=True)
        ray.shutdown()


def needs_of(runner: str, run: Run) -> Needs:
    """Return the resources that a run asks for: under "memory" all its nodes share one process."""
    parts = run.parts or [RunPart("", 1 if runner == "memory" else run.nodes, run.settings)]
    gpus = memory = 0
    for part in parts:
        config = with_preset(parse_config(part.settings), run.nodes)[0]  # once: it looks at the model
        gpus += part.nodes * (config.policy.device == "cuda")
        memory += part.nodes * memory_of(config)
    return Needs(1 if runner == "memory" else run.nodes, min(gpus, 1) if runner == "memory" else gpus, memory)


def _fitted(needs: Needs, machines: Sequence[Mapping[str, float]], name: str) -> Needs:
    """Return what a run may ask for: real nodes share the cores, and the GPUs, of the largest machine if they must.

    Raises:
        UserError: no machine has enough memory, a GPU, or both at once; Ray would wait for one for ever.
    """
    most = {key: max((machine.get(key, 0.0) for machine in machines), default=0.0) for key in ("GPU", "memory")}
    if needs.num_gpus and not most["GPU"]:
        raise UserError(f"{name} wants a GPU, and no machine of the cluster has one: set settings.policy.device")
    if needs.memory > most["memory"]:
        raise UserError(
            f"{name} takes some {needs.memory / 1e9:.1f} GB, and the largest machine of the cluster has "
            f"{most['memory'] / 1e9:.1f}: use a smaller model, or fewer nodes"
        )
    able = [
        (min(machine.get("GPU", 0.0), needs.num_gpus), machine.get("CPU", 0.0))
        for machine in machines
        if machine.get("memory", 0.0) >= needs.memory and (not needs.num_gpus or machine.get("GPU", 0.0) >= 1)
    ]
    if not able:
        raise UserError(
            f"{name} takes a GPU and some {needs.memory / 1e9:.1f} GB, and no machine of the cluster has both: "
            "use a smaller model, or fewer nodes"
        )
    gpus, cpus = max(able)
    return Needs(min(needs.num_cpus, int(cpus)), int(gpus), needs.memory)


def _take(ray: Any, done: Any, run: Run) -> None:
    """Put what a task brought where the laboratory looks for it. Raises `UserError` if the run failed."""
    try:
        status, records = ray.get(done)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{name_of(run)} could not be done on the cluster: {reason}") from None
    keep_records(run, records)
    raise_failure(run, status)


def keep_records(run: Run, records: bytes) -> None:
    """Put a run's packed records into its folder, whole or not at all."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.folder.parent, prefix=".coming-") as temporary:
        aside = unpack(records, Path(temporary))
        write_settings(run)  # as they are here: those that came name files of the other machine
        (aside / f"{run.folder.name}.log").replace(run.folder.with_suffix(".log"))
        shutil.rmtree(run.folder, ignore_errors=True)
        if (aside / run.folder.name).exists():
            (aside / run.folder.name).replace(run.folder)


def _told(ray: Any, news: Any) -> list[str]:
    try:
        lines: list[str] = ray.get(news.all.remote(), timeout=START_S)
    except ray.exceptions.RayError:  # its machine died: the runs go on
        return []
    return lines


class _RunLines:
    """How far each run has come that is under way; an actor."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def tell(self, name: str, line: str) -> None:
        """Note a run's progress; an empty line: it has ended."""
        self._lines[name] = line
        if not line:
            del self._lines[name]

    def all(self) -> list[str]:
        """Return a line for each run that is under way."""
        return [f"{name}: {line}" for name, line in self._lines.items()]


# --- at the machine that does a run -----------------------------------------------------------------


def _do_here(runner: str, run: Run, files: Mapping[str, bytes], news: Any) -> tuple[int, bytes]:
    """Do a run in a temporary folder; return its exit status, and its packed records."""
    with tempfile.TemporaryDirectory(prefix="gossamer-lab-") as temporary:
        folder = Path(temporary)
        places = unpack_files(files, folder)
        placed = run._replace(
            folder=folder / "out" / run.folder.name,
            settings=relocated(run.settings, places),
            parts=tuple(part._replace(settings=relocated(part.settings, places)) for part in run.parts),
        )
        process = start(runner, placed)
        try:
            status = _watched(process, placed, news)
        finally:
            if process.poll() is None:
                process.terminate()
                wait_or_kill(process)
        return status, packed(folder / "out", RECORDS)


def _watched(process: "subprocess.Popen[bytes]", run: Run, news: Any) -> int:
    """Wait for a run's end, and tell how far it has come; return its exit status."""
    spoke = 0.0
    while process.poll() is None:
        if time.monotonic() - spoke >= PROGRESS / 2:
            spoke = time.monotonic()
            news.tell.remote(name_of(run), progress(run))
        time.sleep(POLL)
    news.tell.remote(name_of(run), "")
    return process.returncode
