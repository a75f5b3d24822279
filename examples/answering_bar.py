"""Does a machine that only answers help? Runs the plan in examples/answering.toml, which says what is compared.

    python examples/answering_bar.py --results docs/results

`--model` is what answers: a model or a node's folder, which `gossamer serve` takes. What is in OUT already is not run
again. The table is printed; `--results` keeps its figures, too.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tomllib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.archive_bar import (
    ALONE,
    ROOT,
    Figures,
    archived_swarm,
    begin,
    figures_of,
    gossamer,
    merged,
    print_table,
    run_node,
    score,
    set_words,
    wait_for,
)
from node.exchange.member import Exchange
from node.policy.make_builtin import wrong_answer

PORT = 18433


def main() -> None:
    """Run what the plan says."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/answering"))
    parser.add_argument("--model", type=Path, default=Path("runs/archive/makers/n0"))
    parser.add_argument("--results", type=Path, help="folder for answering.json")
    given = parser.parse_args()
    out, model = given.out.absolute(), given.model.absolute()
    plan = tomllib.loads((ROOT / "examples" / "answering.toml").read_text())
    settings = plan["settings"]
    answered = answer(plan, model, out / "answered")
    print_answers(plan, out / "printed")
    runs: dict[str, list[Figures]] = {}
    for seed in plan["seeds"]:
        for arm in ("answered", "printed"):
            changed = merged(settings, ALONE, {"sampling": {"local": 2, "external": 16}})
            more = ["--backfill", out / arm / "archive"]
            runs.setdefault(arm, []).append(run_node(out / str(seed) / arm, changed, seed, more))
        for arm, local in (("alone", 2), ("alone, 8", 8)):
            changed = merged(settings, ALONE, {"sampling": {"local": local, "external": 0}})
            runs.setdefault(arm, []).append(run_node(out / str(seed) / arm, changed, seed))
        runs.setdefault("equals", []).append(run_equals(out / str(seed) / "equals", plan, seed))
    start, teacher = score(ROOT / settings["policy"]["model"], settings), score(model, settings)
    print_table(runs, "answered", start)
    told: dict[str, Any] = {"endpoint": answered, "start": start._asdict(), "who_answers": teacher._asdict()}
    print(json.dumps(told))
    if given.results:
        told["arms"] = {arm: [figures._asdict() for figures in figured] for arm, figured in runs.items()}
        (given.results / "answering.json").write_text(json.dumps(told, indent=1) + "\n")


def answer(plan: Mapping[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """Have the model answer the plan's questions, and archive them; return what `answered.json` says."""
    answered = folder / "a0" / "answered.json"
    if not (folder / "done").exists():
        served = folder.parent / "model"
        shutil.rmtree(served, ignore_errors=True)
        gossamer("export", model, served)
        drawn = {"do_sample": True, "top_k": 0}  # without it, transformers' server answers greedily at any temperature
        path = served / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | drawn))
        server = begin("serve", served, "--server", "transformers", "--port", PORT, log=folder.parent / "serve.log")
        try:
            wait_for(is_served, "the endpoint")
            with archived_swarm(folder, plan["settings"]) as invite:
                words = ("--plain", "--completions", plan["completions"], "--max-tokens", 16, "--at-once", 2)
                url = f"http://127.0.0.1:{PORT}/v1"
                many = ("--questions", plan["questions"], "--state", folder / "a0")
                gossamer("answer", f"@{invite}", "--url", url, "--model", served.name, *words, *many)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
        (folder / "done").touch()
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def print_answers(plan: Mapping[str, Any], folder: Path) -> None:
    """Publish as many answers that the tasks themselves print, half of them wrong, and archive them."""
    if (folder / "done").exists():
        return
    rng = random.Random(0)
    half = plan["completions"] // 2
    with (
        archived_swarm(folder, plan["settings"]) as invite,
        Exchange.join(invite.read_text(), state=folder / "printer") as member,
    ):
        wait_for(lambda: member.statistics()["swarm/peers"], "a peer")
        for _ in range(plan["questions"]):
            (question,) = member.ask(1)
            right = question.item.answer
            texts = [right] * half + [wrong_answer(right, rng) for _ in range(half)]
            member.publish(question, texts, [True] * len(texts))
    (folder / "done").touch()


def run_equals(folder: Path, plan: Mapping[str, Any], seed: int) -> Figures:
    """Run a live swarm of equals; return what its first node, the only one that is evaluated, came to."""
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        settings = merged(plan["settings"], {"sampling": {"local": 2, "external": 16}})
        gossamer("swarm", "-n", plan["equals"], "--out", folder, "--seed", seed, "--no-table", *set_words(settings))
    return figures_of(folder / "nodes" / "n0")


def is_served() -> bool:
    """Tell whether the endpoint answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
