"""Any tensor or array, flat and back; what cannot be reduced is refused; gather and broadcast."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.errors import BadArgument
from collectives.reduce import kernels
from collectives.reduce.codecs import BLOCK, coder_for
from collectives.reduce.gather import all_gather, broadcast
from collectives.reduce.kernels import Scratch
from collectives.reduce.tensors import (
    DTYPES,
    MOVED,
    check_target,
    dtype_name,
    flatten,
    fresh,
    memory,
    publish,
    publish_pieces,
)
from collectives.types import Codec
from tests.collectives_ports import members, together

CODECS = [codec for codec in Codec if codec is not Codec.NONE]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (4, 5), (2, 3, 4)])
def test_flat_and_back(name, shape):
    x = (torch.arange(int(np.prod(shape))) % 100).reshape(shape).to(DTYPES[name])
    assert dtype_name(x) == name
    flat = flatten(x)
    assert flat.shape == (x.numel(),)
    assert len(memory(flat)) == x.numel() * x.itemsize
    back = fresh(x, x.shape)
    publish(flat, back)
    assert torch.equal(back.view(torch.uint8) if shape else back, x.view(torch.uint8) if shape else x)
    if name != "bfloat16":
        array = x.numpy()
        assert dtype_name(array) == name
        again = fresh(array, array.shape)
        publish(flatten(array), again)
        assert np.array_equal(again, array)


def test_any_layout_is_read_and_written_in_its_own_order():
    base = torch.arange(24.0).reshape(4, 6)
    arrays = base.numpy().copy()
    for x, y in ((base.t(), base.clone().t()), (base[:, ::2], base.clone()[:, ::2])):
        assert flatten(x).tolist() == x.reshape(-1).tolist()
        publish(flatten(x) * 2, y)
        assert torch.equal(y, x * 2)
    for view in (arrays.T, arrays[::-1], arrays[:, ::-2]):
        assert flatten(view).tolist() == view.reshape(-1).tolist()
        wanted = view * 3
        publish(flatten(view) * 3, view)
        assert np.array_equal(view, wanted)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(20.0).view(4, 5)[:1, 2],
        torch.from_numpy(np.zeros(0)),
        np.arange(4.0)[::-1][:1],
        np.ones((4, 5))[:1],
    ],
    ids=["one element", "none", "one of a reversed array", "one row"],
)
def test_one_element_or_row_may_have_any_stride(x):
    flat = flatten(x)
    assert len(memory(flat)) == flat.numel() * flat.itemsize
    wanted = (flat + 1).tolist()
    publish_pieces([((0, flat.numel()), flat + 1)], x)
    assert flatten(x).tolist() == wanted


def test_a_contiguous_tensor_is_not_copied_and_one_with_gradients_may_be_written():
    x = torch.zeros(8)
    assert flatten(x).data_ptr() == x.data_ptr()
    parameter = torch.nn.Parameter(torch.zeros(3))
    publish(torch.ones(3), check_target(parameter, None))
    assert parameter.tolist() == [1.0, 1.0, 1.0]


def test_a_tensor_made_under_inference_mode_is_filled_by_a_thread_that_is_not_in_it():
    with torch.inference_mode():
        x = torch.zeros(3)
        publish(torch.ones(3), check_target(x, None))
        assert x.tolist() == [1.0, 1.0, 1.0]
    publish(torch.ones(3) * 2, check_target(x, None))
    assert x.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        np.ones(2, dtype=">f4"),
        np.ones(2, dtype=np.longdouble),
        np.array(["a"]),
        np.array([object()]),
        [1.0, 2.0],
        3.0,
    ],
    ids=lambda x: str(getattr(x, "dtype", type(x))),
)
def test_what_cannot_be_sent_is_refused_with_what_can(x):
    with pytest.raises(BadArgument, match="float32"):
        flatten(x)


@pytest.mark.parametrize("name", sorted(MOVED.keys() - DTYPES.keys()))
def test_what_can_be_sent_and_not_be_reduced_is_told_apart_and_keeps_its_bytes(name):
    x = torch.tensor([0.0, 1.0, -1.5, 7.0]).to(MOVED[name])
    assert dtype_name(x) == name
    with pytest.raises(BadArgument, match="cannot reduce"):
        dtype_name(x, DTYPES)
    flat = flatten(x)
    assert flat.dtype is x.dtype and bytes(memory(flat)) == bytes(x.view(torch.uint8).numpy())
    publish(flat, target := torch.zeros_like(x))
    assert torch.equal(target.view(torch.uint8), x.view(torch.uint8))


def test_a_lazy_conjugate_is_sent_as_it_looks():
    assert flatten(torch.tensor([1 + 2j]).conj()).tolist() == [1 - 2j]


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3).expand(2, 3),
        torch.zeros(5).unfold(0, 3, 1),
        torch.zeros(9).as_strided((2, 3), (2, 1)),
        np.lib.stride_tricks.as_strided(np.zeros(5), (3, 3), (8, 8)),
        np.lib.stride_tricks.as_strided(np.zeros(5), (3,), (4,)),
    ],
)
def test_a_target_whose_elements_share_memory_is_refused(x):
    with pytest.raises(BadArgument, match="writable out="):
        check_target(x, None)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(()),
        torch.zeros(3, 0).expand(4, 3, 0),
        torch.zeros(1).expand(1, 1),
        torch.zeros(4, 3, 2).permute(2, 0, 1),
        torch.zeros(6).unfold(0, 3, 3),
        torch.zeros(4, 6)[::2, 1::2],
        np.zeros((4, 6))[::-1, ::-2],
        np.zeros((2, 3), order="F"),
        np.zeros(0),
    ],
)
def test_a_target_of_any_other_layout_is_taken(x):
    assert check_target(x, None) is x


def test_a_target_must_hold_the_result():
    x = torch.ones(2, 3)
    assert check_target(x, None) is x
    for out in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(BadArgument, match="like the input"):
            check_target(x, out)
    fixed = np.ones(3)
    fixed.flags.writeable = False
    for target in (torch.ones(1).expand(3), fixed):
        with pytest.raises(BadArgument, match="writable"):
            check_target(target, None)
    assert flatten(fixed).tolist() == [1.0] * 3, "reading is fine"


def bounds(codec, rows, step):
    """The documented bound of each value."""
    finite = np.isfinite(rows)
    safe = np.where(finite, rows, 0)
    largest = np.abs(safe).max(1, keepdims=True)
    if codec is Codec.FLOAT16:
        return 2.0**-11 * np.abs(safe) + 2.0**-39 * largest + step
    if codec is Codec.BFLOAT16:
        return 2.0**-8 * np.abs(safe) + step
    marked = ~finite.all(1, keepdims=True)
    assert codec is Codec.INT8
    return largest / np.where(marked, 252, 254) + 2.0**-20 * largest + 128 * step


@settings(max_examples=300, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    double=st.booleans(),
    count=st.sampled_from((0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)),
    exponent=st.integers(-150, 127),
    offset=st.sampled_from((0.0, 0.0, 1.0, -3.0)),
    specials=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from((np.nan, np.inf, -np.inf))), max_size=6),
    seed=st.integers(0, 2**16),
)
def test_codecs_keep_their_bounds_and_lose_no_special_value(codec, double, count, exponent, offset, specials, seed):
    dtype = torch.float64 if double else torch.float32
    largest = torch.finfo(dtype).max
    rng = np.random.default_rng(seed)
    scale = 2.0 ** (exponent * (8 if double else 1) if exponent * 8 < 1023 else exponent)
    plain = np.clip((rng.uniform(-1, 1, count) + offset) * scale, -largest, largest)
    values = torch.from_numpy(plain).to(dtype)
    for at, value in specials:
        if count:
            values[at % count] = value
    coder = coder_for(codec, dtype)
    data = coder.encode(values)
    before = data.clone()
    assert data.numel() == coder.size(count)
    decoded = torch.empty_like(values)
    coder.decode(data, decoded)
    assert torch.equal(data, before), "others are sent these bytes"
    finite = values.isfinite()
    assert torch.equal(values.isnan(), decoded.isnan())
    assert torch.equal(values[values.isinf()], decoded[values.isinf()])
    assert bool(decoded[finite].isfinite().all())
    if count:
        short = -count % BLOCK
        rows = np.concatenate((values.double().numpy(), np.full(short, values[-1].item()))).reshape(-1, BLOCK)
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        if codec is Codec.FLOAT16:  # its exponents end where factors would be subnormal
            step = max(step, 2.0**-25 * torch.finfo(dtype).smallest_normal)
        allowed = np.broadcast_to(bounds(codec, rows, step), rows.shape).reshape(-1)[:count]
        kept = finite.numpy()
        error = np.abs(decoded.double().numpy()[kept] / 2 - values.double().numpy()[kept] / 2)
        assert bool((error <= allowed[kept] / 2 * (1 + 2.0**-18)).all())


def test_what_no_codec_is_for_travels_as_it_is():
    assert all(coder_for(codec, torch.int32) is None for codec in Codec)
    assert coder_for(Codec.FLOAT16, torch.bfloat16) is None
    assert coder_for(Codec.INT8, torch.float16) is not None


@pytest.mark.parametrize("count", [0, 1, 700, 100_001])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_gather_and_broadcast_bring_everybody_the_same(count, world, monkeypatch):
    monkeypatch.setattr("collectives.reduce.gather.CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64 << 10)
    order = members(world)
    own = [torch.arange(count, dtype=torch.int32) + 1000 * i for i in range(world)]
    gathered = together(order, lambda port, i: all_gather(port, order, own[i], Scratch()), queue=world % 3)
    assert all(torch.equal(result, torch.cat(own)) for result in gathered)
    root = order[-1]
    spread = together(order, lambda port, i: (broadcast(port, order, own[i], root, Scratch()), port.bytes_sent))
    assert all(torch.equal(result, own[-1]) for result, _ in spread)
    if count == 100_001 and world == 5:
        assert spread[-1][1] < 1.1 * own[-1].nbytes, "the root sends it once, in parts"
