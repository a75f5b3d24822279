"""`gossamer inspect`: what a node's group buffer holds, and what its model says."""

import sqlite3
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError
from node.state_folder import of_a_node
from node.telemetry.metrics_file import MetricsTail, number
from node.telemetry.rollout_log import OWN, ROLLOUTS_FILE, in_one_line, quoted, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from node.telemetry.metrics_file import Row

Place = Annotated[Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="A node's state folder.")]
GroupId = Annotated[str | None, typer.Option("--group", metavar="ID", help="Show this group; the id's start will do.")]
Last = Annotated[int, typer.Option(min=0, help="How many of the newest groups to list.")]
Own = Annotated[
    bool, typer.Option("--own", help="Show answers of the node's own model, to some questions of each round.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Show new rollouts, own and peers', while the node trains.")]
ID_DIGITS = 12
POLL = 0.3  # seconds


def inspect(  # one parameter for each option of the command
    folder: Place,
    group: GroupId = None,
    own: Own = False,
    watch: Watch = False,
    last: Last = 5,
    debug: Debug = False,
) -> None:
    """Show peers' groups, or what a node's model says.

    Texts are quoted, so they cannot control your terminal. The node may be running.

    \b
    Example:
      gossamer inspect runs/a/nodes/n0
      gossamer inspect runs/a/nodes/n0 --group 3f9a
      gossamer inspect runs/a/nodes/n0 --own --last 20
      gossamer inspect runs/a/nodes/n0 --watch
    """
    if own or watch:
        for line in _rollouts(folder, own, watch, last):
            print(line, flush=watch)
        return
    from node.rollouts.group_buffer import check_format

    path = folder / "pool.sqlite"
    if not path.exists():
        raise UserError(f"{folder} has no pool.sqlite: name a node's state folder, e.g. runs/a/nodes/n0")
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as db:
            check_format(db, path)
            lines = _one(db, group) if group else _overview(db, last, time.time())
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for line in lines:
        print(line)


def _rollouts(folder: Path, own: bool, watch: bool, last: int) -> "Iterator[str]":
    """Yield lines about the `last` newest groups in rollouts.jsonl, and with `watch` about each that is added."""
    path = folder / ROLLOUTS_FILE
    tail = MetricsTail(path)
    kept = tail.poll()
    if not kept and not (watch and folder.is_dir()):
        raise UserError(f"{folder} has no rollout in {ROLLOUTS_FILE}: name the folder of a node that has trained")

    def groups(rows: "Iterable[Row]") -> "list[list[Row]]":
        shown = (row for row in rows if row.get("whose") == OWN or not own)
        return [list(group) for _, group in groupby(shown, key=_group_key)]

    for group in groups(kept)[-last:] if last else []:
        yield from _group_lines(group)
    while watch:
        for group in groups(tail.poll()):
            yield from _group_lines(group)
        time.sleep(POLL)


def _group_key(row: "Row") -> tuple[object, ...]:
    return row["round"], row.get("whose"), row.get("task"), row.get("seed")


def _group_lines(rows: "Sequence[Row]") -> list[str]:
    first = rows[0]
    whose = str(first.get("whose"))
    age = "" if whose == OWN else f", {number(first, 'age'):.0f} s old"
    return [
        f"round {first['round']}  {quoted(str(first.get('task')))}  {quoted(whose)}{age}",
        f"  question  {quoted(str(first.get('question')))}",
        *(completion_line(number(row, "reward"), bool(row.get("finished")), texts_of(row)) for row in rows),
    ]


def completion_line(reward: float, finished: bool, texts: "Sequence[str]") -> str:
    """Return a completion in one line: its reward, how it ended, its turns, quoted."""
    return f"  reward {reward:g}  {'finished' if finished else 'cut off '}  {in_one_line(texts)}"


def _number_of(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _overview(db: sqlite3.Connection, last: int, now: float) -> list[str]:
    rows = db.execute("SELECT id, peer, task, received, length(body) FROM groups ORDER BY received DESC").fetchall()
    (used,) = db.execute("SELECT COUNT(*) FROM groups WHERE texts IN (SELECT texts FROM uses)").fetchone()
    size = sum(row[4] for row in rows)
    return [
        f"{_number_of(len(rows), 'group')}, {_number_of(size, 'byte')}, {used} of them used",
        *_counts("by task", (row[2] for row in rows)),
        *_counts("by peer", (row[1] for row in rows)),
        *(["newest"] if rows and last else []),
        *(
            f"  {ident.hex()[:ID_DIGITS]}  {max(now - received, 0):.0f} s ago  {quoted(task)} from {quoted(peer)}"
            for ident, peer, task, received, _ in rows[:last]
        ),
    ]


def _one(db: sqlite3.Connection, start: str) -> list[str]:
    from node.rollouts.group import GroupError, decode

    if not all(digit in "0123456789abcdef" for digit in start.lower()):
        raise UserError(f"a group's id is hexadecimal, got {start!r}: `gossamer inspect FOLDER` lists some")
    row = db.execute(
        "SELECT id, peer, body FROM groups WHERE lower(hex(id)) LIKE ? || '%'", (start.lower(),)
    ).fetchall()
    if len(row) != 1:
        raise UserError(
            f"{len(row)} groups have an id that starts with {start}: give {'more' if row else 'other'} digits"
        )
    ident, peer, body = row[0]
    try:
        group = decode(body, len(body))
    except GroupError as error:
        raise UserError(f"group {ident.hex()} cannot be decoded: {error}") from None
    return [
        f"group     {ident.hex()}",
        f"from      {quoted(peer)}, policy {quoted(group.policy)} version {group.policy_version}",
        f"task      {quoted(group.task.name)} version {group.task.version}, config {quoted(group.task.config)}",
        f"seed      {group.seed}",
        f"question  {quoted(group.question)}",
        *(
            completion_line(completion.reward, completion.finished, completion.texts)
            for completion in group.completions
        ),
    ]


def _counts(title: str, values: "Iterable[str]") -> list[str]:
    return [title, *(f"  {count:6}  {quoted(value)}" for value, count in Counter(values).most_common())]
