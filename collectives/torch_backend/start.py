"""How a world of ranks comes about: by torch's store, or from the members of a `Communicator` in a step of `run`."""

import hashlib
import inspect
import ipaddress
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from collectives.communicator import MAX_TAG, Communicator
from collectives.errors import BadArgument, DeadlineExceeded
from collectives.logs import Log
from collectives.torch_backend.ends import end_worlds_with, worlds
from collectives.torch_backend.group import DEVICES, LOOK_S, MEETING, NAME, ProcessGroupGossamer
from collectives.torch_backend.work import seconds_of
from collectives.types import WAN, GroupTiming, Protection
from protocol.identity import Identity, NodeId
from protocol.transport.addresses import source_towards

T = TypeVar("T")

log = Log()

SECRET, LISTEN = "GOSSAMER_SECRET", "GOSSAMER_LISTEN"  # of the environment
FOUNDER = "gossamer/founder"  # of the store: what rank 0 says of itself
DEFAULT_TIMEOUT_S = 1800.0  # torch's own
MAX_LOOK_S = 0.1  # between looks into the store
NO_RANK = -1


@dataclass
class Options:
    """The options of `init_process_group(pg_options=)`; the same at all ranks.

    `listen` is where other ranks dial this one, by default the environment's `GOSSAMER_LISTEN`. Without any that is on
    loopback if all ranks are on this machine, else at the address from which this machine reaches torch's store.
    `secret` is what only the ranks know: 16 random bytes or more, by default the environment's `GOSSAMER_SECRET`.
    Without any, see above. `timing` says how patient ranks are: one that keeps Python's lock to itself, or is stopped,
    is lost after `timing.stall` seconds.
    """

    protection: Protection = Protection.AUTHENTICATED
    streams: int = 1
    listen: str = ""
    secret: str | None = field(default=None, repr=False)
    timing: GroupTiming = WAN


_entering: list[tuple[Communicator, list[NodeId]]] = []  # for the default group that is being made: its ranks


def make(made: Any, options: Any) -> ProcessGroupGossamer:
    """Make one of torch's process groups: the world, or a part of it."""
    _check_alone()
    timeout = seconds_of(made.timeout) or DEFAULT_TIMEOUT_S
    ranks = list(made.global_ranks_in_group)
    default: Any = dist.distributed_c10d._get_default_group() if ranks else None
    if isinstance(default, ProcessGroupGossamer):
        return ProcessGroupGossamer(
            default.comm, made.group_id, [default.members[rank] for rank in ranks], default.turn, timeout
        )
    if _entering:
        comm, members = _entering[-1]
        assert comm.turn is not None
        return ProcessGroupGossamer(comm, made.group_id, members, comm.turn, timeout)
    if options is not None and not isinstance(options, Options):
        raise BadArgument("pg_options: give a collectives.torch_backend.Options")
    comm, members = meet(made.store, made.group_rank, made.group_size, options or Options(), timeout)
    world = ProcessGroupGossamer(comm, made.group_id, members, MEETING, timeout)
    worlds.add(world)
    end_worlds_with(os.getpid())  # now: it runs before what `comm` has registered
    return world


def _check_alone() -> None:
    """Raise `BadArgument` if torch was asked for another backend for some device: it would make none.

    torch takes a process group in Python for all devices. It does not tell its maker what else it was asked for.
    """
    frame = inspect.currentframe()
    while frame is not None:
        config = frame.f_locals.get("backend_config")
        if isinstance(config, dist.distributed_c10d.BackendConfig):
            asked = config.get_device_backend_map()
            if set(asked.values()) != {NAME}:
                mixed = ",".join(f"{device}:{backend}" for device, backend in asked.items())
                raise BadArgument(f'backend = "{mixed}": give "{NAME}", which takes the tensors of all devices')
        frame = frame.f_back


def meet(store: Any, rank: int, size: int, options: Options, timeout: float) -> tuple[Communicator, list[NodeId]]:
    """Found a group by way of torch's store, or join it; return the members in the order of their ranks.

    Raises:
        BadArgument: two processes have one rank, or some ranks have a secret and others have none.
        DeadlineExceeded: the ranks did not meet in time.
    """
    identity, secret = Identity.generate(), os.environ.get(SECRET) if options.secret is None else options.secret
    if secret is None and rank == 0:
        log.info(
            "the ranks have no secret",
            who_can_join="whoever can write to torch's store while the ranks start",
            remedy=f"set {SECRET} to the same random text at all ranks",
        )
    until = time.monotonic() + timeout
    own = "|".join((identity.node_id, _SECRECY[secret is not None], _this_machine()))
    entries = _call_roll(store, own, size, until) if rank == 0 else _answer_roll(store, own, rank, until)
    words = [entry.split("|", 2) for entry in entries]
    members = [NodeId(each[0]) for each in words]
    if len(set(members)) < size or len(members) != size:
        raise BadArgument(f"rank 0 knows of {len(set(members))} ranks, rank {rank} of {size}: start all as one world")
    if len({each[1] for each in words}) > 1:
        raise BadArgument(f"some ranks have a secret and some have none: set {SECRET} to the same text at all ranks")
    world = f"gossamer/{members[0]}"
    address = _look_for(lambda: _read(store, f"{world}/address"), until, lambda: "no address of rank 0") if rank else ""
    is_local = len({each[2] for each in words}) == 1
    comm = Communicator.connect(
        "torch.distributed",
        [f"{address}?id={members[0]}"] if rank else [],
        options.listen or os.environ.get(LISTEN) or f"tcp://{'127.0.0.1' if is_local else _own_host(store)}:0",
        identity=identity,
        may_join=frozenset(members).__contains__,
        secret=secret,
        protection=options.protection,
        streams=options.streams,
        timeout=max(0.0, until - time.monotonic()),
        timing=options.timing,
    )
    try:
        comm.data_plane.outlive_views()  # before any rank may have left again
        if rank == 0:
            store.set(f"{world}/address", comm.address)
        comm.wait_for(size, max(0.0, until - time.monotonic()))
        comm.barrier(max(0.0, until - time.monotonic()))
        for key in [f"{world}/rank/{rank}"] if rank else [FOUNDER, f"{world}/roster", f"{world}/address"]:
            store.delete_key(key)
        everybody = frozenset(members)
        _look_for(lambda: comm.data_plane.has_ways_to(everybody) or None, until, lambda: "no way to all ranks")
    except BaseException:
        comm.leave()
        raise
    return comm, members


def _own_host(store: Any) -> str:
    """Return the host of this machine that others reach: that from which it reaches a store on another one.

    Which need not be on the default route, where a machine is in several networks.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    try:
        master = socket.getaddrinfo(store.host, None, type=socket.SOCK_STREAM)[0][4][0]
        host = source_towards(str(master))
    except (AttributeError, OSError):  # a file is no host
        host = None
    if host is None or ipaddress.ip_address(host).is_loopback:
        return "0.0.0.0"
    return f"[{host}]" if ":" in host else host


def _call_roll(store: Any, own: str, size: int, until: float) -> list[str]:
    """Be rank 0 of a world: return what all ranks say of themselves, and let all read it.

    Ranks answer under the id of rank 0's key, and a rank takes only a roster that has its own id. These keys are new
    each time. So what other worlds have left in the store is of no matter, however far each rank came in them.
    """
    world = f"gossamer/{own.split('|', 1)[0]}"
    names = [f"{world}/rank/{rank}" for rank in range(1, size)]
    store.set(FOUNDER, own)

    def look() -> list[str] | None:
        if _read(store, FOUNDER) != own:
            raise BadArgument("another process is rank 0, too: give each a number of its own")
        return [own, *(store.get(name).decode(errors="replace") for name in names)] if store.check(names) else None

    def missing() -> str:
        return f"nothing came of rank {', '.join(name.split('/')[-1] for name in names if not store.check([name]))}"

    entries = _look_for(look, until, missing)
    store.set(f"{world}/roster", "\n".join(entries))
    return entries


def _answer_roll(store: Any, own: str, rank: int, until: float) -> list[str]:
    """Answer whoever is rank 0, until it knows of this rank; return what all ranks say of themselves."""
    answered = ""

    def look() -> list[str] | None:
        nonlocal answered
        founder = _read(store, FOUNDER)
        world = f"gossamer/{founder.split('|', 1)[0]}" if founder else ""
        if world != answered:
            answered = world
            if world:
                store.set(f"{world}/rank/{rank}", own)
        elif world and _read(store, f"{world}/rank/{rank}") != own:
            raise BadArgument(f"another process is rank {rank}, too: give each a number of its own")
        entries = (_read(store, f"{world}/roster") or "").split("\n")
        return entries if own in entries else None

    return _look_for(look, until, lambda: "rank 0 did not come, or not all ranks came to it")


def _read(store: Any, key: str) -> str | None:
    """Return what the store has under a key; None if it has nothing."""
    return store.get(key).decode(errors="replace") if store.check([key]) else None


def _look_for(look: Callable[[], T | None], until: float, problem: Callable[[], str]) -> T:
    """Return what `look` finds at last, in time. Raises `DeadlineExceeded` with the problem."""
    began, pause = time.monotonic(), LOOK_S
    while (found := look()) is None:
        if time.monotonic() >= until:
            raise DeadlineExceeded(f"{problem()} in {until - began:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, MAX_LOOK_S)
    return found


_SECRECY = {False: "without a secret", True: "with a secret"}


def _this_machine() -> str:
    """Return a text that is the same in all processes that reach each other by loopback."""
    try:
        facts = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/net").readlink()
    except OSError:
        facts = platform.node(), Path()
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def enter(comm: Communicator, timeout: float = DEFAULT_TIMEOUT_S) -> bool:
    """Make torch's default process group that of `comm`'s members, in a step of `comm.run`.

    Call it first in each step. Members that were in the group before keep their order, and new ones come last: a rank
    changes only when one before it is gone.

    Returns:
        Whether the group is another one, because members came or went or a step is taken again: then wrap the model
        anew, and make sub-groups anew.
    """
    known = dist.distributed_c10d._get_default_group() if dist.is_initialized() else None
    if comm.turn is None:
        raise BadArgument("enter: call it in a step of comm.run")
    if (
        isinstance(known, ProcessGroupGossamer)
        and known.comm is comm
        and known.turn == comm.turn
        and known.broken is None
    ):
        comm.carry_out_in(known.mark)
        return False
    own = known.getRank() if isinstance(known, ProcessGroupGossamer) and known.comm is comm else NO_RANK
    answers = comm.all_gather(torch.tensor([own]), tag=MAX_TAG, timeout=timeout)
    members = in_order(dict(zip(answers.contributors, answers.value.flatten().tolist(), strict=True)))
    if dist.is_initialized():
        dist.destroy_process_group()
    _entering.append((comm, members))
    try:
        rank, size = members.index(comm.node_id), len(members)
        dist.init_process_group(
            NAME, store=vars(dist)["HashStore"](), rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    finally:
        _entering.pop()
    return True


def in_order(ranks: Mapping[NodeId, int]) -> list[NodeId]:
    """Return the members in the order of their new ranks, by the ones that they had: `NO_RANK` of a new member.

    Two that had the same one, on the two sides of a split group, stand in the order of their ids.
    """
    return sorted(ranks, key=lambda member: (ranks[member] == NO_RANK, ranks[member], member))


@contextmanager
def failures_are_called_off() -> Iterator[None]:
    """Put this around what a step does with torch: it raises the `BackendError` that DDP hides.

    DDP raises a RuntimeError with its text only, for which `run` would not take the step again.
    """
    try:
        yield
    except RuntimeError as error:
        group = dist.distributed_c10d._get_default_group() if dist.is_initialized() else None
        if isinstance(group, ProcessGroupGossamer) and group.broken is not None and group.broken is not error:
            raise group.broken from error
        raise


def register() -> None:
    """Tell torch of the backend; importing this module does."""
    if NAME.upper() not in dir(dist.Backend):
        dist.Backend.register_backend(NAME, make, extended_api=True, devices=list(DEVICES))
