"""Direct exchange and small messages: one value, the same bits everywhere, within bounds of float64."""

import sys
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from collectives.agreement.events import Perform
from collectives.agreement.messages import MAX_SHARE_BYTES
from collectives.agreement.views import Member, OpId, View
from collectives.errors import Aborted, BadArgument
from collectives.mesh.shared_memory import Arena, is_possible
from collectives.operations import AllReduce, Known
from collectives.reduce import direct, inline, kernels, shared
from collectives.reduce.codecs import Feedback
from collectives.reduce.inline import goes_inline, pack_values, reduce_inline
from collectives.reduce.kernels import Scratch, cut, describe
from collectives.reduce.tensors import DTYPES, publish_pieces
from collectives.types import Codec, Op
from tests.collectives_ports import Network, members, together

SMALL_CHUNK = 2048
STEP = {Codec.NONE: 0.0, Codec.FLOAT16: 2.0**-10, Codec.BFLOAT16: 2.0**-7, Codec.INT8: 1 / 126}
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22, torch.float64: 2.0**-50}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in little data."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", SMALL_CHUNK)
    monkeypatch.setattr(shared, "CHUNK_BYTES", SMALL_CHUNK)
    monkeypatch.setattr(shared, "WINDOW_BYTES", 0)
    monkeypatch.setattr(shared, "LEAST_WINDOW", 2)


ALGORITHMS = [direct, inline, *([shared] if is_possible() else [])]
needs_shared_memory = pytest.mark.skipif(not is_possible(), reason="Linux on x86-64")


def given_values(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    if dtype.is_floating_point:
        signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
        return (values * signs).to(dtype)
    return (values * 20).to(dtype)


def expected(op: Op, given: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    stack = torch.stack([values.double() for values in given])
    weight = torch.tensor(weights, dtype=torch.float64)[:, None]
    return {
        Op.SUM: lambda: stack.sum(0),
        Op.AVG: lambda: (stack * weight).sum(0) / weight.sum(),
        Op.PROD: lambda: stack.prod(0),
        Op.MIN: lambda: stack.amin(0),
        Op.MAX: lambda: stack.amax(0),
    }[op]()


def run(algorithm, given, op, codec=Codec.NONE, weights=None, seed=0, queue=0):
    order = members(len(given))
    weights = weights or [1.0] * len(given)
    job = describe(order, given[0].dtype, op, dict(zip(order, weights, strict=True)), codec)
    if algorithm is inline:
        shares = {member: pack_values(values) for member, values in zip(order, given, strict=True)}
        return [reduce_inline(job, given[0].numel(), shares) for _ in order]
    if algorithm is shared:
        return in_shared_memory(job, given)
    return together(order, lambda port, i: algorithm.all_reduce(port, job, given[i], Scratch()), seed=seed, queue=queue)


def in_shared_memory(job, given):
    bays = {member: Arena.make().bays[0] for member in job.order}

    def work(port, i):
        result = torch.empty(given[i].numel(), dtype=job.dtype)
        publish_pieces(shared.all_reduce(port, job, given[i], bays).parts, result)
        return result

    return together(job.order, work)


def assert_alike(results: list[torch.Tensor]) -> None:
    for result in results:
        assert torch.equal(result.view(torch.uint8), results[0].view(torch.uint8)), "members have different bits"


@settings(max_examples=250, deadline=None)
@given(
    algorithm=st.sampled_from(ALGORITHMS),
    world=st.integers(1, 5),
    count=st.sampled_from((0, 1, 2, 255, 256, 257, 1023, 3001)),
    dtype=st.sampled_from(list(DTYPES.values())),
    op=st.sampled_from(Op),
    codec=st.sampled_from(Codec),
    seed=st.integers(0, 2**16),
    queue=st.sampled_from((0, 1, 2)),
    data=st.data(),
)
def test_any_reduction_is_that_of_float64_and_the_same_everywhere(
    algorithm, world, count, dtype, op, codec, seed, queue, data
):
    assume(algorithm is not shared or (codec is Codec.NONE and world > 1))
    given = [given_values(count, dtype, seed + i) for i in range(world)]
    weights = data.draw(st.lists(st.sampled_from((0.0, 0.5, 1.0, 3.0)), min_size=world, max_size=world).filter(any))
    results = run(algorithm, given, op, codec, weights, seed, queue)
    assert_alike(results)
    assert results[0].dtype is dtype
    exact = expected(op, given, weights)
    if dtype.is_floating_point:
        largest = max((float(values.double().abs().max()) for values in given if count), default=0.0)
        # PROD multiplies the values' errors by the other members' values.
        scale = largest**world if op is Op.PROD else largest * world
        bound = scale * (EPSILON[dtype] * world + STEP[codec] * 2 * world)
        assert not count or float((results[0].double() - exact).abs().max()) <= bound
    else:
        bits = dtype.itemsize * 8
        whole = exact.trunc() if op is Op.AVG else exact
        wrapped = [int(value) % 2**bits for value in whole.tolist()]
        assert [value % 2**bits for value in results[0].tolist()] == wrapped


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_wrap_around_and_64_bits_stay_exact(algorithm):
    given = [torch.tensor([2**63 - 1, -(2**63), 5, 2**53 + 1], dtype=torch.int64)] * 3
    assert run(algorithm, given, Op.MAX)[0].tolist() == given[0].tolist()
    assert run(algorithm, given, Op.SUM)[0].tolist()[0] == 2**63 - 3
    assert run(algorithm, given, Op.AVG)[0].tolist()[0] > 2**63 - 2**11, "must not go past the end"


@pytest.mark.parametrize(
    ("algorithm", "codec"),
    [
        (algorithm, codec)
        for algorithm in ALGORITHMS
        for codec in Codec
        if algorithm is not shared or codec is Codec.NONE
    ],
)
def test_nan_and_infinity_pass(algorithm, codec):
    given = [torch.ones(600) * (i + 1) for i in range(3)]
    given[1][5], given[2][300], given[0][599] = torch.nan, torch.inf, -torch.inf
    for op in (Op.SUM, Op.AVG, Op.MIN, Op.MAX):
        result = run(algorithm, given, op, codec)[0]
        assert result[5].isnan()
        assert not result[6].isnan()
        if op in (Op.SUM, Op.AVG):
            assert result[300] == torch.inf
            assert result[599] == -torch.inf


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_member_of_weight_zero_does_not_count_even_with_nan(algorithm):
    given = [torch.full((300,), value) for value in (1.0, torch.nan, 3.0)]
    for weights, mean in (([1.0, 0.0, 1.0], 2.0), ([1.0, 0.0, 3.0], 2.5), ([0.0, 0.0, 7.0], 3.0)):
        results = run(algorithm, given, Op.AVG, weights=weights)
        assert_alike(results)
        assert results[0].tolist() == [mean] * 300


def test_weights_at_the_end_of_their_range_have_a_mean():
    results = run(
        direct, [torch.zeros(300), torch.ones(300)], Op.AVG, weights=[sys.float_info.max / 2, sys.float_info.max]
    )
    assert_alike(results)
    assert results[0].tolist() == [pytest.approx(2 / 3)] * 300


def test_no_weight_at_all_is_an_error_that_says_so():
    with pytest.raises(BadArgument, match="weight 0"):
        describe(members(2), torch.float32, Op.AVG, dict.fromkeys(members(2), 0.0), Codec.NONE)


def test_sixteen_bit_floats_are_rounded_once():
    # 2048 + 1 is 2048 in float16, whichever way it is rounded: a sum that rounds at each step stays there.
    given = [torch.tensor([2048.0], dtype=torch.float16)] + [torch.tensor([1.0], dtype=torch.float16)] * 4
    for algorithm in ALGORITHMS:
        assert run(algorithm, given, Op.SUM)[0].tolist() == [2052.0]


def test_large_values_of_sixteen_bits_have_a_mean():
    given = [torch.tensor([60000.0], dtype=torch.float16)] * 4
    for algorithm in ALGORITHMS:
        assert run(algorithm, given, Op.AVG)[0].tolist() == [60000.0]


def test_the_values_given_are_not_written_to():
    given = [given_values(3001, torch.float32, i) for i in range(3)]
    copies = [values.clone() for values in given]
    run(direct, given, Op.AVG, Codec.INT8, [1.0, 2.0, 0.5])
    assert all(torch.equal(one, other) for one, other in zip(given, copies, strict=True))


@needs_shared_memory
@settings(max_examples=30, deadline=None)
@given(
    world=st.integers(2, 5),
    count=st.sampled_from((1, 257, 3001, 40_000)),
    dtype=st.sampled_from(list(DTYPES.values())),
    op=st.sampled_from(Op),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_shared_memory_gives_the_bits_of_the_direct_exchange(world, count, dtype, op, seed, data):
    given = [given_values(count, dtype, seed + i) for i in range(world)]
    weights = data.draw(st.lists(st.sampled_from((0.0, 0.5, 1.0)), min_size=world, max_size=world).filter(any))
    results = [*run(shared, given, op, weights=weights), *run(direct, given, op, weights=weights)]
    assert_alike(results)


@needs_shared_memory
@pytest.mark.parametrize("world", [2, 4])
def test_one_reduction_after_the_other_in_the_same_memory(world):
    """Nobody waits between them, and members are not equally fast: what is overwritten too soon would show."""
    order = members(world)
    bays = {member: Arena.make().bays[0] for member in order}
    sizes = [1, 257, 40_000, 3001, 90_000, 90_000, 256, 12_345] * 4

    def work(port, i):
        room = shared.Room(bays)
        sums = []
        for number, count in enumerate(sizes):
            values = torch.arange(count, dtype=torch.float64) + i * number
            job = describe(order, values.dtype, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
            publish_pieces(room.all_reduce(port, job, values, number).parts, values)
            sums.append(values)
        return sums

    for sums in together(order, work):
        for number, (count, found) in enumerate(zip(sizes, sums, strict=True)):
            expected_sum = torch.arange(count, dtype=torch.float64) * world + number * sum(range(world))
            assert torch.equal(found, expected_sum)


@needs_shared_memory
@pytest.mark.parametrize("world", [2, 3])
def test_operations_of_every_kind_one_after_the_other_in_the_same_memory(world):
    order = members(world)
    bays = {member: Arena.make().bays[0] for member in order}
    rng = Random(world)
    kinds = [rng.choice(("all_reduce", "reduce_scatter", "all_gather", "broadcast", "gather")) for _ in range(60)]
    sizes = [rng.choice((8, 264, 3000, 40_000)) for _ in kinds]

    def work(port, i):
        room, own = shared.Room(bays), order[i]
        for number, (kind, count) in enumerate(zip(kinds, sizes, strict=True)):
            values = torch.arange(count, dtype=torch.float64) + i * number
            base, added = torch.arange(count, dtype=torch.float64), number * sum(range(world))
            job = describe(order, values.dtype, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
            if kind == "all_reduce":
                publish_pieces(room.all_reduce(port, job, values, number).parts, values)
                assert torch.equal(values, base * world + added)
            elif kind == "reduce_scatter":
                part = room.reduce_scatter(port, job, [values + 7 * j for j in range(world)], number)
                assert torch.equal(part, (base + 7 * i) * world + added)
            else:
                givers = order[1:2] if kind == "broadcast" else order
                takers = order[:1] if kind == "gather" else order
                lengths = {member: values.nbytes if member in givers else 0 for member in order}
                outs = {member: torch.empty_like(values) for member in givers if member != own and own in takers}
                wanted = {member: out.view(torch.uint8) for member, out in outs.items()}
                room.move(port, values.view(torch.uint8)[: lengths[own]], wanted, lengths, number)
                for member, out in outs.items():
                    assert torch.equal(out, base + order.index(member) * number)

    together(order, work)


@needs_shared_memory
def test_counters_of_the_same_memory_start_again_at_zero_after_32_bits():
    order = members(2)
    bays = {member: Arena.make().bays[0] for member in order}
    for bay in bays.values():
        bay.given.write(2**32 - 3)
        bay.reduced.write(2**32 - 3)

    def work(port, i):
        room = shared.Room(bays)
        room._bases = {(member, name): 2**32 - 3 for member in order for name in ("given", "reduced")}
        job = describe(order, torch.float64, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
        for number in range(3):
            values = torch.full((20_000,), i + 1.0, dtype=torch.float64)
            publish_pieces(room.all_reduce(port, job, values, number).parts, values)
            assert (values == 3.0).all()

    together(order, work)
    assert all(bay.given.read() < 200 for bay in bays.values())


@needs_shared_memory
def test_a_member_that_asks_for_something_else_in_the_same_memory_is_found_out():
    order = members(2)
    bays = {member: Arena.make().bays[0] for member in order}

    def work(port, i):
        job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
        with pytest.raises(Aborted, match=r"called another operation|it is off"):
            shared.Room(bays).all_reduce(port, job, torch.ones(3001), asked=i)
        port.cancel("it is off")

    together(order, work)


@needs_shared_memory
def test_a_call_that_is_off_ends_a_wait_for_anothers_memory():
    order = members(2)
    job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
    bays = {member: Arena.make().bays[0] for member in order}

    def work(port, i):
        if i == 1:
            port.cancel("member1 is gone")
        else:
            shared.all_reduce(port, job, torch.ones(5000), bays)

    with pytest.raises(Aborted, match="member1 is gone"):
        together(order, work)


def test_a_cancelled_port_ends_everybody():
    order = members(3)
    job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)

    def work(port, i):
        if i == 1:
            port.cancel("member1 is gone")
        direct.all_reduce(port, job, torch.ones(5000), Scratch())

    with pytest.raises(Aborted, match="member1 is gone"):
        together(order, work)


@pytest.mark.parametrize("world", [2, 64, 256])
def test_the_room_for_others_values_is_bounded_however_many_there_are(world, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1 << 20)
    order = members(world)
    job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
    taken = []

    class Measured(Scratch):
        def take(self, count, dtype):
            taken.append(count * dtype.itemsize)
            return torch.empty(count, dtype=dtype)  # addresses: nothing is written

    class Nobody:
        own = order[0]

        def expect(self, source, slot, into):
            raise Aborted("enough")

    with pytest.raises(Aborted):
        direct.all_reduce(Nobody(), job, torch.empty(world * (8 << 18)), Measured())  # 8 MiB of each
    assert taken[1] <= direct.MOST_BYTES


def test_slices_are_equal_in_whole_blocks():
    assert cut(2560, 3) == [(0, 768), (768, 1792), (1792, 2560)]
    assert cut(100, 3)[-1][1] == 100
    assert cut(0, 2) == [(0, 0), (0, 0)]


def test_small_values_travel_with_the_agreement():
    assert goes_inline(0, 256)
    assert goes_inline(1024, 8)
    assert not goes_inline(MAX_SHARE_BYTES, 2), "a share says more than the values"
    assert not goes_inline(16 << 10, 64), "the coordinator would send too much"


def test_each_byte_is_sent_once():
    order = members(4)
    job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
    count = 4 * 256 * 16

    def work(port, i):
        direct.all_reduce(port, job, torch.ones(count), Scratch())
        return port.bytes_sent, port.bytes_received

    assert together(order, work) == [(2 * 3 * count, 2 * 3 * count)] * 4  # 2 (n - 1) / n of 4 bytes a value


@pytest.mark.parametrize("op", [Op.SUM, Op.AVG])
def test_with_feedback_errors_do_not_pile_up(op):
    order, rounds = members(3), 30
    weights = dict(zip(order, (1.0, 2.0, 0.5), strict=True))
    job = describe(order, torch.float32, op, weights, Codec.INT8)
    given = [given_values(777, torch.float32, i) for i in range(3)]
    exact = expected(op, given, list(weights.values()))

    def total_error(with_feedback: bool) -> float:
        kept = [Feedback() for _ in order]

        def work(port, i):
            feedback = kept[i] if with_feedback else None
            result = direct.all_reduce(port, job, given[i], Scratch(), feedback=feedback)
            if feedback:
                feedback.commit()
            return result.double()

        total = sum(together(order, work)[0] for _ in range(rounds))
        return float((total / rounds - exact).abs().max())

    assert total_error(True) < total_error(False) / 5


def test_feedback_of_an_aborted_call_stays_as_it_was():
    feedback = Feedback()
    feedback.start(torch.ones(4), Op.SUM, torch.float32)
    feedback.lost(0, torch.tensor([1.0, torch.nan, torch.inf, 2.0]), torch.tensor([0.5, torch.nan, torch.inf, 2.0]))
    feedback.commit()
    assert feedback.residual.tolist() == [0.5, 0.0, 0.0, 0.0]
    feedback.start(torch.ones(4), Op.SUM, torch.float32)
    feedback.lost(0, torch.ones(4), torch.zeros(4))
    feedback.abort()
    feedback.commit()
    assert feedback.residual.tolist() == [0.5, 0.0, 0.0, 0.0]
    with pytest.raises(BadArgument, match="each tensor"):
        feedback.start(torch.ones(5), Op.SUM, torch.float32)
    with pytest.raises(BadArgument, match="SUM and AVG"):
        feedback.start(torch.ones(4), Op.MAX, torch.float32)


def all_reduce_of(feedback, *, weight=1.0, op=Op.AVG):
    options = {"op": op, "out": None, "weight": weight, "codec": Codec.INT8, "feedback": feedback}
    return AllReduce(Known(), members(2), torch.ones(300), **options)


def test_what_a_call_that_was_called_off_collected_is_not_kept_by_the_next():
    feedback = Feedback()
    feedback.start(torch.ones(300), Op.AVG, torch.float32)
    feedback.lost(0, torch.ones(300), torch.zeros(300))
    order = members(2)
    jobs = [all_reduce_of(feedback, weight=0.0), all_reduce_of(None)]
    view = View(b"group", 1, b"the mark", tuple(Member(member, "", b"session!") for member in order))
    shares = {member: job.share for member, job in zip(order, jobs, strict=True)}
    start = Perform(OpId(view.mark, 1, 0, 0), "all_reduce", view, shares)
    for job, outcome in zip(jobs, together(order, lambda port, i: jobs[i].perform(start, port)), strict=True):
        job.publish(outcome)
    assert feedback.residual is None


def test_feedback_that_does_not_fit_is_refused_before_anything_is_sent():
    used = Feedback()
    used.start(torch.ones(4), Op.SUM, torch.float32)
    used.commit()
    with pytest.raises(BadArgument, match="each tensor"):
        all_reduce_of(used)
    with pytest.raises(BadArgument, match="SUM and AVG"):
        all_reduce_of(Feedback(), op=Op.MAX)


def test_a_share_of_another_length_is_refused():
    order = members(2)
    job = describe(order, torch.float32, Op.SUM, dict.fromkeys(order, 1.0), Codec.NONE)
    with pytest.raises(Aborted, match="member1"):
        reduce_inline(job, 2, {order[0]: bytes(8), order[1]: bytes(4)})


def test_scratch_is_taken_again_and_bounded():
    scratch = Scratch(limit=10_000)
    first = scratch.take(1000, torch.float32)
    where = first.data_ptr()
    scratch.give(first)
    again = scratch.take(900, torch.float32)
    assert again.data_ptr() == where
    assert scratch.take(900, torch.float32).data_ptr() != where
    scratch.give(again)
    scratch.give(torch.empty(2000))
    assert scratch.take(900, torch.float32).data_ptr() != where, "the older one went when the bound was passed"


def test_the_network_of_these_tests_tells_a_slot_used_twice():
    network = Network()
    one, other = members(2)
    network.send(one, other, 1, memoryview(b"x"))
    with pytest.raises(AssertionError, match="twice"):
        network.send(one, other, 1, memoryview(b"x"))
