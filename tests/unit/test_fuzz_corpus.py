"""The fuzzer's corpus, again and again: nothing but typed errors comes of it, and good inputs reach their targets."""

from tests.fuzz.corpus import FOUND, example, inputs
from tests.fuzz.targets import DECLARED, TARGETS, try_one

GOOD = list(inputs())[: -len(FOUND) or None]


def test_nothing_but_the_typed_errors_comes_of_it() -> None:
    for data in inputs():
        for end in {len(data), len(data) // 2, 1}:
            try_one(data[:end])


def test_each_message_that_is_declared_says_what_its_good_body_says() -> None:
    for message in DECLARED.values():
        assert message.decode(example(message)).encode() == example(message)


def test_each_target_takes_a_good_input_and_each_message_that_is_declared_is_a_target() -> None:
    for data in GOOD:
        TARGETS[data[0]](data[1:])
    assert {data[0] for data in GOOD} == set(TARGETS) and set(DECLARED) < set(TARGETS)
