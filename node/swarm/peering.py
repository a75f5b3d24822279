"""A node's place in its swarm, put together from its configuration and its folder.

Trainers, relays and joiners all meet the network here. A folder with a manifest belongs to
that swarm; without one, `network.swarm` says which swarm the node is in. Nothing here needs torch.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import structlog

from node.config import NetworkConfig, NodeConfig
from node.errors import UserError
from node.rollouts.group import FORMAT
from node.state_folder import KEY_FILE, sole_process_of
from node.swarm.notices import Notices
from node.swarm.swarm_folder import REVOCATIONS_FILE, load_gate, load_grant, load_manifest
from protocol.config import read_clock
from protocol.credentials.grants import grant_expiry
from protocol.credentials.manifest import SwarmManifest
from protocol.credentials.records import Address, Endpoint
from protocol.errors import PortInUse, ProtocolError
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope, scope_of
from protocol.limits.timing import LOCAL, WAN, Timing
from protocol.storage import write_atomically
from protocol.transport.addresses import check_bindable
from protocol.transport.local_discovery import LocalDiscovery
from protocol.transport.port_mapping import Mapping, PortMapping

HOW_TO_BE_DIALLED = "start it with --listen tcp://0.0.0.0:4001, or another port"
DEFAULT_SWARM = hashlib.sha256(b"gossamer: nodes that were given no swarm id").digest()[:16]

AGENT = re.compile(r"gossamer/\d\S*( groups/(?P<form>\d+)(?P<draws> draws)?)?$")
UPDATE = "update whoever is behind"

# Connections that a node that only relays keeps to nodes that nobody can dial: so many take a twelfth of a core.
RELAY_CALLERS = 2048
# A node that leaves waits so many seconds at most until others have what it published last: a slow line takes a group
# of 200 kB in ten. On loopback nobody has a slow line, and the last node of a local swarm has nobody to wait for.
LEAVE_S = {WAN: 10.0, LOCAL: 3.0}
SAY_S = 1.0  # before a line says that it waits

log = structlog.get_logger()


class Network(NamedTuple):
    """A running host, its identity and its swarm's manifest; the address that peers dial, the Unix time when its grant
    ends, and the port mapping asked of its router. The last four may be missing.
    """

    host: Host
    identity: Identity
    swarm: bytes
    manifest: SwarmManifest | None
    address: Address | None
    grant_expires: float | None = None
    mapping: PortMapping | None = None


@contextmanager
def open_network(config: NodeConfig, folder: Path, *, relays: bool = False) -> Iterator[Network]:
    """Run a host for as long as the block lasts; its address is written to `folder`/address.

    A node that only `relays` has room for more nodes that nobody can dial.

    Raises:
        UserError: the key, manifest, a seed or the endpoint to listen on cannot be used, or the key's node runs here.
    """
    manifest = load_manifest(folder)
    swarm = _swarm(config.network, manifest)
    with ExitStack() as stack:
        try:
            identity = Identity.load_or_generate(folder / KEY_FILE)
            stack.enter_context(sole_process_of(identity.node_id, folder))
            host, address = _start(config, folder, identity, swarm, manifest, relays=relays)
        except ProtocolError as error:
            raise UserError(str(error)) from error
        stack.callback(_leave, host, LEAVE_S[timing_of(config.network)])
        if address is not None:
            write_atomically(folder / "address", f"{address}\n".encode())
            log.info("listening", node=identity.node_id, address=str(address), swarm=swarm.hex())
        else:
            (folder / "address").unlink(missing_ok=True)  # of an earlier start
            log.info("dialling only", node=identity.node_id, swarm=swarm.hex(), to_be_dialled=HOW_TO_BE_DIALLED)
        mapping = stack.enter_context(_look_around(config.network, host, address, swarm))
        yield Network(host, identity, swarm, manifest, address, grant_expiry(load_grant(folder)), mapping)


def _leave(host: Host, seconds: float) -> None:
    """Let others take what this node published last, for some seconds at most, then stop its network."""
    if left := host.hand_over(SAY_S):
        log.info("waiting for peers to take the last groups", groups=left, at_most_s=seconds)
        left = host.hand_over(seconds - SAY_S)
    if left:
        log.info("nobody took the last groups", groups=left)
    host.stop()


def check_endpoint(network: NetworkConfig) -> None:
    """Try where a node is to listen: what is wrong with it shows before a model is loaded, or a folder made.

    Raises:
        ProtocolError: the endpoint or a seed cannot be used.
    """
    if network.enabled and (listen := listens_at(network)) is not None:
        check_bindable(listen)


def swarm_id(config: NodeConfig, folder: Path) -> bytes:
    """Return the id of the swarm that a node with this configuration and folder is in; raises `UserError`."""
    return _swarm(config.network, load_manifest(folder))


def item_life(max_age_s: float) -> float:
    """Return for how many seconds after its signing an item may come, its signer's clock being ahead.

    `max_age_s` is the age up to which nodes of the swarm take an item.
    """
    return max_age_s + Limits().max_clock_ahead_s


def agent(*, draws: bool = False) -> str:
    """Return what a node says it runs: its release, the form of its groups, and whether it draws those of peers."""
    return f"gossamer/{version('gossamer')} groups/{FORMAT}{' draws' if draws else ''}"


def release(agent: str) -> str:
    """Return a node's release and the form of its groups, of what it says it runs."""
    return agent.removesuffix(" draws")


def count_drawing(agents: Iterable[str]) -> int:
    """Count the nodes that draw peers' groups of this form, among those that run `agents`."""
    return sum(bool(form and form["draws"] and form["form"] == str(FORMAT)) for form in map(AGENT.match, agents))


def other_form(agents: Sequence[str]) -> str:
    """Say how many of the peers that run `agents` share groups of another form; empty if none does.

    One that does not say its form is of an earlier release.
    """
    nodes = [form for form in map(AGENT.match, agents) if form]
    others = sum(form["form"] != str(FORMAT) for form in nodes)
    verb = "has" if others == 1 else "have"
    return (
        f"{others} of {len(nodes)} peers {verb} another form of groups: nothing is shared with them" if others else ""
    )


def _swarm(network: NetworkConfig, manifest: SwarmManifest | None) -> bytes:
    configured = bytes.fromhex(network.swarm)
    if manifest is None:
        return configured or DEFAULT_SWARM
    if configured not in (b"", manifest.swarm):
        raise UserError(f"network.swarm is not that of {manifest.name!r}, to which the folder belongs: leave it out")
    return manifest.swarm


def _start(
    config: NodeConfig, folder: Path, identity: Identity, swarm: bytes, manifest: SwarmManifest | None, *, relays: bool
) -> tuple[Host, Address | None]:
    network = config.network
    seeds = [Address.parse(text) for text in network.seeds]
    limits = Limits(upload_bytes_per_second=float(network.upload_limit))
    if relays:
        callers = RELAY_CALLERS
        limits = replace(limits, max_callers=callers, max_connections=limits.max_connections + callers)
    if manifest is not None:
        largest = manifest.limits.max_group_bytes
        limits = replace(
            limits,
            max_item_age_s=float(manifest.limits.max_item_age_s),
            max_item_bytes=largest,
            held_bytes=max(limits.held_bytes, 2 * largest),
            inbox_bytes=max(limits.inbox_bytes, 4 * largest),
        )

    gate = load_gate(folder, manifest) if manifest else None

    def start(listen: str | None) -> tuple[Host, Address | None]:
        host = Host(
            identity,
            swarm,
            listen,
            seeds,
            limits,
            agent(draws=bool(config.sampling.from_peers) and not relays),
            folder / "peers.json",
            timing=timing_of(network),
            grant=load_grant(folder),
            manifest=manifest.encoded if manifest else None,
            advertise=network.advertise,
            gate=gate,
            revocations=folder / REVOCATIONS_FILE if manifest else None,
            watch=Notices(seeds, load_grant(folder), read_clock()).write,
        )
        return host, host.start()

    again = _last_endpoint(network, folder) if manifest else None
    if again is not None:
        try:
            return start(str(again))
        except PortInUse:
            log.info("port of the last start is taken", endpoint=str(again))
    listen = listens_at(network)
    return start(None if listen is None else str(listen))


def _last_endpoint(network: NetworkConfig, folder: Path) -> Endpoint | None:
    """Return the port that "any port" was at the last start: invites that were given out name it."""
    asked = listens_at(network)
    if asked is None or asked.port != 0:
        return None
    try:
        port = Address.parse((folder / "address").read_text()).endpoint.port
    except (OSError, ProtocolError):
        return None
    return Endpoint(asked.host, port)


def listens_at(network: NetworkConfig) -> Endpoint | None:
    """Return where a node listens; None for one that nobody could dial.

    Nobody can dial one that listens on loopback and has a seed on another machine: an endpoint on loopback, told to a
    peer there, would be the peer's own machine.
    """
    if not network.listen:
        return None
    listen = Endpoint.parse(network.listen, bind=True)
    away = any(not Address.parse(seed).endpoint.is_loopback for seed in network.seeds)
    return None if listen.is_loopback and away and not network.advertise else listen


def timing_of(network: NetworkConfig) -> Timing:
    """Return how patient a node is with peers: if it listens on loopback only, they are on this machine."""
    listen = listens_at(network)
    return LOCAL if listen is not None and listen.is_loopback and not network.advertise else WAN


def may_ask_router(network: NetworkConfig, endpoint: Endpoint) -> bool:
    """Tell whether a node that is dialled there asks its router to forward the port. A public address needs no router.

    Neither does a port that a person forwards.
    """
    return network.local in ("all", "port") and not network.advertise and scope_of(endpoint.host) is Scope.PRIVATE


@contextmanager
def _look_around(
    network: NetworkConfig, host: Host, address: Address | None, swarm: bytes
) -> Iterator[PortMapping | None]:
    """Ask the router for the port and look for the swarm in this network, for as long as the block lasts.

    A node that listens nowhere or on loopback only does neither. One whose port a person forwards, or whose own address
    is public, needs no router's help; one that was given no swarm looks for nobody.
    """
    listen = listens_at(network)
    if listen is None or listen.is_loopback or address is None or network.local == "off":
        yield None
        return
    port = host.port
    with ExitStack() as stack:
        mapping: PortMapping | None = None
        if any(may_ask_router(network, address.endpoint) for address in host.addresses):
            mapping = PortMapping(port, lambda said: _tell(host, port, said))
            mapping.start()
            stack.callback(mapping.stop)
            log.info("asking the router to forward the port", port=port, without="--set network.local=peers, or off")
        if network.local in ("all", "peers") and swarm != DEFAULT_SWARM:
            discovery = LocalDiscovery(swarm, address.key, listen.host, port, host.neighbour)
            discovery.start()
            stack.callback(discovery.stop)
            log.info("looking for the swarm in this network", by="mDNS", without="--set network.local=port, or off")
        yield mapping


def _tell(host: Host, port: int, said: Mapping) -> None:
    """Tell the host, and the log, what the router said."""
    host.mapped("" if said.failure else said.external)
    if said.failure:
        log.info("the router does not forward the port", port=port, reason=said.failure)
    else:
        log.info("the router says that it forwards the port; peers will try it", port=port, at=said.external)
