"""An archive as rows for other trainers: one object a line, with a card beside the file.

    {"prompt": ..., "completion": ..., "reward": 1.0, "finished": true, "task": "builtin/sums", "signer": "...",
     "base": "...", "group": "..."}

Prompt and completion are turns of a chat, or texts. `reward` is what this machine found. `finished` and `base`, the
model that answered, are what the signer claims. Rows of one group have the same `group`. No row is on a held-out
question. Answers that quote one are left out, as are groups with the same texts as an earlier one.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from node.archive.judging import GroupJudge, JudgedGroup
from node.archive.store import Archive
from node.errors import UserError
from node.policy.model_card import CARD_FILE, held_out_entry
from node.policy.prompt import chat_turns, plain_text
from node.rollouts.group_buffer import texts_id
from node.swarm.swarm_folder import split_of
from protocol.credentials.manifest import SwarmManifest
from protocol.storage import replacing, write_atomically

AT_ONCE = 64
JUDGE_S = 600.0  # that judging these may take


@dataclass(slots=True)
class ExportTotals:
    """Counts of an export: rows, groups with rows, their signers, damaged files, and what was left out by reason."""

    rows: int = 0
    right: int = 0  # rows with a reward of 1
    groups: int = 0
    signers: set[str] = field(default_factory=set)
    tasks: Counter[str] = field(default_factory=Counter)  # rows of each
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{self.rows} rows of {self.groups} groups, {len(self.signers)} signers" + (
            f"; left out: {left}" if left else ""
        )


def export_rows(archive: Archive, judge: GroupJudge, out: Path, *, plain: bool) -> ExportTotals:
    """Write the archive's rows to the new file `out`, and its card beside it; return what was written.

    With `plain`, prompt and completion are texts, else turns of a chat. The file is there whole or not at all.

    Raises:
        UserError: the file is there already or named as its card is, or there is a README.md beside it.
    """
    card = out.with_name(CARD_FILE)
    if out == card:
        raise UserError(f"{out} is the name of the card beside the rows: choose another, such as rows.jsonl")
    if out.exists():
        raise UserError(f"{out} exists already: choose a folder of its own for the rows")
    if card.exists():
        raise UserError(f"the card of the rows would replace {card}: choose a folder of its own for them")
    out.parent.mkdir(parents=True, exist_ok=True)
    totals = ExportTotals()
    with replacing(out, out.with_name(f".{out.name}.{os.getpid()}.tmp"), 0o644) as file:
        for judged in _judged(archive, judge, totals):
            file.writelines(json.dumps(row).encode() + b"\n" for row in _rows(judged, judge, totals, plain=plain))
    write_atomically(card, _card(archive.manifest, totals, out.name).encode())
    return totals


def _judged(archive: Archive, judge: GroupJudge, totals: ExportTotals) -> Iterator[JudgedGroup]:
    """Yield the groups that are of use, each text once."""
    seen: set[bytes] = set()
    groups = archive.groups(lambda path, reason: totals.damaged.append((path, reason)))
    while batch := list(islice(groups, AT_ONCE)):
        for judged in judge.judge(batch, JUDGE_S):
            texts = texts_id(judged.archived.group)
            if reason := judged.reason or ("same_texts" if texts in seen else ""):
                totals.left_out[reason] += 1
                continue
            seen.add(texts)
            yield judged


def _rows(judged: JudgedGroup, judge: GroupJudge, totals: ExportTotals, *, plain: bool) -> Iterator[dict[str, Any]]:
    archived, question = judged.archived, judged.question
    assert question is not None, "the group is of use"
    group = archived.group
    prompt = plain_text(question.item) if plain else chat_turns(question.item, system_role=True)
    before = totals.rows
    for place, (episode, reward) in enumerate(zip(group.completions, judged.rewards, strict=True)):
        if reward is None or judge.quotes_held_out(judged, place):
            totals.left_out["unscorable" if reward is None else "quotes_held_out"] += 1
            continue
        totals.rows += 1
        totals.right += reward >= 1.0
        totals.tasks[group.task.name] += 1
        yield {
            "prompt": prompt,
            "completion": episode.text if plain else [{"role": "assistant", "content": episode.text}],
            "reward": float(reward),
            "finished": episode.finished,
            "task": group.task.name,
            "signer": archived.signer,
            "base": group.policy,
            "group": archived.id.hex(),
        }
    if totals.rows > before:
        totals.groups += 1
        totals.signers.add(archived.signer)


def _card(manifest: SwarmManifest, totals: ExportTotals, name: str) -> str:
    """Return the card as Markdown with the front matter that hubs of data sets read."""
    split = split_of(manifest)
    front = {
        "tags": ["gossamer", "reinforcement-learning"],
        "configs": [{"config_name": "default", "data_files": name}],
        **held_out_entry([split]),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [
        f"# Verified answers of swarm {manifest.name}",
        "",
        f"{totals.rows} answers of {totals.groups} groups, {totals.right} of them with a reward of 1, by "
        f"{len(totals.signers)} signers. Each was signed by its maker, and scored anew for this file.",
        "",
        *(f"- `{task}`: {rows} answers" for task, rows in sorted(totals.tasks.items())),
        "",
        "No row is on a question that the swarm holds out for evaluation "
        f"(share {split.share:g}, salt {split.salt}). A swarm of the same share and salt can evaluate a model that was "
        "trained on these rows.",
        "",
        f"Swarm `{manifest.swarm.hex()}`, founded by `{manifest.founder}`. `base` and `finished` are what signers "
        "claim. The texts are strangers': encode them so that none spells a special token.",
        "",
    ]
    return "\n".join(lines)
