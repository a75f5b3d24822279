"""The errors of collectives, as one tree. Every message says what to do next.

None of these leaves a caller's buffer changed, and none ends the process.
"""


class CollectiveError(Exception):
    """Base of everything that this package raises on purpose."""


class Aborted(CollectiveError):  # noqa: N818  # the names are the public interface
    """The operation was called off for everybody: a member failed. Call it again, with whoever is left.

    `member` is the one that sent what nobody can use, "" if there is none such.
    """

    def __init__(self, text: str = "", member: str = "") -> None:
        super().__init__(text)
        self.member = member


class DeadlineExceeded(CollectiveError):  # noqa: N818
    """The operation did not end in time, and was called off. Call it again, or allow it more time."""


class Mismatch(CollectiveError):  # noqa: N818
    """Members called the same operation with different arguments: `member` gave another `field`. Fix the caller."""

    def __init__(self, member: str, field: str, theirs: object, ours: object) -> None:
        super().__init__(
            f"member {member} gave {field} = {theirs!r}, this one {ours!r}: "
            "every member must call the operation with the same arguments"
        )
        self.member = member
        self.field = field
        self.theirs = theirs
        self.ours = ours


class NotEnoughPeers(CollectiveError):  # noqa: N818
    """Too few members are left to go on: wait for others to join, then admit them."""


class Evicted(CollectiveError):  # noqa: N818
    """The others went on without this member: `admit` waits to be let in again, then sync."""


class InDoubt(CollectiveError):  # noqa: N818
    """Whether this call counted is unknown here: the others may have its result. Call it again, or sync."""


class CommunicatorClosed(CollectiveError):  # noqa: N818
    """This member has left the group, by its own doing. Connect again."""


CALLED_OFF = (Aborted, DeadlineExceeded, Evicted, InDoubt, NotEnoughPeers)  # what trying again may mend


class BadArgument(CollectiveError, ValueError):  # noqa: N818
    """This member's own arguments cannot be used; nothing was sent. The text says what can."""
