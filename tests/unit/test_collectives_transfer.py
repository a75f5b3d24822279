"""Shared state brought up to date from several sources, in one process, with sources that fail."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from collectives.errors import Aborted, BadArgument, Mismatch
from collectives.mesh.port import SourceLost
from collectives.reduce.tensors import flatten, memory
from collectives.shared_state.selection import Share
from collectives.shared_state.state import MIN_CHUNK, SharedState, share_of
from collectives.shared_state.transfer import Answers, sync
from collectives.types import SyncStrategy
from protocol.wire.encoding import pack
from tests.fakes.ports import Room, on_threads

POPULAR = SyncStrategy.ENFORCE_POPULAR


def synchronise(states, strategies=None, fault=None, room=None):
    """Run one synchronisation of all `states`; return each member's outcome or error, none of them published."""
    strategies = strategies or {}
    shares = {member: share_of(state, strategies.get(member, POPULAR)) for member, state in states.items()}
    room = room or Room(states, fault)

    def work(member):
        return lambda: sync(room.ports[member], member, shares, states[member], strategies.get(member, POPULAR))

    results = on_threads({member: work(member) for member in states})
    room.cancel("the verdict is in")
    return results


def committed(states, **options):
    results = synchronise(states, **options)
    for outcome in results.values():
        if isinstance(outcome, Exception):
            raise outcome
        outcome.publish()
    return results


def large(seed: int, chunks: int = 9, extra: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (chunks * MIN_CHUNK + extra,), dtype=torch.uint8, generator=generator)


def test_nothing_is_received_where_nothing_drifted():
    states = {name: SharedState({"w": torch.ones(5), "m": np.zeros(3)}, revision=4) for name in "abc"}
    results = committed(states)
    assert [outcome.bytes_received for outcome in results.values()] == [0, 0, 0]
    assert [outcome.replaced for outcome in results.values()] == [False, False, False]
    assert [outcome.bytes_sent for outcome in results.values()] == [0, 0, 0]
    assert {outcome.source for outcome in results.values()} == {None}
    assert {state.synced for state in states.values()} == {4}


def test_only_the_chunks_that_differ_are_received():
    states = {name: SharedState({"w": large(0), "other": torch.ones(1000)}) for name in "abc"}
    states["b"].tensors["w"][3 * MIN_CHUNK + 7] ^= 1
    results = committed(states)
    assert torch.equal(states["b"].tensors["w"], large(0))
    assert results["b"].bytes_received == MIN_CHUNK
    assert results["a"].bytes_sent + results["c"].bytes_sent == MIN_CHUNK
    assert results["b"].source in {"a", "c"}
    assert states["b"].arrived == {}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([1, 65535], dtype=torch.uint16),
        np.arange(24, dtype=np.float16).reshape(2, 3, 4)[:, ::2],
        np.array(7, dtype=np.int64),
        torch.empty(0),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=str,
)
def test_any_tensor_is_replaced_in_place(tensor):
    torch_tensor = isinstance(tensor, torch.Tensor)
    stale = torch.zeros_like(tensor) if torch_tensor else np.zeros_like(tensor)
    states = {"a": SharedState({"x": tensor}, 1), "b": SharedState({"x": stale}, 0)}
    committed(states)
    assert states["b"].tensors["x"] is stale
    assert states["b"].revision == 1
    if torch_tensor:
        assert bytes(memory(flatten(stale))) == bytes(memory(flatten(tensor)))
    else:
        np.testing.assert_array_equal(stale, tensor)


def test_a_tensor_and_an_array_are_the_same_state():
    states = {"a": SharedState({"x": torch.arange(4.0)}), "b": SharedState({"x": np.arange(4, dtype=np.float32)})}
    assert committed(states)["b"].bytes_received == 0


def test_every_source_gives_its_part_and_a_large_table_is_asked_for():
    tensors = {f"layer.{number}.weight": torch.full((50,), float(number)) for number in range(100)} | {"w": large(1)}
    states = {name: SharedState({key: value.clone() for key, value in tensors.items()}, 2) for name in "abc"}
    states["d"] = SharedState({key: torch.zeros_like(value) for key, value in tensors.items()})
    # Every source lets its first answer wait for the others' first: so each must have been asked.
    gate = threading.Barrier(3)
    first = set()

    def fault(source, _, answer):
        if len(answer) == MIN_CHUNK and source not in first:
            first.add(source)
            gate.wait(10)
        return answer

    results = committed(states, fault=fault)
    assert all(torch.equal(states["d"].tensors[key], value) for key, value in tensors.items())
    assert all(results[name].bytes_sent > 0 for name in "abc")
    zeros = tensors["layer.0.weight"].nbytes  # is 0 in both
    assert results["d"].bytes_received == sum(value.nbytes for value in tensors.values()) - zeros
    assert states["d"].revision == states["d"].synced == 2


@pytest.mark.parametrize("way", ["refuses", "lies", "stalls"])
def test_a_bad_source_costs_nothing_but_time(way):
    states = {name: SharedState({"w": large(2)}, 1) for name in "abc"} | {"d": SharedState({"w": large(3)})}
    chunks = []
    never, asked = threading.Event(), threading.Event()

    def fault(source, _, answer):
        if len(answer) != MIN_CHUNK:
            return answer
        if source != "a":
            assert asked.wait(15), "the bad source was never asked"  # they are not done before it
            return answer
        chunks.append(source)
        asked.set()
        if way == "refuses":
            return None
        if way == "lies":
            return bytes(len(answer))
        never.wait(15)
        return answer

    outcome = committed(states, fault=fault)["d"]
    never.set()
    assert torch.equal(states["d"].tensors["w"], large(2))
    assert outcome.bytes_received == large(2).nbytes
    assert outcome.source in {"b", "c"}
    assert way == "stalls" or len(chunks) <= 4  # what was under way when it was found out


def test_no_source_left_is_an_abort_and_touches_nothing():
    states = {"a": SharedState({"w": large(2)}, 1), "d": SharedState({"w": large(3)})}
    results = synchronise(states, fault=lambda source, asker, answer: bytes(len(answer)))
    assert isinstance(results["d"], Aborted)
    assert torch.equal(states["d"].tensors["w"], large(3))


def test_an_attempt_that_is_cut_off_is_gone_on_with():
    states = {name: SharedState({"w": large(4)}, 1) for name in "ab"} | {"d": SharedState({"w": large(5)})}
    room = Room(states)
    chunks = []

    def cut(source, _, answer):
        if len(answer) == MIN_CHUNK:
            chunks.append(source)
            if len(chunks) == 6:
                room.cancel("a source died")
        return answer

    room.fault = cut
    results = synchronise(states, room=room)
    assert isinstance(results["d"], Aborted)
    assert not isinstance(results["d"], SourceLost)
    assert torch.equal(states["d"].tensors["w"], large(5))
    kept = sum(chunk.nbytes for chunk in states["d"].arrived.values())

    del states["a"]  # the source that died
    outcome = committed(states)["d"]
    assert torch.equal(states["d"].tensors["w"], large(4))
    assert outcome.bytes_received == large(4).nbytes - kept
    assert outcome.source == "b"


def test_one_that_fetched_all_before_it_was_called_off_receives_nothing_then_and_is_replaced():
    states = {"a": SharedState({"w": large(4)}, 1), "d": SharedState({"w": large(5)})}
    synchronise(states)  # and nobody publishes it
    outcome = committed(states)["d"]
    assert (outcome.bytes_received, outcome.source, outcome.replaced) == (0, None, True)
    assert torch.equal(states["d"].tensors["w"], large(4))


def test_what_members_may_differ_in_is_neither_compared_nor_fetched():
    states = {
        name: SharedState({"w": torch.ones(4), "seed": torch.tensor([at])}, allow_difference={"seed"})
        for at, name in enumerate("abc")
    }
    states["c"].tensors["w"][0] = 2.0
    committed(states)
    assert [state.tensors["seed"].item() for state in states.values()] == [0, 1, 2]
    assert states["c"].tensors["w"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("many", [False, True], ids=["table in the share", "table asked for"])
@pytest.mark.parametrize(
    ("odd", "field"),
    [
        ({"w": torch.ones(4), "x": torch.ones(1)}, "tensor 'x'"),
        ({}, "tensor 'w'"),
        ({"w": torch.ones(4).double()}, "dtype of 'w'"),
        ({"w": torch.ones(2, 2)}, "shape of 'w'"),
    ],
    ids=str,
)
def test_tensors_that_cannot_go_together_are_named(odd, field, many):
    others = {f"layer.{number}": torch.zeros(2) for number in range(100 if many else 0)}
    states = {name: SharedState({"w": torch.ones(4)} | others) for name in "ab"} | {"c": SharedState(odd | others)}
    results = synchronise(states)
    assert all(isinstance(error, Mismatch) for error in results.values())
    assert {(results[name].member, results[name].field) for name in "ab"} == {("c", field)}
    assert (results["c"].member, results["c"].field) == ("a", field)


@pytest.mark.parametrize(("layout", "claimed"), [("its own", 3 << 20), ("the others'", 5000)])
def test_a_table_that_cannot_be_ours_is_not_asked_for(layout, claimed):
    """One of 64 MiB that holds empty arrays, a byte each, would take gigabytes before it is found to be no table."""
    states = {name: SharedState({"w": torch.ones(4)}) for name in "ab"} | {"c": SharedState({"x": torch.ones(4)})}
    shares = {member: Share.decode(share_of(state, POPULAR)) for member, state in states.items()}
    layout = shares["c" if layout == "its own" else "a"].layout
    shares["c"] = replace(shares["c"], layout=layout, table_bytes=claimed, table=b"")
    encoded = {member: share.encode() for member, share in shares.items()}
    asked = []
    room = Room(states, lambda source, question, answer: asked.append(source) or answer)
    found = on_threads(
        {name: lambda name=name: sync(room.ports[name], name, encoded, states[name], POPULAR) for name in "ab"}
    )
    assert all(isinstance(error, Mismatch) and error.member == "c" for error in found.values())
    assert {(error.field, error.theirs) for error in found.values()} == {("length of the table of tensors", claimed)}
    assert not asked


def test_another_allow_difference_is_named():
    states = {"a": SharedState({"w": torch.ones(4)}), "b": SharedState({"w": torch.ones(4)}, allow_difference={"w"})}
    assert synchronise(states)["a"].field == "allow_difference of 'w'"


def test_senders_and_receivers():
    states = {"a": SharedState({"w": torch.ones(4)}), "b": SharedState({"w": torch.zeros(4)}, 1)}
    committed(states, strategies={"a": SyncStrategy.SEND_ONLY})
    assert states["b"].tensors["w"].tolist() == [1, 1, 1, 1]
    assert states["b"].revision == 0


def test_a_popular_content_at_another_revision_costs_a_number():
    states = {"a": SharedState({"w": torch.ones(4)}, 1), "b": SharedState({"w": torch.ones(4)}, 0)}
    assert committed(states)["b"].bytes_received == 0
    assert states["b"].revision == 1


def test_bad_arguments():
    with pytest.raises(BadArgument, match="revision"):
        SharedState({}, revision=-1)
    with pytest.raises(BadArgument, match="no such tensor"):
        SharedState({"w": torch.ones(1)}, allow_difference={"x"})
    with pytest.raises(BadArgument, match="cannot send a str"):
        SharedState({"w": "text"})
    state = SharedState({"w": torch.ones(1).expand(4)})
    with pytest.raises(BadArgument, match="cannot be written"):
        share_of(state, POPULAR)
    assert share_of(state, SyncStrategy.SEND_ONLY)


def test_questions_that_make_no_sense_are_refused():
    state = SharedState({"w": large(1), "own": torch.ones(3)}, allow_difference={"own"})
    share_of(state, POPULAR)
    answers = Answers(state.contents)
    odd = [
        b"",
        b"\xc1",
        pack([1, 2]),
        pack([9, 0, 0]),
        pack([2, 0, 0]),
        pack([2, 1, 99]),
        pack([1, 5, 0]),
        pack([0, 9, 0]),
    ]
    assert [answers.answer("z", question) for question in [*odd, pack([2, -1, 0]), pack(["2", 1, 0])]] == [None] * 10
    assert answers.bytes_sent == 0
    assert answers.answer("z", pack([2, 1, 0])) is not None
