"""The rollout codec: what goes out comes back, and nothing else comes in."""

import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.rollouts.group import (
    FORMAT,
    MAX_BEFORE_BYTES,
    MAX_COMPLETIONS,
    MAX_GROUP_BYTES,
    Episode,
    Group,
    GroupError,
    decode,
    encode,
)
from node.tasks import MAX_QUESTION_BYTES, TaskKey
from node.tasks.environments.episodes import MAX_TEXTS

names = st.text(min_size=1, max_size=20).filter(lambda text: len(text.encode()) <= 80)
counts = st.integers(0, 2**63 - 1)
rewards = st.floats(0, 1)
texts = st.lists(st.text(max_size=60), min_size=1, max_size=7).filter(lambda found: len(found) % 2 == 1).map(tuple)
completions = st.builds(Episode, texts, st.booleans(), rewards)
groups = st.builds(
    Group,
    st.builds(TaskKey, names, counts, names),
    counts,
    st.text(max_size=60),
    st.lists(completions, min_size=1, max_size=8).map(tuple),
    names,
    counts,
    kept=st.booleans(),
)


@given(groups)
def test_what_is_encoded_is_decoded(group: Group) -> None:
    assert decode(encode(group)) == group


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_group_error(data: bytes) -> None:
    with pytest.raises(GroupError):
        decode(data)


@given(groups, st.data())
def test_a_damaged_group_decodes_or_is_a_group_error(group: Group, data: st.DataObject) -> None:
    wire = bytearray(encode(group))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(wire[: data.draw(st.integers(0, len(wire)))]))
    except GroupError as error:
        assert error.reason == "malformed"


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(), inner, max_size=3))


@pytest.mark.slow
@given(st.lists(trees, min_size=10, max_size=10).map(lambda fields: [FORMAT, *fields[1:]]))
def test_well_formed_messagepack_of_the_wrong_shape_is_a_group_error(fields: list[object]) -> None:
    with pytest.raises(GroupError):
        decode(msgpack.packb(fields))


def _wire(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "format": FORMAT,
        "name": "t",
        "version": 1,
        "config": "c",
        "seed": 1,
        "question": "q",
        "completions": [[["a"], True, 1.0]],
        "policy": "p",
        "policy_version": 0,
        "kept": True,
    }
    return msgpack.packb(list((fields | changes).values()))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": FORMAT - 1},
        {"format": FORMAT + 1},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**63},
        {"name": ""},
        {"name": "n" * 300},
        {"completions": []},
        {"completions": [["a", True, 1.0]]},
        {"completions": [[["a"], True]]},
        {"completions": [[["a"], 1, 1.0]]},
        {"completions": [[["a"], True, float("nan")]]},
        {"completions": [[["a"], True, float("inf")]]},
        {"completions": [[["a"], True, 1e308]]},
        {"completions": [[["a"], True, -1e-9]]},
        {"completions": [[["a"], True, 1.0, 1.0]]},
        {"completions": [[[b"a"], True, 1.0]]},
        {"completions": [[[], True, 1.0]]},
        {"completions": [[["a", "b"], True, 1.0]]},
        {"completions": [[["a", ["b"], "c"], True, 1.0]]},
        {"completions": [[["a"] * (MAX_TEXTS + 2), True, 1.0]]},
        {"completions": [[["a", "b" * MAX_BEFORE_BYTES, "c"], True, 1.0]]},
        {"completions": {"a": 1}},
        {"question": "q" * (MAX_QUESTION_BYTES + 1)},
        {"completions": [[["a"], True, 1.0]] * (MAX_COMPLETIONS + 1)},
        {"policy": None},
        {"kept": 1},
        {"kept": None},
    ],
)
def test_each_bad_field_is_malformed(changes: dict[str, object]) -> None:
    decode(_wire())
    decode(_wire(completions=[[["a"] * MAX_TEXTS, True, 1.0]] * MAX_COMPLETIONS))
    with pytest.raises(GroupError, match="malformed"):
        decode(_wire(**changes))


def test_size_is_looked_at_before_anything_else() -> None:
    with pytest.raises(GroupError, match="oversized"):
        decode(b"\x00" * (MAX_GROUP_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(GroupError, match="malformed"):
        decode(b"\x91" * 100_000 + b"\x01")


@pytest.mark.parametrize("place", range(1, 11))
def test_a_body_of_nothing_but_arrays_costs_no_more_memory_than_its_bytes(place: int) -> None:
    arrays: object = []
    for _ in range(3):
        arrays = [arrays] * 60
    fields = msgpack.unpackb(_wire(content="h"))
    fields[place] = arrays
    body = msgpack.packb(fields)
    tracemalloc.start()
    with pytest.raises(GroupError, match="malformed"):
        decode(body)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(body) + (2 << 20)  # what msgpack reads into; a list for each byte would be 56 times the body
