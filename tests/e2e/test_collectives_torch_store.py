"""How ranks meet by way of torch's store, and what a stranger who reaches that store can do: nothing, or too little."""

import threading
from datetime import timedelta
from itertools import cycle

import pytest
import structlog
import torch
import torch.distributed as dist

from collectives import Communicator
from collectives.errors import BadArgument, CollectiveError, DeadlineExceeded
from collectives.torch_backend import LISTEN, SECRET, Options
from collectives.torch_backend.ends import worlds
from collectives.torch_backend.group import MEETING, ProcessGroupGossamer
from collectives.torch_backend.start import FOUNDER, meet
from protocol.identity import Identity
from tests.groups import together
from tests.waiting import wait_until

TIMEOUT_S = 30.0
RANDOM = "0123456789abcdef0123456789abcdef"


class Watched:
    """A store whose every value somebody else has seen."""

    def __init__(self, store):
        self.store = store
        self.seen = {}

    def set(self, key, value):
        self.seen[key] = value
        self.store.set(key, value)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.fixture
def stores(monkeypatch):
    """torch's store, as three processes have it that reach its port.

    It ends with the test: a process that is forked later crashes if it frees a store whose thread only its parent has.
    """
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", SECRET):
        monkeypatch.delenv(name, raising=False)
    wait = timedelta(seconds=TIMEOUT_S)
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    others = [dist.TCPStore("127.0.0.1", first.port, is_master=False, timeout=wait) for _ in range(2)]
    watched = [Watched(store) for store in (first, *others)]
    yield watched
    for store in watched:
        vars(store).clear()  # a function that a test put in its place refers to it


def meet_two(stores, options=(), timeout=TIMEOUT_S):
    """Let two ranks meet; return what came of each: its communicator and the members, or an error."""
    options = options or (Options(),) * 2
    return together(*(lambda r=r: meet(stores[r], r, 2, options[r], timeout) for r in range(2)))


def leave(met):
    for comm, _ in met:
        comm.leave()


def reduce(met):
    ranks = [ProcessGroupGossamer(comm, "0", members, MEETING, TIMEOUT_S) for comm, members in met]
    given = [torch.ones(3), torch.ones(3)]
    together(*(lambda r=r, x=x: r.allreduce([x], None).wait() for r, x in zip(ranks, given, strict=True)))
    return given


@pytest.mark.parametrize("secret", [None, RANDOM])
def test_who_reads_all_that_was_ever_in_the_store_does_not_join(stores, secret):
    met = meet_two(stores, (Options(secret=secret),) * 2)
    seen = {key: value for store in stores for key, value in store.seen.items()}
    members = met[0][1]
    world = f"gossamer/{members[0]}"
    assert seen.keys() == {FOUNDER, f"{world}/rank/1", f"{world}/roster", f"{world}/address"}
    assert [found for _, found in met] == [members] * 2 and members == [comm.node_id for comm, _ in met]
    for guess in (None, *seen.values(), *members):
        with pytest.raises(CollectiveError):
            Communicator.connect(
                "torch.distributed",
                [seen[f"{world}/address"]],
                secret=guess,
                may_join=lambda _: True,
                protection=Options().protection,
                timeout=0.5,
            )
    assert {comm.world_size for comm, _ in met} == {2}
    leave(met)


def test_world_after_world_is_made_over_one_store_however_far_apart_the_ranks_are(stores):
    """What an earlier world has left in the store misleads no rank of the next one."""
    deletes = []
    for store in stores:
        store.delete_key = deletes.append  # a rank that is slow to clear up
    for _ in range(3):
        met = meet_two(stores)
        assert all((x == 2).all() for x in reduce(met))
        leave(met)
    assert len(deletes) == 3 * 4


def test_a_rank_that_is_late_at_its_start_gets_what_one_sent_that_has_ended_by_then(stores):
    has_left = threading.Event()
    stores[1].delete_key = lambda _: has_left.wait(TIMEOUT_S)  # which a rank does when all have met

    def be_early():
        comm, members = meet(stores[0], 0, 2, Options(), TIMEOUT_S)
        rank = ProcessGroupGossamer(comm, "0", members, MEETING, TIMEOUT_S)
        worlds.add(rank)
        rank.send([torch.full((3,), 7.0)], 1, 0)
        rank.shutdown()
        has_left.set()

    def be_late():
        comm, members = meet(stores[1], 1, 2, Options(), TIMEOUT_S)
        wait_until(lambda: comm.world_size == 1, TIMEOUT_S, "rank 0 to be gone")
        rank = ProcessGroupGossamer(comm, "0", members, MEETING, TIMEOUT_S)
        rank.recv([got := torch.zeros(3)], 0, 0).wait()
        comm.leave()
        return got.tolist()

    assert together(be_early, be_late) == [None, [7.0] * 3]


@pytest.mark.parametrize("came", [(0,), (1,), (0, 1)], ids=["only rank 0", "only rank 1", "both"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_meet_whoever_came_and_died_in_earlier_attempts(stores, came, size):
    """As where torchrun starts all ranks anew over one store, and some had come far before, and some not at all."""
    for store in stores:
        store.delete_key = lambda _: None  # who is killed clears nothing up
    for number in range(2):
        met = together(*(lambda r=r: meet(stores[r], r, 3, Options(), 0.3) for r in came))
        assert all(isinstance(error, DeadlineExceeded) for error in met), (number, met)
    met = together(*(lambda r=r: meet(stores[r], r, size, Options(), TIMEOUT_S) for r in range(size)))
    assert {comm.world_size for comm, _ in met} == {size}
    leave(met)


def test_a_world_that_grows_and_shrinks_from_start_to_start_is_made_over_one_store(stores):
    for store in stores:
        store.delete_key = lambda _: None  # its ranks are killed
    for size in (1, 2, 3, 1, 2):
        met = together(*(lambda r=r, size=size: meet(stores[r], r, size, Options(), TIMEOUT_S) for r in range(size)))
        assert [comm.world_size for comm, _ in met] == [size] * size
        leave(met)


def test_a_rank_that_is_killed_while_others_wait_for_it_may_come_again(stores):
    with pytest.raises(DeadlineExceeded, match="not all ranks came"):
        meet(stores[1], 1, 2, Options(), 0.1)
    founder = "".join([*"ab"] * 16)
    stores[0].set(FOUNDER, f"{founder}|without a secret|")  # and a rank 0 of which nothing more comes
    with pytest.raises(DeadlineExceeded, match="not all ranks came"):
        meet(stores[1], 1, 2, Options(), 0.1)
    assert f"gossamer/{founder}/rank/1" in stores[1].seen
    leave(meet_two(stores))


def test_whom_rank_0_waits_for_in_vain_is_named(stores):
    with pytest.raises(DeadlineExceeded, match=r"nothing came of rank 1, 2 in 0 s"):
        meet(stores[0], 0, 3, Options(), 0.1)


@pytest.mark.parametrize("secret", [None, RANDOM])
def test_who_puts_its_id_in_the_place_of_a_rank_joins_only_where_there_is_no_secret(stores, secret):
    stranger = Identity.generate()

    def take_the_place():
        """Be rank 1 for rank 0, before the real one is there."""
        world = wait_until(lambda: stores[0].seen.get(FOUNDER), 10, "rank 0").split("|")[0]
        stores[2].set(f"gossamer/{world}/rank/1", f"{stranger.node_id}|{'with' if secret else 'without'} a secret|")
        address = stores[2].get(f"gossamer/{world}/address").decode()
        options = {"identity": stranger, "protection": Options().protection, "may_join": lambda _: True}
        with Communicator.connect("torch.distributed", [address], timeout=2, **options) as comm:
            return comm.world_size

    founder, joined = together(lambda: meet(stores[0], 0, 2, Options(secret=secret), 3), take_the_place)
    assert isinstance(founder, CollectiveError)
    assert isinstance(joined, CollectiveError) if secret else joined == 2  # as docs/torch.md says


def test_a_secret_of_the_environment_is_that_of_all_ranks_and_is_not_shown(stores, monkeypatch):
    monkeypatch.setenv(SECRET, RANDOM)
    met = meet_two(stores)
    assert {comm.world_size for comm, _ in met} == {2}
    assert RANDOM not in repr(Options(secret=RANDOM))
    leave(met)


def test_a_rank_that_alone_has_a_secret_is_told_so_at_once(stores):
    for error in meet_two(stores, (Options(secret=RANDOM), Options())):
        assert isinstance(error, BadArgument)
        assert f"set {SECRET} to the same text at all ranks" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_that_have_one_rank_is_told_so(stores, rank):
    if rank:
        stores[2].set(FOUNDER, f"{Identity.generate().node_id}|without a secret|")
    met = together(*(lambda store=store: meet(store, rank, 3, Options(), 1) for store in stores[:2]))
    assert {type(error) for error in met} == {BadArgument, DeadlineExceeded}
    assert any(f"another process is rank {rank}, too: give each a number of its own" in str(error) for error in met)


@pytest.mark.parametrize("backend", ["cpu:gossamer,cuda:nccl", "cuda:gloo,cpu:gossamer"])
def test_torch_is_not_asked_for_another_backend_beside_it(backend):
    with pytest.raises(BadArgument, match=r'give "gossamer", which takes the tensors of all devices'):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gossamer,cuda:gossamer", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1), group=dist.new_group())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "box"}])
@pytest.mark.parametrize("machines", [["one"], ["one", "another"]], ids=len)
def test_ranks_listen_on_loopback_only_if_all_are_on_one_machine(stores, monkeypatch, environment, machines):
    """Whatever address the store has: that may be the environment's, or one of `init_method`."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here = cycle(machines)
    monkeypatch.setattr("collectives.torch_backend.start._this_machine", lambda: next(here))
    met = meet_two(stores)
    assert all((comm.address.split(":")[1] == "//127.0.0.1") is (len(machines) == 1) for comm, _ in met)
    leave(met)


def test_the_environment_may_say_where_a_rank_listens(stores, monkeypatch):
    monkeypatch.setenv(LISTEN, "tcp://127.0.0.2:0")
    met = meet_two(stores, (Options(listen="tcp://127.0.0.3:0"), Options()))
    assert [comm.address.rpartition(":")[0] for comm, _ in met] == ["tcp://127.0.0.3", "tcp://127.0.0.2"]
    leave(met)


def test_a_store_serves_one_world_after_the_other(stores):
    for _ in range(3):
        met = meet_two(stores)
        assert [x.tolist() for x in reduce(met)] == [[2.0] * 3] * 2
        leave(met)


def test_the_log_says_who_can_join_a_world_without_a_secret(stores, capsys):
    structlog.reset_defaults()  # as in a program that sets up no log
    leave(meet_two(stores))
    out, said = capsys.readouterr()
    assert not out, "stdout is the program's"
    assert "whoever can write to torch's store while the ranks start" in said and SECRET in said
    leave(meet_two(stores, (Options(secret=RANDOM),) * 2))
    assert "secret" not in "".join(capsys.readouterr())
