"""`gossamer inspect`: what a node's pool holds."""

import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

Place = Annotated[Path, typer.Argument(metavar="FOLDER", help="A node's state folder.")]
GroupId = Annotated[str | None, typer.Option("--group", metavar="ID", help="Show this group; the id's start will do.")]
Last = Annotated[int, typer.Option(min=0, help="How many of the newest groups to list.")]
ID_DIGITS = 12


def inspect(folder: Place, group: GroupId = None, last: Last = 5, debug: Debug = False) -> None:
    """Look at the groups that a node got from its peers: how many by task and by peer, or one of them.

    Texts are quoted: a peer's words cannot act on your terminal. The node may be running.

    \b
    Example:
      gossamer inspect runs/a/nodes/n0
      gossamer inspect runs/a/nodes/n0 --group 3f9a
    """
    path = folder / "pool.sqlite"
    if not path.exists():
        raise UserError(f"{folder} has no pool.sqlite: name a node's state folder, e.g. runs/a/nodes/n0")
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as db:
            lines = _one(db, group) if group else _overview(db, last, time.time())
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for line in lines:
        print(line)


def _overview(db: sqlite3.Connection, last: int, now: float) -> list[str]:
    rows = db.execute("SELECT id, peer, task, received, length(body) FROM groups ORDER BY received DESC").fetchall()
    (used,) = db.execute("SELECT COUNT(*) FROM groups WHERE question IN (SELECT question FROM uses)").fetchone()
    size = sum(row[4] for row in rows)
    return [
        f"{len(rows)} groups, {size} bytes, {used} of them used",
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
    found = db.execute(
        "SELECT id, peer, body FROM groups WHERE lower(hex(id)) LIKE ? || '%'", (start.lower(),)
    ).fetchall()
    if len(found) != 1:
        raise UserError(
            f"{len(found)} groups have an id that starts with {start}: give {'more' if found else 'other'} digits"
        )
    ident, peer, body = found[0]
    try:
        group = decode(body)
    except GroupError as error:
        raise UserError(f"group {ident.hex()} cannot be decoded: {error}") from None
    return [
        f"group     {ident.hex()}",
        f"from      {quoted(peer)}, policy {quoted(group.policy)} version {group.policy_version}",
        f"task      {quoted(group.task.name)} version {group.task.version}, config {quoted(group.task.config)}",
        f"seed      {group.seed}",
        f"question  {quoted(group.question)}",
        *(
            f"  reward {one.reward:g}  {'finished' if one.finished else 'cut off '}  {quoted(one.text)}"
            for one in group.completions
        ),
    ]


def quoted(text: str) -> str:
    """Return a peer's text with every character outside printable ASCII escaped."""
    return ascii(text)[1:-1]


def _counts(title: str, values: "Iterable[str]") -> list[str]:
    return [title, *(f"  {count:6}  {quoted(value)}" for value, count in Counter(values).most_common())]
