"""How patient the members of a group are.

heartbeat   every member sends every other one something at least this often:
            n (n - 1) / heartbeat messages a second in the whole group, 40 bytes each
timeout     silence for this long is death: 6 heartbeats, so that five late ones in a row are
            forgiven. A member that is stopped (SIGSTOP), or whose process holds its interpreter
            for longer, is left out and has to be let in again
grace       a link that closed has this long to come back before its end is missed, and calls
            that nobody carries out any more do not wait longer for who is quick to return
patience    how long a proposer waits for a member's report, and a member for the decision

a dead member is out of the view within
    timeout (or grace, where its socket closed) + heartbeat (others are told) + 2 round trips
and if the proposer dies meanwhile, patience more for each that does
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    heartbeat: float
    timeout: float

    @property
    def grace(self) -> float:
        """How long a closed link may take to come back."""
        return self.heartbeat

    @property
    def patience(self) -> float:
        """How long a step of a view change may take: a member that answers at all answers within a timeout."""
        return self.timeout

    @property
    def settling(self) -> float:
        """How long after its deadline a call waits for what became of it: a view change with one dead proposer."""
        return 2 * (self.timeout + self.patience)


LAN = Timing(heartbeat=0.25, timeout=1.5)
WAN = Timing(heartbeat=1.0, timeout=6.0)
