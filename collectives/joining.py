"""Before a member is inside, and what members agree on about those who are not."""

from dataclasses import dataclass

from collectives.driver import Control
from collectives.errors import DeadlineExceeded

FLAGS = {False: b"\0", True: b"\1"}  # before each share: does its sender know of anybody who waits?


@dataclass(frozen=True, slots=True)
class Pending:
    """What the last operation that counted said of who waits, the same at all members of its view."""

    mark: bytes = b""
    pending: bool = False
    since: float = float("-inf")


def wait_inside(control: Control, timeout: float) -> None:
    """Wait until the group has let this member in.

    Raises:
        DeadlineExceeded: nobody did; the message says what is known of the reason.
    """
    with control.changed:
        if control.changed.wait_for(lambda: control.standing.view is not None, timeout):
            return
    found = control.linked()
    if found:
        raise DeadlineExceeded(f"{found} members know of this one, but none called admit() in {timeout:g} s")
    said = ", ".join(f"{reason} ({count})" for reason, count in control.refused().items())
    raise DeadlineExceeded(
        f"no seed answered in {timeout:g} s: check the addresses, the group's name and `encrypt`"
        + (f"; connections ended with: {said}" if said else "")
    )
