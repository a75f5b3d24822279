"""DiLoCo on this machine: several processes train one small language model, one is killed, one comes late.

    python examples/diloco.py
    python examples/diloco.py --mode async --workers 4 --kill-at 5 --add-at 10 --out runs/async.svg

Every worker learns to continue this repository's own text, character by character, from a part of
it that is its own. Once in --inner steps they average what they learnt. The first one, which
founded the group, is the one that is killed: no worker is special. At the end all parameters are
compared bit by bit, and the losses are drawn.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collectives import Codec, CollectiveError, Communicator, DiLoCo

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 128  # ASCII
CONTEXT = 64  # characters
BATCH = 16
LIMIT = 300.0  # seconds that anything is waited for


class CharacterModel(nn.Module):
    """A transformer of two layers and some 120,000 parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the logits of each next character, for text of shape (batch, CONTEXT)."""
        x = self.characters(text) + self.places(torch.arange(text.shape[1]))
        return self.out(self.layers(x, nn.Transformer.generate_square_subsequent_mask(text.shape[1]), is_causal=True))


def batches(worker: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield text and the characters that come next, from this worker's part of the repository."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("protocol/*.py"), *ROOT.glob("node/*.py")]
    texts = [path.read_text(errors="ignore") for path in sorted(files)[worker % 4 :: 4]]
    data = torch.tensor([ord(character) for character in "".join(texts) if ord(character) < VOCABULARY])
    chance = torch.Generator().manual_seed(worker)
    while True:
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=chance)
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in at.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def work(options: argparse.Namespace) -> None:
    """Be one worker: train to the last outer step, and write a line after each."""
    torch.set_num_threads(1)
    torch.manual_seed(options.worker)
    model = CharacterModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Others may not live any more: any one that answers will do.
    seeds = [path.read_text() for path in options.folder.glob("*.address")]
    said = options.folder / f"{options.worker}.jsonl"
    with Communicator.connect("diloco", seeds, timeout=LIMIT) as comm, said.open("w", buffering=1) as file:
        (options.folder / f"{options.worker}.new").write_text(comm.address)
        (options.folder / f"{options.worker}.new").rename(options.folder / f"{options.worker}.address")
        while not options.late and comm.world_size < options.workers:
            comm.admit(LIMIT)
        diloco = DiLoCo(
            comm, model, optimizer, inner_steps=options.inner, mode=options.mode, codec=Codec(options.codec)
        )
        step, losses = diloco.join(), []
        for text, following in batches(options.worker):
            loss = nn.functional.cross_entropy(model(text).flatten(0, 1), following.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step = diloco.step()
            if step is not None:
                row = {"outer": step.revision, "loss": sum(losses) / len(losses), "members": len(step.contributors)}
                file.write(json.dumps(row | {"attempts": step.attempts, "seconds": step.seconds}) + "\n")
                losses = []
                if step.revision >= options.steps:
                    break
        file.write(json.dumps({"hash": hashlib.sha256(diloco.outer.numpy().tobytes()).hexdigest()}) + "\n")


def rows(folder: Path, worker: int) -> list[dict]:
    """Return what a worker has written so far."""
    path = folder / f"{worker}.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def run(options: argparse.Namespace, folder: Path, stack: ExitStack) -> int:
    """Start the workers, kill one and add one when it is time, and look at how it ended."""
    began = time.monotonic()
    workers: list[subprocess.Popen[bytes]] = []

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {text}", flush=True)

    def start(late: bool) -> None:
        command = [sys.executable, __file__, "--worker", str(len(workers)), "--folder", str(folder), *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(command + ["--late"] * late, env=environment))
        stack.callback(workers[-1].kill)

    def reached() -> int:
        return max((row.get("outer", 0) for worker in range(len(workers)) for row in rows(folder, worker)), default=0)

    start(late=False)
    while not (folder / "0.address").exists() and workers[0].poll() is None:
        time.sleep(0.1)
    for _ in range(options.workers - 1):
        start(late=False)
    tell(f"{options.workers} workers started")
    killed = added = False
    told = 0
    while any(worker.poll() is None for worker in workers):
        now = reached()
        if now // 5 > told // 5:
            newest = [row for worker in range(len(workers)) for row in rows(folder, worker) if row.get("outer") == now]
            loss = sum(row["loss"] for row in newest) / len(newest)
            tell(f"outer step {now}: loss {loss:.3f}, {newest[0]['members']} members")
            told = now
        if not killed and 0 < options.kill_at <= now:
            workers[0].kill()
            killed = True
            tell(f"worker 0, which founded the group, is killed after outer step {now}")
        if not added and 0 < options.add_at <= now:
            start(late=True)
            added = True
            tell(f"worker {len(workers) - 1} is started after outer step {now}")
        if time.monotonic() - began > LIMIT:
            tell("too slow: given up")
            return 1
        time.sleep(0.1)
    return conclude(options, folder, len(workers), tell)


def conclude(options: argparse.Namespace, folder: Path, started: int, tell: Callable[[str], None]) -> int:
    """Compare the parameters, draw the losses, and return the exit status."""
    everything = {worker: rows(folder, worker) for worker in range(started)}
    hashes = {worker: found[-1]["hash"] for worker, found in everything.items() if found and "hash" in found[-1]}
    losses = {worker: [row for row in found if "loss" in row] for worker, found in everything.items()}
    draw(losses, options)
    last = [found[-1]["loss"] for worker, found in losses.items() if worker in hashes]
    same = len(set(hashes.values())) == 1
    repeated = max(row["attempts"] for found in losses.values() for row in found)
    tell(f"{len(hashes)} workers arrived; mean loss {sum(last) / max(len(last), 1):.3f}")
    tell(
        f"their parameters are {'the same, bit by bit' if same else 'DIFFERENT'}; a step took up to {repeated} attempts"
    )
    tell(f"drawn to {options.out}")
    return 0 if same and len(hashes) >= 2 - (options.workers == 1) else 1


def draw(losses: dict[int, list[dict]], options: argparse.Namespace) -> None:
    """Draw each worker's mean loss of an inner phase over outer steps."""
    from matplotlib.figure import Figure

    figure = Figure((8.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for worker, found in losses.items():
        axes.plot(
            [row["outer"] for row in found], [row["loss"] for row in found], label=f"worker {worker}", linewidth=1.6
        )
    for at, text in ((options.kill_at, "worker 0 killed"), (options.add_at, "a worker added")):
        if at > 0:
            axes.axvline(at, color="#98a2b3", linestyle=":")
            axes.text(at + 0.2, axes.get_ylim()[1], text, va="top", color="#667085")
    axes.set(xlabel="outer step", ylabel="cross-entropy a character, nats", title=f"DiLoCo, {options.mode}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


def main() -> int:
    """Run the example, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=3, help="at the start (default 3)")
    parser.add_argument("--steps", type=int, default=30, help="outer steps (default 30)")
    parser.add_argument("--inner", type=int, default=20, help="inner steps to an outer one (default 20)")
    parser.add_argument("--mode", choices=["sync", "async"], default="sync")
    parser.add_argument("--codec", choices=[codec.value for codec in Codec], default="none")
    parser.add_argument("--kill-at", type=int, default=8, help="outer step after which worker 0 is killed; 0: never")
    parser.add_argument("--add-at", type=int, default=12, help="outer step after which one is added; 0: never")
    parser.add_argument("--out", type=Path, default=Path("runs/diloco.svg"), help="the plot, .svg or .png")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--late", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers < 1 or options.steps < 1 or options.inner < 1:
        parser.error("--workers, --steps and --inner must be at least 1")
    if options.worker is not None:
        try:
            work(options)
        except CollectiveError as error:
            print(f"worker {options.worker}: {error}", file=sys.stderr)
            return 1
        return 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return run(options, Path(folder), stack)


if __name__ == "__main__":
    raise SystemExit(main())
