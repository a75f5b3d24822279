"""Averages weights with peers of the same architecture, in the background of a node.

    average        the mean of the members' weights: outer learning rate 1, no momentum
    diloco         an outer Nesterov step on their mean change (arXiv 2311.08105), taken up once it is there
    async-diloco   the same, taken up at the next exchange: a delay that does not depend on the network

A group is nodes of one swarm with one architecture, the same trained parameters and the same way of
stepping; its name is a hash of these. Each says in its peer record under that name where it can be
reached, and dials those who say so. A node founds the group by itself, and groups that meet become
one. A running node writes the address that members dial to `weights_address` in its folder.

Once in `weights.every` rounds the trainer's thread leaves a copy of the weights for this module's thread, which takes
part in one round of the group (`collectives.outer_optimizer`) and leaves the result. The trainer never waits: it takes
a result up at the end of a round in which there is one, and skips an exchange while the one before is not over. The
node keeps what it has learnt meanwhile:

    weights = result + (weights now - weights in the copy)

and counts in the next exchange, whose pseudo-gradient is measured from `result`.
"""

import hashlib
import json
import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collectives import Codec, CollectiveError, Communicator, Protection
from collectives.errors import BadArgument, Mismatch
from collectives.mesh.addresses import Address, BadAddress
from collectives.outer_optimizer import Outer, OuterGroup, OuterRounds, OuterStep, TrainedParameters
from collectives.types import LAN, WAN
from node.config import NetworkConfig, NodeConfig, WeightsConfig
from node.errors import UserError
from node.policy.load import Policy
from node.state_folder import KEY_FILE
from node.swarm.peering import listens_at, may_ask_router, swarm_id
from node.swarm.swarm_folder import load_manifest
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Endpoint, Service
from protocol.errors import ProtocolError
from protocol.identity import Identity, NodeId
from protocol.limits.networks import Scope, scope_of
from protocol.membership.reachability import Standing
from protocol.storage import write_atomically
from protocol.transport.port_mapping import Mapping as RouterSaid
from protocol.transport.port_mapping import PortMapping

ADDRESS_FILE = "weights_address"
LOOPBACK = "tcp://127.0.0.1:0"
JOIN_TIMEOUT = 120.0  # seconds to wait to be let in, before asking anew: members let others in once in `every` rounds


class MemberDirectory(Protocol):
    """The members' knowledge of each other: a `protocol.host.Host`."""

    def serve(self, *services: Service) -> None:
        """Say what runs here."""

    def offers(self, name: str) -> list[tuple[NodeId, Endpoint]]:
        """Return the other nodes that run the service of this name."""

    def admits(self, node: NodeId) -> bool:
        """Tell whether the swarm admits a node."""

    @property
    def standing(self) -> Standing:
        """Tell how others see this node, and whether they can dial it."""


class Weights(Protocol):
    """A node's use of its weights besides training them; nothing here waits for the network."""

    def begin(self) -> None:
        """Training begins, from the weights as they are now."""

    def after_round(self, number: int) -> Mapping[str, object]:
        """Round `number` is trained: return what to log."""

    def write(self, folder: Path) -> None:
        """Add to a checkpoint."""


class OwnWeights:
    """Weights that are the node's own."""

    def begin(self) -> None:
        """Nothing to do."""

    def after_round(self, number: int) -> Mapping[str, object]:
        """Nothing to log."""
        return {}

    def write(self, folder: Path) -> None:
        """Nothing to add."""


def group_name(config: WeightsConfig, swarm: bytes, policy: Policy) -> str:
    """Return the name of the group of all nodes that this one can average weights with."""
    settings = outer_of(config)
    shapes = [list(tensor.shape) for tensor in TrainedParameters(policy.model).tensors]
    what = [swarm.hex(), policy.name, shapes, config.mode, settings.lr, settings.momentum, config.codec]
    return f"gossamer/weights/{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"


@contextmanager
def exchange_weights(
    config: NodeConfig,
    folder: Path,
    policy: Policy,
    checkpoint: Path | None,
    directory: MemberDirectory | None = None,
) -> Iterator[Weights]:
    """Take part in the group for as long as the block lasts, as `config.weights` says.

    Args:
        config: of the node.
        folder: the node's; its key is who it is in the group.
        policy: loaded, not yet trained.
        checkpoint: the folder that training goes on from.
        directory: of the swarm, if the node is in one.

    Raises:
        UserError: the configuration or the checkpoint cannot be used.
    """
    weights = config.weights
    if weights.mode == "off":
        yield OwnWeights()
        return
    try:
        if weights.listen:
            Address.parse(weights.listen)  # on the exchange's own thread nobody would hear of it
    except BadAddress as error:
        raise UserError(f"weights.listen: {error}") from None
    try:
        identity = Identity.load_or_generate(folder / KEY_FILE)
    except ProtocolError as error:
        raise UserError(str(error)) from error
    group = group_name(weights, swarm_id(config, folder), policy)
    manifest = load_manifest(folder)
    if manifest is not None and manifest.policy is JoinPolicy.OPEN and not _is_on_loopback(config.network):
        log.warning("anyone may join this swarm, and so move the weights that its members average", remedy=ALLOWLIST)

    place = _MemberEndpoint(group.removeprefix("gossamer/"), config.network, directory)

    def connect() -> Communicator:
        member = Communicator.connect(
            group,
            (),
            # In no swarm the group is of this machine: no directory says who else may join.
            LOOPBACK if directory is None else weights.listen or _listen(config.network),
            identity=identity,
            may_join=directory.admits if directory is not None else None,
            timing=LAN if _is_on_loopback(config.network) else INTERNET,
            protection=Protection.ENCRYPTED,
            timeout=JOIN_TIMEOUT,
        )
        place.listens(Endpoint.parse(member.address))
        return member

    def find() -> list[str]:
        place.tell()
        return [f"{endpoint}?id={node}" for node, endpoint in place.others() if node != identity.node_id]

    address = folder / ADDRESS_FILE
    address.unlink(missing_ok=True)  # of an earlier process
    exchange = WeightExchange(weights, policy, connect, address, find, place.is_out_of_reach)
    if checkpoint is not None:
        exchange.resume(checkpoint)
    try:
        yield exchange
    finally:
        exchange.close()
        place.close()


class _MemberEndpoint:
    """Where members of the group dial this one, and what the swarm is told of that.

    A node that asks its router to forward the network's port asks it for the group's, too. The swarm is told the outer
    address that the router names once peers see the node there.
    """

    def __init__(self, service: str, network: NetworkConfig, directory: MemberDirectory | None) -> None:
        self._service = service
        self._network = network
        self._directory = directory
        self._told: tuple[Endpoint, ...] = ()
        self._mapping: PortMapping | None = None
        self._here: Endpoint | None = None  # if somebody elsewhere may dial it
        self._is_over = False

    def listens(self, endpoint: Endpoint) -> None:
        """The member listens there from now on."""
        self._give_back()
        self._here = endpoint if not endpoint.is_loopback or _is_on_loopback(self._network) else None
        is_asked = self._directory is not None and may_ask_router(self._network, endpoint)
        if self._here is not None and is_asked and not self._is_over:
            self._mapping = PortMapping(endpoint.port, lambda said: _log_mapping(endpoint.port, said))
            self._mapping.start()
        self.tell()

    def tell(self) -> None:
        """Tell the swarm where the member is dialled, if that is news."""
        if self._directory is None or self._here is None:
            return
        told = [self._here]
        said = self._mapping.said if self._mapping is not None else None
        if said is not None and not said.failure and said.external == self._directory.standing.seen_at:
            told.append(Endpoint(said.external, self._here.port))
        if self._told != tuple(told):
            self._told = tuple(told)
            self._directory.serve(*(Service(self._service, endpoint) for endpoint in told))

    def others(self) -> list[tuple[NodeId, Endpoint]]:
        """Return where the swarm's other members of the group say that they are dialled."""
        return self._directory.offers(self._service) if self._directory is not None else []

    def is_out_of_reach(self) -> bool:
        """Tell whether nobody can dial the member, as far as is known."""
        if self._directory is None:
            return False
        standing, told = self._directory.standing, self._told
        # A router that forwards the port of the network may forward none of the group's.
        is_behind = scope_of(standing.seen_at) is Scope.PUBLIC and all(scope_of(at.host) < Scope.PUBLIC for at in told)
        return not told or standing.dialable is False or (bool(standing.seen_at) and is_behind)

    def close(self) -> None:
        """Give the port back to the router, which takes a few seconds; a member that listens later asks for none."""
        self._is_over = True
        self._give_back()

    def _give_back(self) -> None:
        if self._mapping is not None:
            self._mapping.stop()
            self._mapping = None


def _log_mapping(port: int, said: RouterSaid) -> None:
    log.info("the router answered about the port for weights", port=port, at=said.external, reason=said.failure)


def _listen(network: NetworkConfig) -> str:
    """Return where to listen without `weights.listen`: on the host where peers dial the node, at any port."""
    listen = listens_at(network)
    return LOOPBACK if listen is None else str(replace(listen, port=0))


def _is_on_loopback(network: NetworkConfig) -> bool:
    listen = listens_at(network)
    return listen is not None and listen.is_loopback


STATE_FILE = "weights.safetensors"  # in a checkpoint
CALL_TIMEOUT = 60.0  # seconds for one collective call; a round that times out is simply begun again
FIRST_RETRY, LAST_RETRY = 1.0, 30.0  # seconds between attempts to reach the group, doubling
# Members come to an exchange as fast as their machines are: one that is an hour late is taken to hang.
INTERNET = replace(WAN, misses=60)
CLOSE_TIMEOUT = 10.0  # seconds
NOBODY_LISTENS = "nobody can dial it, and it knows no member of its group to dial"
ALLOWLIST = "average weights in a swarm that was founded with --policy allowlist"
LISTEN = (
    "let one node with the same model run with --listen tcp://0.0.0.0:4001 on a machine with a public address, "
    "or in the network of the others"
)

log = structlog.get_logger()


class GroupMembership(OuterGroup, Protocol):
    """A membership in a group: a `Communicator`."""

    @property
    def address(self) -> str:
        """Where others dial this member."""

    def meet(self, addresses: Iterable[str]) -> None:
        """Dial others of the group that are not members yet, without waiting."""

    def leave(self) -> None:
        """Leave the group; calls under way end with an error."""


Connect = Callable[[], GroupMembership]


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The result of a round of the group, and the weights since which learning does not yet count in it."""

    since: torch.Tensor
    outer: torch.Tensor
    momentum: torch.Tensor
    step: OuterStep


class AveragedWeights(ABC):
    """The trainer's side of averaging: what a node gives to an exchange, and how it takes up what comes of it.

    All methods are for the trainer's thread.

    Args:
        config: the `weights` table; its mode is not "off".
        policy: whose trained parameters are exchanged, in place.
    """

    def __init__(self, config: WeightsConfig, policy: Policy) -> None:
        self._config = config
        self._parameters = TrainedParameters(policy.model)
        self._base = self._parameters.flat_copy()
        self._momentum = outer_of(config).momentum_of(self._base)
        self._revision = 0
        self._busy = False

    @abstractmethod
    def _give(self, weights: torch.Tensor) -> bool:
        """Give these weights to the next exchange; return whether there can be one."""

    @abstractmethod
    def _result(self) -> RoundResult | None:
        """Return the result of an exchange that is over and not taken up yet."""

    def begin(self) -> None:
        """Reach the group, and be given its weights if it has trained already."""
        self._busy = True
        self._give(self._parameters.flat_copy())

    def after_round(self, number: int) -> dict[str, object]:
        """Take up a result if there is one to take up, begin an exchange if it is time; return what to log."""
        due = number % self._config.every == 0
        row: dict[str, object] = {}
        if due or self._config.mode != "async-diloco":
            row = self._take_up()
        if due and not self._busy:
            weights = self._parameters.flat_copy()
            if not bool(weights.isfinite().all()):  # the mean would not be finite for anybody
                log.warning("this node's weights are not finite and are not exchanged", round=number)
                return row | {"weights/nonfinite": 1}
            self._busy = self._give(weights)
        return row

    def _take_up(self) -> dict[str, object]:
        result = self._result()
        if result is None:
            return {}
        self._busy = False
        step = result.step
        if not (step.finite and bool(result.outer.isfinite().all() and result.momentum.isfinite().all())):
            members = list(step.contributors)
            log.warning("the group's weights are not finite and are left out", members=members, revision=step.revision)
            return {"weights/nonfinite": 1}
        learnt = self._parameters.flat_copy() - result.since
        self._parameters.write_back(result.outer + learnt)
        self._base, self._momentum, self._revision = result.outer, result.momentum, result.step.revision
        return {
            "weights/revision": result.step.revision,
            "weights/members": len(result.step.contributors),
            "weights/joined": result.step.joined,
            "weights/seconds": result.step.seconds,
            "weights/bytes_sent": result.step.bytes_sent,
            "weights/bytes_received": result.step.bytes_received,
        }

    # --- checkpoints ---

    def write(self, folder: Path) -> None:
        """Add this node's state to a checkpoint. What is under way is not part of it: the group decides it."""
        state = {"outer": self._base, "momentum": self._momentum, "revision": torch.tensor(self._revision)}
        save_file(state, folder / STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, before `begin`; without this state in it, begin as at a first start.

        Raises:
            UserError: the file is of another model or damaged.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return
        try:
            state = load_file(path)
            if (state["outer"].shape, state["momentum"].shape) != (self._base.shape, self._momentum.shape):
                raise ValueError("it is of another model or way to step")
            self._base, self._momentum, self._revision = state["outer"], state["momentum"], int(state["revision"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}; delete it to have the group's weights instead") from error

    def member(self, group: OuterGroup, stopped: threading.Event | None = None) -> "AveragingMember":
        """Return the group's side of this node, from the state that it has now."""
        rounds = OuterRounds(group, self._base, outer_of(self._config), stopped)
        rounds.load_state_dict({"outer": self._base, "momentum": self._momentum, "revision": self._revision})
        return AveragingMember(rounds)


class AveragingMember:
    """The group's side of averaging: one exchange after another, from a node's weights to a result."""

    def __init__(self, rounds: OuterRounds) -> None:
        self._rounds = rounds
        self._joining = True  # the first round brings this node up to date: it contributes nothing

    def exchange(self, given: torch.Tensor) -> RoundResult:
        """Take part in a round of the group with the weights `given`; see `OuterRounds.run`."""
        rounds = self._rounds
        start = rounds.outer.clone()
        step = rounds.run(None if self._joining else start - given)
        # Learning since `start` counts the next time, unless the group's state replaced it.
        since = start if self._joining and not step.joined else given
        self._joining = False
        return RoundResult(since, rounds.outer.clone(), rounds.momentum.clone(), step)


class WeightExchange(AveragedWeights):
    """One node's part in its group, by a thread of its own: the trainer's never waits for the network.

    Args:
        config: as for `AveragedWeights`.
        policy: likewise.
        connect: reaches the group, or raises `CollectiveError`; called on the exchange's own thread.
        address: the file to write the member's address to.
        find: tells where else members of the group may be; asked before each exchange.
        is_out_of_reach: tells whether nobody can dial this node, as far as is known; asked likewise.
    """

    def __init__(
        self,
        config: WeightsConfig,
        policy: Policy,
        connect: Connect,
        address: Path,
        find: Callable[[], Iterable[str]] = tuple,
        is_out_of_reach: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config, policy)
        self._connect = connect
        self._address = address
        self._find = find
        self._is_out_of_reach = is_out_of_reach
        self._jobs: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()  # weights; None: leave
        self._results: queue.SimpleQueue[RoundResult] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._member: GroupMembership | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def begin(self) -> None:
        """Reach the group, and be given its weights if it has trained already."""
        self._thread.start()
        super().begin()

    def close(self) -> None:
        """Leave the group; an exchange that is under way is given up."""
        self._stopping.set()
        self._jobs.put(None)
        if self._member is not None:  # else it may be waiting to be let in, and nobody would notice its end
            self._member.leave()
            self._thread.join(CLOSE_TIMEOUT)

    def _give(self, weights: torch.Tensor) -> bool:
        if self._thread.is_alive():
            self._jobs.put(weights)
        return self._thread.is_alive()

    def _result(self) -> RoundResult | None:
        with suppress(queue.Empty):
            return self._results.get_nowait()
        return None

    def _run(self) -> None:
        try:
            while (member := self._reach()) is not None:
                self._member = member
                if self._stopping.is_set():
                    break
                try:
                    self._exchange(member)
                    break
                except Mismatch as error:  # one other member, perhaps of an older version, must not end this one's part
                    said = "a member of the group of weights has other parameters or settings"
                    log.warning(said, reason=str(error), again_in_s=LAST_RETRY)
                    member.leave()
                    self._stopping.wait(LAST_RETRY)
        except CollectiveError as error:
            if not self._stopping.is_set():
                log.error("weights are no longer exchanged", reason=str(error))  # noqa: TRY400  # the text says it all
        except Exception:
            log.exception("weights are no longer exchanged")  # a defect here must not end the node
        finally:
            if self._member is not None:
                self._member.leave()

    def _reach(self) -> GroupMembership | None:
        delay = FIRST_RETRY
        while not self._stopping.is_set():
            try:
                return self._connect()
            except (BadArgument, Mismatch):
                raise
            except CollectiveError as error:
                log.info("group of weights not reached", reason=str(error), again_in_s=delay)
            self._stopping.wait(delay)
            delay = min(2 * delay, LAST_RETRY)
        return None

    def _exchange(self, member: GroupMembership) -> None:
        write_atomically(self._address, f"{member.address}\n".encode())
        averaging = self.member(member, self._stopping)
        is_told = False
        while (given := self._jobs.get()) is not None and not self._stopping.is_set():
            others = [*self._find()]
            if not others and not is_told and self._is_out_of_reach():
                is_told = True
                log.warning("this node averages weights with nobody", reason=NOBODY_LISTENS, remedy=LISTEN)
            member.meet(others)
            try:
                result = averaging.exchange(given)
            except Mismatch:
                self._jobs.put(given)
                raise
            step = result.step
            log.info("weights exchanged", revision=step.revision, members=len(step.contributors), seconds=step.seconds)
            self._results.put(result)


def outer_of(config: WeightsConfig) -> Outer:
    """Return how the group of this mode steps."""
    lr, momentum = (1.0, 0.0) if config.mode == "average" else (None, None)
    late = config.mode == "async-diloco"
    return Outer.usual(lr, momentum, late=late, codec=Codec(config.codec), timeout=CALL_TIMEOUT, patience=math.inf)
