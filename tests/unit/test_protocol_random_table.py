"""The table of the address book: it holds what a dict would, and is walked in random order."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from protocol.membership.address_book import RandomTable

KEYS = st.integers(0, 9)


@given(steps=st.lists(st.tuples(st.booleans(), KEYS, st.integers())), seed=st.integers())
def test_it_holds_what_a_dict_would_and_walks_over_each_once(steps: list[tuple[bool, int, int]], seed: int) -> None:
    table: RandomTable[int, int] = RandomTable()
    model: dict[int, int] = {}
    for puts, key, value in steps:
        if puts:
            table.put(key, value)
            model[key] = value
        else:
            assert table.pop(key) == model.pop(key, None)
    walked = list(table.shuffled(random.Random(seed)))
    assert len(walked) == len(table) == len(model) and dict(walked) == model
    assert dict(table.items()) == model and list(table.values()) == list(model.values())
    assert all((key in table) is (key in model) and table.get(key) == model.get(key) for key in range(10))


def test_every_order_is_as_likely() -> None:
    table: RandomTable[str, None] = RandomTable()
    for key in "abcd":
        table.put(key, None)
    rng = random.Random(1)
    orders = Counter("".join(key for key, _ in table.shuffled(rng)) for _ in range(24_000))
    assert len(orders) == 24 and all(850 < count < 1150 for count in orders.values())  # 1000 each, deviation 31


def test_a_walk_costs_what_is_taken() -> None:
    table: RandomTable[int, None] = RandomTable()
    for key in range(100_000):
        table.put(key, None)
    rng = Draws(1)
    walk = table.shuffled(rng)
    assert len({next(walk)[0] for _ in range(5)}) == 5 and rng.count == 5


class Draws(random.Random):
    """Counts what is drawn."""

    count = 0

    def random(self) -> float:
        self.count += 1
        return super().random()
