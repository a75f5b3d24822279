"""Collectives of tensors on a GPU; see `test_gpu` on how to run them."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from collectives import Op, Protection
from collectives.torch_backend.group import MEETING, ProcessGroupGossamer
from tests.groups import group, together
from tests.torch_ranks import spawn, train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = os.environ.get("GOSSAMER_GPU_TESTS", "cuda")
COUNT = 8 << 20 if DEVICE == "cuda" else 300_000
SIZE = 2


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("torch sees no GPU here; GOSSAMER_GPU_TESTS=cpu tries the tests on the processor")


@pytest.fixture(scope="module", params=[Protection.AUTHENTICATED, Protection.ENCRYPTED], ids=str)
def comms(request):
    """In shared memory, and not."""
    with group(SIZE, protection=request.param) as members:
        yield members


def on_a_stream(work):
    """Do something on a stream of its own, as a trainer may, and return what it gives."""
    if DEVICE != "cuda":
        return work()
    with torch.cuda.stream(torch.cuda.Stream()):
        return work()


def computed(value):
    """Return a tensor that the device has yet to compute when this returns."""
    x = torch.full((COUNT,), float(value), device=DEVICE)
    for _ in range(50):
        x = x * 2 / 2
    return x


def test_a_communicator_reduces_gathers_and_broadcasts_what_the_device_has_yet_to_compute(comms):
    def work(comm, number):
        for _ in range(3):
            x = computed(number + 1)
            assert comm.all_reduce(x, op=Op.SUM).value is x
            assert (x == 3).all()
        flat = comm.all_gather(computed(number)[:1000]).value
        assert flat.device.type == DEVICE and flat.sum() == 1000
        comm.broadcast(y := computed(number), min(comm.members))
        return y[0].item()

    first, second = together(*(lambda c=c, i=i: on_a_stream(lambda: work(c, i)) for i, c in enumerate(comms)))
    assert first == second


def test_process_groups_take_tensors_of_the_device(comms):
    members = [comm.node_id for comm in comms]
    groups = [ProcessGroupGossamer(comm, "gpu", members, MEETING, 60.0) for comm in comms]

    def work(rank, number):
        opts = SimpleNamespace(reduceOp=dist.ReduceOp.SUM, asyncOp=True, rootRank=0, timeout=timedelta(-1))
        works = [(x, rank.allreduce([x], opts)) for x in (computed(number + 1) for _ in range(5))]
        for x, over in works:
            over.wait()
            assert (x == 3).all()
        rank.broadcast([x := computed(number + 1)], opts).wait()
        assert (x == 1).all()
        rank.all_gather_single(everything := torch.zeros(SIZE * COUNT, device=DEVICE), computed(number), opts).wait()
        assert everything.sum() == COUNT
        rank.reduce_scatter_single(part := torch.zeros(COUNT // SIZE, device=DEVICE), computed(number), opts).wait()
        assert (part == 1).all()
        if number == 0:
            rank.send([computed(7)], 1, 0).wait()
        else:
            rank.recv([x], 0, 0).wait()
            assert (x == 7).all()
        (future,) = [rank.allreduce([x := computed(1)], opts).get_future()]
        assert (future.wait()[0] == 2).all()

    together(*(lambda r=r, i=i: on_a_stream(lambda: work(r, i)) for i, r in enumerate(groups)))
    for one in groups:
        one.shutdown()


def test_ddp_and_fsdp_train_on_the_device_to_the_loss_of_gloo_on_the_processor(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = spawn(train, "gossamer", SIZE, tmp_path / "a", DEVICE)
    theirs = spawn(train, "gloo", SIZE, tmp_path / "b", "cpu")
    for rank in range(SIZE):
        assert ours[rank] == pytest.approx(theirs[rank], rel=1e-3)
