"""How a world of `torch.distributed` ends: a rank that has nothing more to do leaves what it has sent to the others."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from collectives.mesh.framing import MAX_HELD_BYTES
from collectives.torch_backend import BackendError, Options
from collectives.torch_backend.ends import worlds
from collectives.torch_backend.group import LEAST_SHARED_BYTES, MEETING, ProcessGroupGossamer
from tests import torch_ends
from tests.groups import group, together
from tests.waiting import wait_until

TIMEOUT_S = 20.0
LIMIT_S = 100


@pytest.fixture(params=[1, 3], ids=["one stream", "streams"])
def world(request):
    """A world of two ranks, each of which leaves its group at its end."""
    with make_world(2, streams=request.param) as ranks:
        yield ranks


class make_world:  # noqa: N801  # a context manager
    def __init__(self, size, timeout=TIMEOUT_S, **options):
        self.group = group(size, protection=Options().protection, **options)
        self.timeout = timeout

    def __enter__(self):
        comms = self.group.__enter__()
        members = [comm.node_id for comm in comms]
        self.ranks = [ProcessGroupGossamer(comm, "0", members, MEETING, self.timeout) for comm in comms]
        worlds.update(self.ranks)
        return self.ranks

    def __exit__(self, *error):
        together(*(rank.shutdown for rank in self.ranks))
        self.group.__exit__(*error)


def end(rank, others):
    """Let a rank come to its end, and wait until it is gone for all `others`."""
    rank.shutdown()
    for other in others:
        wait_until(lambda o=other: rank.comm.node_id not in o.comm.members, TIMEOUT_S, "the rank to be gone")


def options(root):
    return SimpleNamespace(reduceOp=dist.ReduceOp.SUM, asyncOp=False, rootRank=root)


LAST_CALLS = {  # -> what the rank that ends first calls, and what the late one does: it returns the tensor that it got
    "send": (
        lambda rank, own: rank.send([own], 1, 0).wait(),
        lambda rank, own, got: rank.recv([got], 0, 0).wait(),
    ),
    "isend": (
        lambda rank, own: rank.send([own], 1, 0),
        lambda rank, own, got: rank.recv([got], 0, 0).wait(),
    ),
    "broadcast": (
        lambda rank, own: rank.broadcast([own], options(0)).wait(),
        lambda rank, own, got: rank.broadcast([got], options(0)).wait(),
    ),
    "scatter": (
        lambda rank, own: rank.scatter([own.clone()], [[own, own]], options(0)).wait(),
        lambda rank, own, got: rank.scatter([got], [], options(0)).wait(),
    ),
    "reduce": (
        lambda rank, own: rank.reduce([own], options(1)).wait(),
        lambda rank, own, got: rank.reduce([got], options(1)).wait(),
    ),
    "gather": (
        lambda rank, own: rank.gather([], [own], options(1)).wait(),
        lambda rank, own, got: rank.gather([[got, torch.empty_like(got)]], [own], options(1)).wait(),
    ),
}


@pytest.mark.parametrize("count", [4, 300_000])
@pytest.mark.parametrize("last", LAST_CALLS)
def test_what_a_rank_sends_last_comes_to_one_that_is_late(world, last, count):
    early, late = world
    give, take = LAST_CALLS[last]
    own, got = torch.full((count,), 7.0), torch.zeros(count)
    if count * 4 > LEAST_SHARED_BYTES and last in ("broadcast", "gather"):
        ending = threading.Thread(target=lambda: (give(early, own), early.shutdown()), daemon=True)
        ending.start()  # its call takes part in the late one's: they share memory
        take(late, own, got)
        ending.join(TIMEOUT_S)
    else:
        give(early, own)
        end(early, [late])
        take(late, own, got)
    assert (got == 7).all()


def test_what_does_not_fit_the_window_of_a_late_rank_is_waited_for(world):
    early, late = world
    blocks = [torch.full((MAX_HELD_BYTES // 8,), float(number)) for number in range(3)]
    works = [early.send([block], 1, 0) for block in blocks]
    ending = threading.Thread(target=early.shutdown, daemon=True)
    ending.start()
    wait_until(lambda: late.comm.data_plane.has_early(late._op(late._channel(*late.members, 0)), late.members[0]), 9)
    assert ending.is_alive()
    for number, block in enumerate(blocks):
        late.recv([got := torch.zeros_like(block)], 0, 0).wait()
        assert (got == number).all()
    ending.join(TIMEOUT_S)
    assert not ending.is_alive() and all(work.wait() for work in works)


@pytest.mark.parametrize("count", [4, 100_000])
def test_ranks_go_on_without_those_that_have_ended(count):
    with make_world(4) as ranks:
        together(*(lambda r=r: r.allreduce([torch.ones(count)], None).wait() for r in ranks))
        parts = [
            ProcessGroupGossamer(rank.comm, "part", ranks[0].members[2:], MEETING, TIMEOUT_S) for rank in ranks[2:]
        ]
        together(*(lambda r=r: r.allreduce([torch.ones(count)], None).wait() for r in parts))
        for number in (0, 1):
            end(ranks[number], ranks[number + 1 :])
            given = [torch.ones(count) for _ in parts]
            together(*(lambda r=r, x=x: r.allreduce([x], None).wait() for r, x in zip(parts, given, strict=True)))
            assert all((x == 2).all() for x in given)
            ranks[2].send([torch.ones(count)], 3, 0)
            ranks[3].recv([got := torch.zeros(count)], 2, 0).wait()
            assert (got == 1).all()


@pytest.mark.parametrize("count", [1, 300_000])
def test_an_operation_that_a_rank_is_missing_from_which_has_ended_fails_at_once(world, count):
    early, late = world
    waiting = [late.allreduce([torch.ones(count)], None), late.recv([torch.ones(count)], 0, 0)]
    early.shutdown()
    for work in waiting:
        with pytest.raises(BackendError, match=r"rank 0 \(\w+\) has ended"):
            work.wait()


def test_an_operation_that_is_called_after_the_end_of_another_rank_fails_at_once(world):
    early, late = world
    end(early, [late])
    with pytest.raises(BackendError, match="all other ranks have ended"):
        late.recv_anysource([torch.zeros(1)], 0).wait()
    with pytest.raises(BackendError, match="all other ranks have ended"):
        late.barrier(options(0))


def test_works_that_nobody_waits_for_are_carried_out_before_the_end(world):
    given = [[torch.full((n,), 1.0) for n in (5, 300_000, 7)] for _ in world]
    for rank, tensors in zip(world, given, strict=True):
        for tensor in tensors:
            rank.allreduce([tensor], None)
    together(*(rank.shutdown for rank in world))
    assert all((tensor == 2).all() for tensors in given for tensor in tensors)


def test_the_wait_for_others_is_bounded_by_the_time_out_of_the_group(capsys):
    with make_world(2, timeout=0.5) as ranks:
        ranks[0].send([torch.ones(MAX_HELD_BYTES // 2)], 1, 0)
        began = time.monotonic()
        ranks[0].shutdown()
        assert 0.5 <= time.monotonic() - began < TIMEOUT_S
        assert ranks[0].comm.view is None


@pytest.mark.parametrize("how", ["a rank that leaves", "a rank that fails", "an abort"])
def test_nobody_waits_for_a_rank_that_is_gone_nor_does_one_that_fails_wait(world, how):
    gone, stays = world
    stays.send([torch.ones(MAX_HELD_BYTES // 2)], 0, 0)
    ending = threading.Thread(target=stays.shutdown, daemon=True)
    ending.start()
    if how == "a rank that leaves":
        gone.comm.leave()
    elif how == "an abort":
        gone.abort()
    else:
        try:
            raise ValueError(how)
        except ValueError:
            gone.shutdown()
    ending.join(TIMEOUT_S / 2)
    assert not ending.is_alive()


@pytest.mark.parametrize("how", ["shutdown", "abort"])
def test_a_process_that_is_forked_from_a_rank_ends_the_group_without_a_wait_and_for_itself_alone(world, how):
    together(*(lambda r=r: r.barrier(options(0)).wait() for r in world))
    if (forked := os.fork()) == 0:
        try:
            getattr(world[0], how)()
        finally:
            os._exit(0)
    try:
        wait_until(lambda: os.waitpid(forked, os.WNOHANG)[0], TIMEOUT_S / 2, "the fork to end")
    except AssertionError:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
        raise
    given = [torch.ones(300_000) for _ in world]
    together(*(lambda r=r, t=t: r.allreduce([t], None).wait() for r, t in zip(world, given, strict=True)))
    assert all((tensor == 2).all() for tensor in given)


def test_an_abort_ends_the_operations_of_all_ranks(world):
    waiting = world[1].allreduce([torch.ones(1)], None)
    aborted = world[0].recv([torch.ones(1)], 1, 0)
    world[0].abort()
    for work in (waiting, aborted):
        with pytest.raises(BackendError):
            work.wait()


def test_the_end_of_a_sub_group_waits_for_nobody(world):
    members = world[0].members
    parts = [ProcessGroupGossamer(rank.comm, "1", members, MEETING, TIMEOUT_S) for rank in world]
    parts[0].send([torch.ones(1)], 1, 0).wait()
    parts[0].shutdown()
    parts[1].recv([got := torch.zeros(1)], 0, 0).wait()
    assert got == 1
    parts[1].shutdown()
    together(*(lambda r=r: r.barrier(options(0)).wait() for r in world))


# --- programs ---


@pytest.fixture(scope="module")
def starter():
    starter = torch_ends.Starter()
    yield starter
    starter.stop()


@pytest.mark.parametrize("program", ["in_order", "without_destroy", "with_work_under_way"])
def test_a_program_ends_without_an_error_at_all_ranks(program, tmp_path, starter):
    assert starter.run(program, 4, tmp_path) == ([0] * 4, [""] * 4)


@pytest.mark.parametrize("program", ["fails", "fails_without_destroy", "fails_before_others_call"])
def test_a_rank_that_fails_ends_at_once_with_its_own_error_and_so_do_those_that_need_it(program, tmp_path, starter):
    began = time.monotonic()
    statuses, said = starter.run(program, 3, tmp_path)
    assert time.monotonic() - began < torch_ends.TIMEOUT_S
    assert statuses == [1, 1, 1], said
    assert said[1].endswith("ValueError: rank 1 fails\n")
    assert all("BackendError" in text and "rank 1" in text for text in (said[0], said[2])), said


def test_a_rank_that_ends_before_the_others_last_call_makes_that_fail_and_is_named(tmp_path, starter):
    began = time.monotonic()
    statuses, said = starter.run("ends_early", 3, tmp_path)
    assert time.monotonic() - began < torch_ends.TIMEOUT_S
    assert statuses == [1, 0, 1], said
    assert all("has ended, and takes part in no further operation" in text for text in (said[0], said[2]))


def test_a_rank_that_is_killed_at_its_end_is_no_error_of_the_others_and_they_do_not_wait_for_it(tmp_path, starter):
    began = time.monotonic()
    statuses, said = starter.run("is_killed", 4, tmp_path)
    assert time.monotonic() - began < torch_ends.TIMEOUT_S
    assert (statuses, said) == ([0, -signal.SIGKILL, 0, 0], [""] * 4)


@pytest.mark.parametrize(("program", "status"), [("exits_with_3", 3), ("raises_a_status", 1), ("exits_with_0", 0)])
def test_a_rank_that_exits_ends_at_once_with_its_status_though_the_others_are_busy(program, status, tmp_path, starter):
    statuses, said = starter.run(program, 3, tmp_path)
    assert statuses == [1, status, 1], said
    assert all("BackendError" in text and "rank 1" in text for text in (said[0], said[2])), said


def torchrun(*arguments):
    """Run programs under torchrun's agent; return the finished process."""
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = os.environ | {"GOSSAMER_SECRET": "of this test"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=7200)


@pytest.mark.real
def test_a_script_under_torchrun_ends_without_an_error():
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.torch_ends"]
    done = torchrun(*run, "in_order")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [2, 4])
def test_script_after_script_ends_without_an_error(size):
    done = torchrun("-m", "tests.torch_ends", "in_order", str(size), "5")
    assert done.stdout.endswith("5 of 5 ended without an error\n"), done.stderr


@pytest.mark.parametrize("program", ["fails_at_its_start", "fails_after_its_start"])
def test_torchrun_restarts_a_world_in_which_a_rank_has_failed(program):
    done = torchrun("-m", "tests.torch_ends", program, "2", "1", "1")
    assert done.stdout.endswith("1 of 1 ended without an error\n"), done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("times", [1000])
def test_a_thousand_scripts_of_four_ranks_end_without_an_error(times):
    done = torchrun("-m", "tests.torch_ends", "in_order", "4", str(times))
    assert done.stdout.endswith(f"{times} of {times} ended without an error\n"), done.stderr[-4000:]
