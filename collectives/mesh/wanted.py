"""When somebody who is wanted is dialled again."""

from dataclasses import dataclass

PAUSE_S, MAX_PAUSE_S = 0.1, 3.0  # between tries: doubled from the one up to the other


@dataclass(slots=True)
class Wanted:
    """An address that is tried until `until`."""

    next_try: float
    until: float
    tries: int = 0
    trying: bool = False

    def pause(self, now: float) -> None:
        """A try has failed."""
        self.trying = False
        self.tries += 1
        self.next_try = now + min(PAUSE_S * 2 ** min(self.tries, 10), MAX_PAUSE_S)
