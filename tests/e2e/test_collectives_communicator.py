"""Communicators over real sockets: founding, joining, every operation, every error."""

import gc
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from collectives import (
    Aborted,
    Codec,
    Communicator,
    CommunicatorClosed,
    DeadlineExceeded,
    Evicted,
    Mismatch,
    Op,
    Protection,
    SharedState,
    SyncStrategy,
)
from collectives.calls import Handle
from collectives.errors import BadArgument, CollectiveError
from collectives.mesh.addresses import BadAddress
from collectives.reduce.codecs import Feedback
from collectives.types import LAN
from protocol.identity import Identity
from tests.groups import group, join, together
from tests.other_device import treat_as_on_a_device
from tests.waiting import wait_until

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int64]


@pytest.fixture(scope="module")
def three():
    with group(3) as comms:
        yield comms


def test_a_founder_is_a_group_of_one_and_its_operations_are_its_own():
    with Communicator.connect("test") as comm:
        assert (comm.world_size, comm.members, comm.epoch) == (1, (comm.node_id,), 1)
        assert not comm.pending()
        for count in (3, 1 << 18):
            x = torch.arange(count, dtype=torch.float32)
            result = comm.all_reduce(x)
            assert result.value is x and torch.equal(x, torch.arange(count, dtype=torch.float32))
            assert result.contributors == (comm.node_id,)
        assert comm.barrier().contributors == (comm.node_id,)
        assert comm.all_gather(np.ones(2)).value.shape == (1, 2)


def test_members_agree_on_who_they_are(three):
    assert len({comm.members for comm in three}) == 1 and len({comm.epoch for comm in three}) == 1
    assert three[0].members == tuple(sorted(comm.node_id for comm in three))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 1000, 300_000])
def test_all_reduce_of_every_size(three, dtype, count):
    inputs = [(torch.arange(count) % 50 + 7 * i).to(dtype) for i in range(3)]
    expected = (sum(x.double() for x in inputs)).to(dtype)
    results = together(*(lambda c=c, x=x: c.all_reduce(x, op=Op.SUM) for c, x in zip(three, inputs, strict=True)))
    for result, x in zip(results, inputs, strict=True):
        assert result.value is x and torch.equal(x, expected)
        assert result.contributors == three[0].members and result.epoch == three[0].epoch
        assert (result.bytes_sent > 0) is (count > 0)


def test_weights_out_and_layouts(three):
    inputs = [np.full((4, 6), float(i + 1))[:, ::2] for i in range(3)]
    outs = [np.zeros((4, 3)) for _ in range(3)]
    results = together(
        *(lambda i=i: three[i].all_reduce(inputs[i], out=outs[i], weight=[2, 0, 1][i]) for i in range(3))
    )
    for i in range(3):
        assert results[i].value is outs[i] and np.allclose(outs[i], 5 / 3) and (inputs[i] == i + 1).all()


def test_values_on_a_device_are_copied_and_it_is_filled_on_commit_only(three, monkeypatch):
    treat_as_on_a_device(monkeypatch)
    for x, out in (
        (torch.ones(300_000), None),
        (torch.ones(300_000), torch.zeros(300_000)),
        (torch.ones(700, 300).t(), None),
        (torch.ones(10), None),
    ):
        own = [(x.clone(), None if out is None else out.clone()) for _ in three]
        work = (
            lambda c=c, x=x, out=out, i=i: c.all_reduce(x, op=Op.AVG, out=out, weight=float(i))
            for i, (c, (x, out)) in enumerate(zip(three, own, strict=True))
        )
        for result, (x, out) in zip(together(*work), own, strict=True):
            assert result.value is (x if out is None else out) and (result.value == 1).all() and (x == 1).all()
    feedbacks = [Feedback() for _ in three]
    summed = together(
        *(
            lambda c=c, f=f: c.all_reduce(torch.ones(5000), Op.SUM, codec=Codec.INT8, feedback=f)
            for c, f in zip(three, feedbacks, strict=True)
        )
    )
    assert all(torch.allclose(done.value, torch.full((5000,), 3.0), atol=0.1) for done in summed)
    gathered = together(*(lambda c=c, i=i: c.all_gather(torch.full((5,), float(i))) for i, c in enumerate(three)))
    assert {tuple(done.value.sum(1).sort().values.tolist()) for done in gathered} == {(0.0, 5.0, 10.0)}
    given = [torch.full((300_000,), float(i)) for i in range(3)]
    root = three[1].node_id
    together(*(lambda c=c, x=x: c.broadcast(x, root) for c, x in zip(three, given, strict=True)))
    assert all((x == 1).all() for x in given)
    kept = [torch.ones(300_000) for _ in three]
    together(*(lambda c=c, x=x: c.all_reduce(x, weight=0.0) for c, x in zip(three, kept, strict=True)))
    assert all((x == 1).all() for x in kept)


@pytest.mark.parametrize("codec", [codec for codec in Codec if codec is not Codec.NONE])
def test_a_codec_gives_all_the_same_bits(three, codec):
    inputs = [torch.linspace(-1, i + 1, 100_000) for i in range(3)]
    expected = sum(inputs) / 3
    results = together(*(lambda c=c, x=x: c.all_reduce(x, codec=codec) for c, x in zip(three, inputs, strict=True)))
    assert torch.equal(results[0].value, results[1].value) and torch.equal(results[0].value, results[2].value)
    assert torch.allclose(results[0].value, expected, atol=0.03)
    assert results[0].bytes_sent < 3 * 100_000


def test_many_operations_in_flight_are_told_apart_by_tag(three):
    def act(comm, i):
        inputs = {tag: torch.full((20_000 * (tag % 3 + 1),), float(tag + i)) for tag in range(8)}
        order = list(inputs) if i else list(inputs)[::-1]
        handles = {tag: comm.all_reduce_async(inputs[tag], op=Op.SUM, tag=tag) for tag in order}
        return {tag: handle.wait(30).value.unique().tolist() for tag, handle in handles.items()}

    results = together(*(lambda c=c, i=i: act(c, i) for i, c in enumerate(three)))
    assert results == [{tag: [3.0 * tag + 3] for tag in range(8)}] * 3


def test_one_call_a_tag_at_a_time(three):
    handle = three[0].all_reduce_async(torch.ones(3), tag=5, timeout=20)
    assert not handle.done()
    with pytest.raises(TimeoutError, match="goes on"):
        handle.wait(0.01)
    with pytest.raises(Exception, match="tag 5"):
        three[0].all_reduce(torch.ones(3), tag=5)
    together(*(lambda c=c: c.all_reduce(torch.ones(3), tag=5) for c in three[1:]))
    assert handle.wait(10).value.tolist() == [1, 1, 1] and handle.done()


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_values_that_cannot_be_reduced_are_gathered_broadcast_and_shared(three, dtype):
    def be(number):
        comm, own = three[number], torch.tensor([0.0, number, 1.0]).to(dtype)
        gathered = comm.all_gather(own).value
        root = comm.members[0]
        comm.broadcast(shown := own.clone(), root)
        state = SharedState({"w": own.clone()}, revision=int(comm.node_id == root))
        comm.sync_state(state)
        return comm.node_id, plain(gathered).tolist(), shown, state

    def plain(values):
        return (values.real if dtype.is_complex else values).float()

    told = together(*(lambda n=n: be(n) for n in range(3)))
    numbers = {told[number][0]: plain(torch.tensor(float(number)).to(dtype)).item() for number in range(3)}
    first = torch.tensor([0.0, numbers[three[0].members[0]], 1.0]).to(dtype)
    for _, gathered, shown, state in told:
        assert gathered == [[0.0, numbers[member], 1.0] for member in three[0].members]
        for values in (shown, state.tensors["w"]):
            assert torch.equal(values.view(torch.uint8), first.view(torch.uint8))
    with pytest.raises(BadArgument, match="cannot reduce"):
        three[0].all_reduce(first)


def test_gather_broadcast_and_barrier(three):
    gathered = together(*(lambda c=c, i=i: c.all_gather(torch.full((2, 50_000), i)) for i, c in enumerate(three)))
    for result in gathered:
        assert result.value.shape == (3, 2, 50_000)
        by_member = dict(zip(result.contributors, result.value, strict=True))
        assert all((by_member[comm.node_id] == i).all() for i, comm in enumerate(three))
    root = three[1].node_id
    tensors = [torch.full((200_000,), float(i)) for i in range(3)]
    together(*(lambda c=c, x=x: c.broadcast(x, root) for c, x in zip(three, tensors, strict=True)))
    assert all((x == 1).all() for x in tensors)
    assert all(result.value is None for result in together(*(comm.barrier for comm in three)))
    errors = together(*(lambda c=c: c.broadcast(torch.ones(1), "a" * 32) for c in three))
    assert all(isinstance(error, BadArgument) for error in errors)


def test_shared_state_comes_to_whoever_lacks_it(three):
    states = [SharedState({"w": torch.full((500_000,), float(i == 2))}, revision=0) for i in range(3)]
    results = together(*(lambda c=c, s=s: c.sync_state(s) for c, s in zip(three, states, strict=True)))
    assert [result.bytes_received for result in results] == [0, 0, 2_000_000]
    assert results[2].source in {three[0].node_id, three[1].node_id}
    assert all((state.tensors["w"] == 0).all() for state in states)
    again = together(
        *(lambda c=c, s=s: c.sync_state(s, SyncStrategy.ENFORCE_POPULAR) for c, s in zip(three, states, strict=True))
    )
    assert [result.bytes_received for result in again] == [0, 0, 0]


@pytest.fixture(scope="module")
def two():
    with group(2) as comms:
        yield comms


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        ("count", lambda c: c.all_reduce(torch.ones(4))),
        ("dtype", lambda c: c.all_reduce(torch.ones(3, dtype=torch.float64))),
        ("op", lambda c: c.all_reduce(torch.ones(3), op=Op.MAX)),
        ("codec", lambda c: c.all_reduce(torch.ones(3), codec=Codec.INT8)),
        ("kind", lambda c: c.all_gather(torch.ones(3))),
        ("step", lambda c: c.all_reduce(torch.ones(3), step=1)),
    ],
)
def test_of_two_that_differ_each_is_told_of_the_other_and_of_the_field(two, field, odd):
    x = torch.ones(3)
    errors = together(lambda: two[0].all_reduce(x), lambda: odd(two[1]))
    for error, other in zip(errors, reversed(two), strict=True):
        assert isinstance(error, Mismatch) and (error.field, error.member) == (field, other.node_id)
        assert other.node_id in str(error) and field in str(error)
    assert x.tolist() == [1, 1, 1]
    assert all(not isinstance(r, Exception) for r in together(*(comm.barrier for comm in two)))


def test_a_member_that_skipped_a_step_is_told_so_and_is_in_nobodys_mean(three):
    x = torch.ones(3)
    calls = [lambda c=c, n=n: c.all_reduce(x, step=n) for c, n in zip(three, (7, 7, 8), strict=True)]
    *others, skipped = together(*calls)
    assert isinstance(skipped, Mismatch) and (skipped.field, skipped.theirs, skipped.ours) == ("step", 7, 8)
    assert all(isinstance(error, Aborted) and "gave step = 8, and the others 7" in str(error) for error in others)
    assert x.tolist() == [1, 1, 1]
    # Once it is left out the others' calls count, until it comes back.
    wait_until(lambda: three[2].outside and three[0].world_size == three[1].world_size == 2, 10, "it to be out")
    assert [r.value.tolist() for r in together(*(lambda c=c: c.all_reduce(x, out=x + 1) for c in three[:2]))] == [
        [1] * 3
    ] * 2
    assert isinstance(together(three[2].barrier)[0], Evicted)
    assert together(*(lambda c=c: c.wait_for(3) for c in three)) == [None] * 3


def test_an_owner_that_hangs_is_left_out_and_told_and_the_others_see_when_it_last_called():
    with group(3, timing=replace(LAN, hang=1.0)) as comms:
        hung, *others = comms
        calls = []
        while not calls or any(isinstance(end, CollectiveError) for end in calls[-1]):
            assert len(calls) < 6, calls
            calls.append(together(*(lambda c=c: c.all_reduce(torch.ones(3), timeout=1.6) for c in others)))
        # In the fourth call they have waited for three time-outs; one of them may have begun to wait later.
        assert len(calls) >= 3 and all(isinstance(end, DeadlineExceeded) for ends in calls[:2] for end in ends), calls
        assert {result.contributors for result in calls[-1]} == {others[0].members}
        assert hung.node_id not in others[0].members
        with pytest.raises(Evicted, match=r"waited \d\.\d s for its calls, the last one all_reduce"):
            hung.barrier()
        signs = others[0].health()
        assert signs.keys() == {others[1].node_id}
        assert signs[others[1].node_id].called < 5 and signs[others[1].node_id].beat < 5
        assert together(*(lambda c=c: c.wait_for(3) for c in comms)) == [None] * 3


def test_a_call_that_others_make_too_late_ends_at_its_deadline_for_all(three):
    x = torch.ones(100_000)
    with pytest.raises(DeadlineExceeded):
        three[0].all_reduce(x, timeout=0.5)
    assert (x == 1).all()
    # It was one operation, and it has one verdict: who comes late is told at once, and nobody is a call ahead.
    late = together(*(lambda c=c: c.all_reduce(torch.ones(100_000)) for c in three[1:]))
    assert all(isinstance(error, DeadlineExceeded) for error in late)
    results = together(*(lambda c=c: c.all_reduce(torch.ones(3), op=Op.SUM) for c in three))
    assert [result.value.tolist() for result in results] == [[3, 3, 3]] * 3


def test_bad_arguments_are_refused_before_anything_is_sent(three):
    comm = three[0]
    for call in (
        lambda: comm.all_reduce([1, 2]),
        lambda: comm.all_reduce(torch.ones(2, dtype=torch.bool)),
        lambda: comm.all_reduce(torch.ones(2), out=torch.ones(3)),
        lambda: comm.all_reduce(torch.ones(2), weight=float("nan")),
        lambda: comm.all_reduce(torch.ones(2), tag=-1),
    ):
        with pytest.raises(BadArgument):
            call()
    with pytest.raises(DeadlineExceeded):
        comm.barrier(timeout=0)


def test_all_weights_zero_is_told_to_all(three):
    errors = together(*(lambda c=c: c.all_reduce(torch.ones(3), weight=0.0) for c in three))
    assert all(isinstance(error, BadArgument) for error in errors)


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("streams", [1, 4])
def test_every_kind_of_link_carries_every_byte(protection, streams):
    with group(2, protection=protection, streams=streams) as comms:
        inputs = [torch.randint(0, 1 << 30, (3_000_001,), dtype=torch.int64) for _ in comms]
        expected = inputs[0] + inputs[1]
        together(*(lambda c=c, x=x: c.all_reduce(x, op=Op.SUM) for c, x in zip(comms, inputs, strict=True)))
        assert torch.equal(inputs[0], expected) and torch.equal(inputs[1], expected)


@pytest.mark.parametrize("host", ["[::1]", "localhost"])
def test_ipv6_and_a_host_name_which_others_are_told_as_the_address_that_it_has_here(host):
    with group(2, listen=f"tcp://{host}:0") as comms:
        assert re.match(r"tcp://(\[::1\]|127\.)", comms[0].address)
        results = together(*(lambda c=c: c.all_reduce(torch.ones(100_000), op=Op.SUM) for c in comms))
        assert all((result.value == 2).all() for result in results)


def test_a_seed_may_say_who_must_answer():
    with Communicator.connect("test") as founder:
        wrong = Identity.generate().node_id
        with pytest.raises(DeadlineExceeded, match="other_id"):
            Communicator.connect("test", seeds=[f"{founder.address}?id={wrong}"], timeout=1)
        right = f"{founder.address}?id={founder.node_id}"
        with Communicator.connect("test", seeds=[right], timeout=10) as second:
            assert second.world_size == 2


@pytest.mark.parametrize(
    "options",
    [
        {"group": "another"},
        {"group": "test", "protection": "authenticated"},
        {"group": "test", "secret": "a secret"},
        {"group": "test", "may_join": lambda _: False},
    ],
)
def test_who_does_not_fit_is_not_let_in(options):
    with Communicator.connect("test") as founder:
        with pytest.raises(DeadlineExceeded, match="no seed answered"):
            Communicator.connect(seeds=[founder.address], timeout=1, **options)
        assert founder.world_size == 1 and not founder.pending()


def test_a_group_with_a_secret_is_for_those_who_know_it():
    with group(2, secret="a secret") as comms:
        for wrong in (None, "another"):
            with pytest.raises(DeadlineExceeded, match="no seed answered"):
                Communicator.connect("test", seeds=[comms[0].address], secret=wrong, timeout=1)
        results = together(*(lambda c=c: c.all_reduce(torch.ones(100_000), op=Op.SUM) for c in comms))
        assert all((result.value == 2).all() for result in results)
    with pytest.raises(BadArgument, match="secret"):
        Communicator.connect("test", secret="")


def test_a_member_that_may_no_longer_be_one_is_hung_up_on_and_does_not_come_back():
    barred = set()
    with group(3, may_join=lambda node: node not in barred) as comms:
        together(*(lambda c=c: c.all_reduce(torch.ones(3)) for c in comms))
        barred.add(comms[2].node_id)
        stay = comms[:2]
        wait_until(lambda: {comm.world_size for comm in stay} == {2}, 20, "it to be out")
        results = together(*(lambda c=c: c.all_reduce(torch.ones(100_000), op=Op.SUM) for c in stay))
        assert all((result.value == 2).all() for result in results)
        assert not any(comm.pending() for comm in stay)


def test_a_predicate_that_fails_admits_nobody_and_ends_nothing():
    def fail(_):
        raise KeyError("a defect of the owner's")

    with Communicator.connect("test", may_join=fail) as founder:
        with pytest.raises(DeadlineExceeded, match="no seed answered"):
            Communicator.connect("test", seeds=[founder.address], timeout=1)
        assert founder.barrier().contributors == (founder.node_id,)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "tcp://", "tcp://h:x", "tcp://h:1/p", "udp://h:1", "tcp://h:1?id=x"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(BadAddress):
        Communicator.connect("test", seeds=[address])


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "."])
def test_a_name_that_no_host_can_have_is_dialled_in_vain_and_ends_nothing(host):
    with Communicator.connect("test", secret="a secret") as comm:
        comm.meet([f"tcp://{host}:1"])
        seeds = [f"tcp://{host}:1", comm.address]
        with Communicator.connect("test", seeds, secret="a secret", timeout=10) as second:
            wait_until(lambda: comm.world_size == second.world_size == 2, 10, "the second to be in")


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://127.example:0"])
def test_a_group_that_anybody_may_join_stays_on_one_machine(address):
    with pytest.raises(BadArgument, match=r"not on loopback.*give secret=, or may_join="):
        Communicator.connect("test", listen=address)
    elsewhere = address.replace(":0", ":1")
    with pytest.raises(BadArgument, match="not on loopback"):
        Communicator.connect("test", seeds=[elsewhere])
    with Communicator.connect("test") as comm, pytest.raises(BadArgument, match="not on loopback"):
        comm.meet([elsewhere])
    for options in ({"secret": "a secret"}, {"may_join": lambda _: True}):
        if "example" not in address:
            Communicator.connect("test", listen=address, **options).leave()


def test_a_port_that_is_taken_is_said_so():
    with Communicator.connect("test") as comm, pytest.raises(BadAddress, match="cannot listen"):
        Communicator.connect("test", listen=comm.address)


def test_strangers_on_the_port_change_nothing():
    with Communicator.connect("test") as comm:
        host, port = comm.address.removeprefix("tcp://").split(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(20)]
        for i, stranger in enumerate(strangers):
            stranger.sendall([b"GET / HTTP/1.1\r\n\r\n", b"GSMC" + bytes(36), b"", b"\xff" * 10_000][i % 4])
        with Communicator.connect("test", seeds=[comm.address], timeout=10) as second:
            assert second.world_size == 2
        for stranger in strangers:
            stranger.close()


def test_leave_waits_for_the_threads_of_handles(monkeypatch):
    """One that is in torch while Python ends would end the process by a signal."""
    run = Handle._run
    monkeypatch.setattr(Handle, "_run", lambda handle: (run(handle), threading.Event().wait(0.3)))
    with group(2) as comms:
        handle = comms[0].all_reduce_async(torch.ones(3))
        comms[0].leave()
        assert not handle.thread.is_alive()


def test_a_member_that_leaves_is_missed_at_once_and_its_calls_end():
    with group(3) as comms:
        handle = comms[2].all_reduce_async(torch.ones(3))
        comms[2].leave()
        with pytest.raises(CommunicatorClosed):
            handle.wait(5)
        with pytest.raises(CommunicatorClosed):
            comms[2].all_reduce(torch.ones(3))
        comms[2].leave()  # twice is as good as once
        results = together(*(lambda c=c: c.all_reduce(torch.ones(3), op=Op.SUM, tag=1) for c in comms[:2]))
        assert [result.value.tolist() for result in results] == [[2, 2, 2]] * 2
        assert comms[0].world_size == comms[1].world_size == 2


@pytest.mark.parametrize("last", ["barrier", "broadcast", "sync_state"])
def test_the_last_call_counts_for_all_where_each_member_leaves_as_soon_as_it_returns(last):
    with group(3) as comms:
        root = comms[0].node_id

        def end(comm):
            x = torch.full((100_000,), float(comm.node_id == root))
            state = SharedState({"x": x}, revision=int(comm.node_id == root))
            {
                "barrier": comm.barrier,
                "broadcast": lambda: comm.broadcast(x, root),
                "sync_state": lambda: comm.sync_state(state),
            }[last]()
            comm.leave()
            return x if last != "barrier" else torch.ones(1)

        values = together(*(lambda c=c: end(c) for c in comms))
        assert all(torch.is_tensor(x) and (x == 1).all() for x in values), values


def test_a_reduction_that_has_not_started_when_a_member_leaves_goes_on_among_the_others():
    with group(3) as comms:
        inputs = [torch.full((50_000,), float(i)) for i in range(3)]
        first = [comm.all_reduce_async(x, op=Op.SUM, timeout=20) for comm, x in zip(comms[:2], inputs, strict=False)]
        comms[2].leave()
        assert all((handle.wait(10).value == 1).all() for handle in first)


def test_groups_of_one_name_that_meet_become_one():
    with group(2) as comms, Communicator.connect("test") as alone, Communicator.connect("other") as stranger:
        together(*(lambda c=c: c.all_reduce(torch.ones(3)) for c in comms))
        alone.meet([f"{comms[0].address}?id={comms[0].node_id}", stranger.address, "tcp://127.0.0.1:9"])
        wait_until(lambda: all(comm.pending() for comm in comms), 20, "the smaller group to ask to be let in")
        wait_until(lambda: alone.world_size == 0, 20, "it to have left its own, which its owner may see a moment later")
        assert together(*(comm.admit for comm in comms)) == [None] * 2
        wait_until(lambda: alone.world_size == 3, 20, "it to be in")
        results = together(*(lambda c=c: c.all_reduce(torch.ones(3), op=Op.SUM) for c in (*comms, alone)))
        assert [result.value.tolist() for result in results] == [[3, 3, 3]] * 3
        assert stranger.world_size == 1
        with pytest.raises(BadAddress):
            alone.meet(["nowhere"])


def test_members_that_do_nothing_but_admit_let_all_newcomers_in():
    size, comms = 8, [Communicator.connect("test")]

    def admit(comm):
        while comm.world_size < size:
            with suppress(Aborted):  # a member that had no turn on a busy machine for long is left out, and comes back
                comm.admit(timeout=60)

    def come():
        comm = Communicator.connect("test", seeds=[comms[0].address], timeout=60)
        comms.append(comm)
        admit(comm)

    try:
        began = time.monotonic()
        assert together(lambda: admit(comms[0]), *[come] * (size - 1)) == [None] * size
        assert time.monotonic() - began < 30  # no call had to wait for its deadline
        assert {comm.world_size for comm in comms} == {size}
    finally:
        for comm in comms:
            comm.leave()


def test_an_admission_passes_those_who_wait_in_a_reduction():
    with group(3) as comms:
        began = time.monotonic()

        def admit_and_reduce():
            comms[0].admit()
            return comms[0].all_reduce(torch.ones(3))

        results = together(admit_and_reduce, *(lambda c=c: c.all_reduce(torch.ones(3)) for c in comms[1:]))
        assert time.monotonic() - began < 15  # half of what they allow
        assert {result.contributors for result in results} == {comms[0].members}


def resources():
    gc.collect()
    return threading.active_count(), psutil.Process().num_fds()


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_nothing_stays_behind_of_members_that_come_and_go(times):
    with Communicator.connect("test") as founder:
        with join([founder]) as second:
            together(*(lambda c=c: c.all_reduce(torch.ones(100_000)) for c in (founder, second)))
        wait_until(lambda: founder.world_size == 1, 10, "the second to be gone")
        before = resources()
        for i in range(times):
            second = join([founder])
            if i % 2:
                second.leave()
            del second  # also when it is only forgotten
            gc.collect()
            wait_until(lambda: founder.world_size == 1, 10, "the view without it")
        few = times // 2  # a thread or socket of something else may have come; one that each left behind would show

        def given_back():
            return all(now <= was + few for now, was in zip(resources(), before, strict=True))

        wait_until(given_back, 10, "threads and sockets to be given back")
