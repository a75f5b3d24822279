"""A line now and then on how training goes, for the person who watches a node's log."""

from typing import Any

from node.telemetry.metrics_file import Row, number

INTERVAL_S = 10.0  # between two lines; a round that takes longer gets a line of its own


class RoundLog:
    """Sums the rounds since the last line.

    Args:
        now: when training begins, seconds of a monotonic clock.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._rows: list[Row] = []

    def after_round(self, row: Row, now: float) -> dict[str, Any] | None:
        """Take in the round that ended at `now`; return the fields of a line where one is due.

        Rewards are means over the rounds since the last line, groups are their sums, tokens are those that this node
        generated, times are by the clock. Own answers that could not be scored, or took
        too long, are counted if there are any.
        """
        self._rows.append(row)
        rounds, seconds = len(self._rows), now - self._since
        if seconds < INTERVAL_S:
            return None
        tokens = sum(number(row, "tokens_generated") for row in self._rows)
        fields: dict[str, Any] = {
            "round": row["round"],
            "reward": round(sum(number(row, "reward") for row in self._rows) / rounds, 3),
            "own": sum(int(number(row, "groups_local")) for row in self._rows),
            "external": sum(int(number(row, "groups_external")) for row in self._rows),
            "peers": int(number(row, "swarm/peers")),
            "s_per_round": float(f"{seconds / rounds:.3g}"),
            "tokens_per_s": round(tokens / seconds),
        }
        for name in ("unscorable", "out_of_time"):
            if count := sum(int(number(row, name)) for row in self._rows):
                fields[name] = count
        self._since, self._rows = now, []
        return fields
