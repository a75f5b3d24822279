"""The backend with tensors of any layout gives what gloo gives with contiguous ones, and writes nowhere else."""

import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from collectives.torch_backend import Options
from collectives.torch_backend.group import MEETING, ProcessGroupGossamer
from tests.groups import group, together

SIZE = 2
TIMEOUT_S = 20.0
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64),
]
KINDS = ("allreduce", "broadcast", "reduce", "allgather", "gather", "scatter", "reduce_scatter", "alltoall", "send")


@pytest.fixture(scope="module")
def backends():
    """Ranks of gloo and of the backend, all in this process."""
    store, wait = dist.HashStore(), timedelta(seconds=TIMEOUT_S)
    gloo = list(together(*(lambda r=r: dist.ProcessGroupGloo(store, r, SIZE, wait) for r in range(SIZE))))
    with group(SIZE, protection=Options().protection) as comms:
        members = [comm.node_id for comm in comms]
        own = [ProcessGroupGossamer(comm, "layouts", members, MEETING, TIMEOUT_S) for comm in comms]
        yield gloo, own
        for rank in own:
            rank.shutdown()
    gloo.clear()  # its threads end here: a process that a later test forks has none of them, and would abort
    gc.collect()


@st.composite
def layouts(draw, shape):
    """Strides and an offset: the dimensions in any order, with gaps, and anything where there is no next element."""
    strides, span = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = draw(st.integers(0, 9)) if shape[dim] < 2 else span * draw(st.integers(1, 3))
        span += strides[dim] * max(0, shape[dim] - 1)
    return tuple(strides), draw(st.integers(0, 5)), span


@st.composite
def calls(draw):
    shape = tuple(draw(st.lists(st.integers(0, 4) | st.just(1), max_size=3)))
    places = [draw(layouts(shape)) for _ in range(3)]
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    return kind, shape, dtype, places, draw(st.booleans()), draw(st.booleans())


def laid_out(values, place):
    """Return values in such a layout, and all the memory that they are a part of: ones elsewhere."""
    strides, offset, span = place
    base = torch.ones(offset + span + 3).to(values.dtype)
    tensor = base.as_strided(values.shape, strides, offset)
    tensor.copy_(values)
    return tensor, base


def gaps(base, tensor):
    """Return the memory with zeros in the tensor's place."""
    strides, offset = tensor.stride(), tensor.storage_offset()
    rest = base.clone()
    rest.as_strided(tensor.shape, strides, offset).zero_()
    return rest


def carry_out(rank, number, call):
    """Make the call at a rank; return the tensors and whether the memory around them is as it was."""
    kind, shape, dtype, places, is_inference, is_async = call
    is_gloo = isinstance(rank, dist.ProcessGroupGloo)
    seen = []

    def tensor(k, place):
        count = torch.Size(shape).numel()
        values = ((torch.arange(count) + k + 2 * number) % 4).to(dtype).reshape(shape)
        if is_gloo:
            seen.append((values, values, values))
            return values
        made, base = laid_out(values, places[place])
        seen.append((made, base, gaps(base, made)))
        return made

    with torch.inference_mode(is_inference):
        own, several = tensor(0, 0), [tensor(1 + k, 1 + k) for k in range(SIZE)]
        opts = options(kind, is_async)
        at_root = number == 0
        match kind:
            case "allreduce" | "broadcast" | "reduce":
                work = getattr(rank, kind)([own], opts)
            case "allgather":
                work = rank.allgather([several], [own], opts)
            case "gather":
                work = rank.gather([several] if at_root else [], [own], opts)
            case "scatter":
                work = rank.scatter([own], [several] if at_root else [], opts)
            case "reduce_scatter":
                work = rank.reduce_scatter([own], [several], opts)
            case "alltoall":
                work = rank.alltoall(several, [tensor(5, 2), tensor(6, 0)], opts)
            case "send":
                work = rank.send([own], 1, 3) if at_root else rank.recv([own], 0, 3)
        work.wait()
    if kind == "reduce" and not at_root:
        return None  # gloo leaves anything there
    assert is_gloo or all(torch.equal(gaps(base, made), before) for made, base, before in seen), "a gap was written"
    return [made.clone() for made, _, _ in seen]


def options(kind, is_async):
    names = {
        "allreduce": "AllreduceOptions",
        "broadcast": "BroadcastOptions",
        "reduce": "ReduceOptions",
        "allgather": "AllgatherOptions",
        "gather": "GatherOptions",
        "scatter": "ScatterOptions",
        "reduce_scatter": "ReduceScatterOptions",
        "alltoall": "AllToAllOptions",
    }
    if kind not in names:
        return None
    made = getattr(torch._C._distributed_c10d, names[kind])()
    made.asyncOp = is_async
    if kind in ("broadcast", "reduce", "gather", "scatter"):
        made.rootRank = 0
    return made


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls())
def test_tensors_of_any_layout_are_filled_with_what_gloo_gives_for_contiguous_ones(backends, call):
    theirs, ours = (
        together(*(lambda r=r, n=n: carry_out(r, n, call) for n, r in enumerate(ranks))) for ranks in backends
    )
    assume(not any(isinstance(result, Exception) for result in theirs))  # gloo itself reduces no complex number
    for expected, found in zip(theirs, ours, strict=True):
        assert not isinstance(found, Exception), found
        assert expected is None or all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
