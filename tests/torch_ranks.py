"""What ranks of a world do as processes of their own: `spawn(function, backend, size, ...)` returns what each said."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import warnings
from datetime import timedelta

LIMIT_S = 120


def spawn(function, backend, size, folder, *arguments):
    """Run `function(rank, size, *arguments)` in as many processes; return what the ranks that come to an end say."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_be, args=(function, backend, rank, size, f"{folder}/store", results, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        wanted = size if function is not lose else size - 1
        return dict(results.get(timeout=LIMIT_S) for _ in range(wanted))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _be(function, backend, rank, size, store, results, arguments):
    warnings.simplefilter("ignore")
    os.environ.pop("MASTER_ADDR", None)
    import torch
    import torch.distributed as dist

    import collectives.torch_backend  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=10)
    )
    results.put((rank, function(rank, size, *arguments)))
    dist.destroy_process_group()


def train(rank, size, device="cpu"):
    """Train with DDP, and with FSDP2 on a device mesh; return both losses."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def run(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(100 + rank)
        loss = torch.zeros(())
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(torch.randn(8, 50).to(device)) ** 2).mean()
            loss.backward()
            optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        return loss.item()

    def make():
        torch.manual_seed(rank)
        return torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1)).to(device)

    ddp = run(DistributedDataParallel(make()))
    torch.manual_seed(0)
    sharded = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1)).to(device)
    fully_shard(sharded, mesh=init_device_mesh(device, (size,)))
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": other} for other in range(size)]
    part = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        dist.all_reduce(two := torch.ones(1), group=part)
        assert two == 2
    return ddp, run(sharded)


def reduce_in_another_world(rank, size):
    """Reduce in groups of the backend, of two ranks and of all, where the world is another backend's."""
    import torch
    import torch.distributed as dist

    groups = [dist.new_group(ranks, backend="gossamer") for ranks in ([0, size - 1], list(range(size)))]
    found = []
    for group in groups:
        if dist.get_rank(group) >= 0:
            dist.all_reduce(x := torch.ones(1), group=group)
            found.append(x.item())
    return found


def hold_the_lock(rank, size, seconds):
    """Let rank 1 keep Python's lock to itself, as a long call of C may; return what the ranks' next sum is."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(x := torch.ones(3))
    if rank == 1:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    else:
        time.sleep(seconds / 2)  # so that the call's own time-out is no matter
    dist.all_reduce(x)
    return x.tolist()


def lose(rank, size, kind, how):
    """Train while rank 1 is killed, stopped or hangs; return the errors of a step and the next call, and the seconds.

    `kind` of a model: "DDP" or "FSDP2".
    """
    import torch
    import torch.distributed as dist

    model = torch.nn.Linear(500, 500)
    if kind == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard  # which takes seconds to import

        fully_shard(model)
    model(torch.ones(2, 500)).sum().backward()
    if rank == 1:
        if how == "hangs":  # as an owner does: the process's other threads live
            threading.Event().wait()
        os.kill(os.getpid(), {"is killed": signal.SIGKILL, "is stopped": signal.SIGSTOP}[how])
    began = time.monotonic()
    try:
        model(torch.ones(2, 500)).sum().backward()
        errors = ["none"]
    except RuntimeError as error:
        errors = [str(error)]
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        errors.append(str(error))
    return errors, time.monotonic() - began
