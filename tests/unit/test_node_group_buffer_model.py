"""The group buffer beside a simple model of what it promises, through whatever a node may do with it.

The model is told which groups are still in the buffer, and knows nothing else of it. What may be drawn follows from
its own books. Whether a group's uses are too many follows from a plain list of them.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from node.config import BufferConfig
from node.rollouts import group_buffer
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.rule import Candidate
from node.tasks import TaskKey

PEER_SHARE = group_buffer.MAX_PEER_SHARE
MAX_AGE = 8.0
MAX_BYTES = 1 << 16
TEXTS = 5  # different groups, two on a question; the last is so large that few of it fit
LARGE = 17_000
PEERS = "abc"
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would be waited for at every opening

texts = st.integers(0, TEXTS - 1)
fresh = st.tuples(texts, st.sampled_from(PEERS))
batches = st.lists(fresh, min_size=1, max_size=5)
places = st.lists(st.integers(0, 7), min_size=1, max_size=3)
what_a_round_meets = {
    "batch": batches,
    "later": st.integers(1, 2),
    "again": st.booleans(),
    "places": places,
    "lies": st.booleans(),
    "took": st.sampled_from([0.0, 0.0, 3.0]),
}


def group_of(text: int, policy: str) -> Group:
    """Group number `text`, by its texts; another `policy` makes it another item with the same texts."""
    size = LARGE if text == TEXTS - 1 else 1
    made = (one_turn(str(text) * size, True, 1.0), one_turn("", True, 0.0))
    return Group(TaskKey("t", 1, "c"), 0, f"{text // 2}", made, policy, 0)


@dataclass(frozen=True)
class Held:
    """A group that came: which texts it has, whose it is, when it came as the buffer counts time, its first round."""

    id: bytes
    text: int
    peer: str
    received: float
    first_round: int
    size: int


class Buffer(RuleBasedStateMachine):
    """A buffer that rounds draw from, and the books that the model keeps of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        self.now = 100.0
        self.round = 0  # the last that was done
        self.came: list[Held] = []  # in their order, without those that the buffer has dropped
        self.uses: list[tuple[int, int, float]] = []  # texts, round, time as the buffer counts it
        self.used: list[tuple[int, int, float]] = []  # texts, round, time by the clock
        self.buried: dict[bytes, int] = {}
        self.items = 0

    @initialize(
        max_groups=st.sampled_from([2, 6, 50]),
        share=st.sampled_from([0.5, 1.0]),
    )
    def open(self, max_groups: int, share: float) -> None:
        group_buffer.MAX_PEER_SHARE = share
        self.bounds = BufferConfig(max_age=MAX_AGE, max_groups=max_groups, max_bytes=MAX_BYTES)
        self.buffer = self.opened(self.folder / "pool.sqlite")

    def opened(self, path: Path) -> GroupBuffer:
        return GroupBuffer(path, self.bounds)

    def teardown(self) -> None:
        group_buffer.MAX_PEER_SHARE = PEER_SHARE
        if hasattr(self, "buffer"):
            self.buffer.close()
        shutil.rmtree(self.folder)

    @property
    def time(self) -> float:
        """The time as the buffer counts it: never before its newest group came."""
        return max([self.now, *(item.received for item in self.came[-1:])])

    def forget(self) -> None:
        """Forget uses that are older than a group may be, by the clock."""
        self.used = [item for item in self.used if item[2] >= self.now - MAX_AGE]

    def expected(self, round_number: int) -> list[Held]:
        """What the round may draw, by the books."""
        used = {text for text, *_ in self.uses}
        found: dict[int, Held] = {}
        for item in self.came:
            if item.text in used or item.id in self.buried or item.received < self.time - MAX_AGE:
                continue
            if item.first_round <= round_number:
                found.setdefault(item.text // 2, item)
        return list(found.values())

    def drawn(self, round_number: int) -> list[Candidate]:
        """What the buffer lets the round draw: as the books say, and no question twice."""
        found = self.buffer.candidates(self.now, round_number)
        assert [item.id for item in found] == [item.id for item in self.expected(round_number)]
        assert len({item.question for item in found}) == len(found)
        return found

    def do_a_round(
        self, batch: list[tuple[int, str]], later: int, again: bool, places: list[int], lies: bool, took: float
    ) -> None:
        """Groups come, and the round trains on some of what is here; the first of these may be found a lie."""
        self.add(batch, later, again)
        self.round += 1
        found = self.drawn(self.round)
        chosen = list({place % len(found): found[place % len(found)] for place in places if found}.values())
        if lies:
            self.bury([item.id for item in chosen[:1]])
            chosen = chosen[1:]
        self.time_goes_on(took)
        self.use(chosen)

    # Hypothesis leaves out some of the rules in each run: one of these three is nearly always there.
    round_1 = rule(**what_a_round_meets)(do_a_round)
    round_2 = rule(**what_a_round_meets)(do_a_round)
    round_3 = rule(**what_a_round_meets)(do_a_round)

    def add(self, batch: list[tuple[int, str]], later: int, again: bool) -> None:
        """Add groups under ids that are new, and with `again` one of them once more as it is."""
        shared = []
        for text, peer in batch:
            self.items += 1
            group = group_of(text, f"policy {self.items}")
            shared.append(ReceivedGroup(self.items.to_bytes(4, "big"), peer, self.now, group, encode(group)))
        used = {text for text, *_ in self.uses}
        new = [item for item, (text, _) in zip(shared, batch, strict=True) if text not in used]
        held = {item.id for item in self.came}
        repeated = [item for item in self.came[-1:] if again]
        for one in repeated:
            group = group_of(one.text, "again")
            shared.append(ReceivedGroup(one.id, "a", self.now, group, encode(group)))
        assert self.buffer.add(shared, self.now, self.round + later) == len(new)
        for one, (text, peer) in zip(shared, batch, strict=False):
            if one in new and one.id not in held:
                self.came.append(Held(one.id, text, peer, self.time, self.round + later, len(one.body)))
        self.see_what_was_dropped()

    def see_what_was_dropped(self) -> None:
        """Note which groups are gone: none may be, unless a bound or a quota was full. Check that all bounds hold."""
        fits = self.fits(self.came) and all(item.received >= self.time - MAX_AGE for item in self.came)
        gone = {item.id for item in self.came if item.id not in self.buffer}
        assert not (fits and gone)
        self.came = [item for item in self.came if item.id not in gone]
        self.buried = {key: number for key, number in self.buried.items() if key not in gone}
        assert self.fits(self.came)
        assert all(item.received >= self.time - MAX_AGE for item in self.came)

    def fits(self, held: list[Held]) -> bool:
        bounds, share = self.bounds, group_buffer.MAX_PEER_SHARE
        of_peers = [[candidate.size for candidate in held if candidate.peer == peer] for peer in PEERS]
        return (
            len(held) <= bounds.max_groups
            and sum(map(sum, of_peers)) <= bounds.max_bytes
            and all(len(sizes) <= max(bounds.max_groups * share, 1) for sizes in of_peers)
            and all(sum(sizes) <= bounds.max_bytes * share for sizes in of_peers)
        )

    def bury(self, ids: list[bytes]) -> None:
        self.buffer.bury(ids, self.round)
        self.buried |= dict.fromkeys(ids, self.round)

    def use(self, drawn: list[Candidate]) -> None:
        """Use these groups, and check that none was used before."""
        time, known = self.time, {item.id: item.text for item in self.came}
        self.buffer.use(drawn, self.round, self.now)
        for one in drawn:
            text = known[one.id]
            assert all(used != text for used, *_ in self.used), "it is used twice"
            self.used.append((text, self.round, self.now))
            self.uses.append((text, self.round, time))
        self.uses = [use for use in self.uses if use[2] >= time - MAX_AGE]
        self.see_what_was_dropped()

    @precondition(lambda self: self.came)
    @rule(peer=st.sampled_from(PEERS))
    def put_a_signer_out(self, peer: str) -> None:
        """Bury all groups of a liar, as found out by the round that was done last."""
        self.bury([signer.id for signer in self.buffer.of_signers({peer})])
        assert not [candidate for candidate in self.drawn(self.round + 1) if candidate.peer == peer]

    @precondition(lambda self: self.came)
    @rule(back=st.integers(0, 3))
    def go_on_from_an_older_checkpoint(self, back: int) -> None:
        self.round = max(0, self.round - back)
        self.buffer.rewind(self.round)
        self.uses, self.used = ([use for use in uses if use[1] <= self.round] for uses in (self.uses, self.used))
        self.buried = {key: number for key, number in self.buried.items() if number <= self.round}

    @precondition(lambda self: self.came)
    @rule()
    def restart(self) -> None:
        self.buffer.close()
        self.buffer = self.opened(self.folder / "pool.sqlite")

    @precondition(lambda self: self.came)
    @rule(seconds=st.sampled_from([0.5, 3.0, MAX_AGE]))
    def wait(self, seconds: float) -> None:
        self.time_goes_on(seconds)

    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds
        self.forget()

    @precondition(lambda self: self.came)
    @rule(seconds=st.sampled_from([1.0, 2 * MAX_AGE]))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.now -= seconds

    @invariant()
    def what_may_be_drawn_is_what_the_books_say(self) -> None:
        if hasattr(self, "buffer"):
            self.drawn(self.round + 1)
            assert len(self.buffer) == len(self.came) - len(self.buried)
            assert set(self.buffer.signers) == {candidate.peer for candidate in self.came}


def test_it_keeps_what_it_promises_whatever_comes_and_whenever_it_is_opened_again() -> None:
    # A failing run is shown as it is, since shrinking it takes minutes.
    phases = set(Phase) - {Phase.shrink, Phase.explain}
    run_state_machine_as_test(Buffer, settings=settings(max_examples=50, stateful_step_count=25, phases=phases))
