"""The host: a node's one network thread, and the thread-safe way to it.

The thread owns every socket and every core. The rest of the process hands it bodies and verdicts through bounded
mailboxes, and takes items from another. No method waits for the network but `receive`, and `publish` while its mailbox
is full; both have a time limit.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from protocol.config import Gate, Instant, Setup, read_clock
from protocol.core import Core
from protocol.credentials.records import (
    MAX_SERVICES,
    Address,
    Endpoint,
    PeerRecord,
    Service,
    saved_records,
)
from protocol.driver import Driver
from protocol.errors import MessageError, NetworkFailed, OutboxFull, UnpackError
from protocol.events import (
    Bring,
    Item,
    ItemVerdict,
    Judgement,
    Moved,
    Neighbour,
    Offer,
    PortMapped,
    Revoked,
    Subscribe,
)
from protocol.identity import Identity, NodeId
from protocol.limits.limits import Limits
from protocol.limits.networks import scope_of
from protocol.limits.timing import LAN, Timing
from protocol.membership.address_book import Book
from protocol.membership.reachability import Standing
from protocol.storage import exchange_bytes, load_peers, save_peers
from protocol.transport.addresses import own_hosts
from protocol.transport.zeromq import ZmqTransport
from protocol.value import value
from protocol.wire.compression import pack_content, unpack_content
from protocol.wire.envelope import SWARM_BYTES, ItemId, chunk_hashes, digest_of_hashes, item_id
from protocol.wire.messages import MAX_REVOCATIONS_BYTES, NO_TOPIC, TOPIC_BYTES

__all__ = ["Counters", "Host", "ItemVerdict", "PeerInfo", "Received"]

# The precision of timers. It also bounds how often the thread can wake up for nothing.
MIN_WAIT_S = 0.01
# Between two writes of the peers file. The pause doubles: in a swarm of 1,000 the book changes every few seconds.
FIRST_SAVE_S, LAST_SAVE_S = 5.0, 600.0
DESCRIBE_INTERVAL_S = 0.5
MAX_ADMITTED = 1024  # nodes that `admits` knows of: four groups of the largest size
ADDRESS_INTERVAL_S = 10.0  # between two looks at this machine's addresses, which send nothing
LIST_INTERVAL_S, LIST_RETRY_S = 2.0, 60.0  # short, as a person who revokes something waits for it
COMMANDS_PER_STEP = 256
HAND_OVER_TIMEOUT_S = 10.0  # until the peers of a slow line have taken a group of 200 kB, or one peer a round
STOP_S = 1.0  # for what is queued when a host stops
PUBLISH_TIMEOUT_S = 10.0  # a network thread that takes nothing for so long hangs, or shares its core with far too many

Command = Judgement | PortMapped | Neighbour

T = TypeVar("T")

log = structlog.get_logger()


class Mailbox(Generic[T]):
    """A queue between two threads. Beyond its bounds `put` drops the oldest items and counts them; `wait_to_put` waits.

    One mailbox is filled by either of these, and not by both.
    """

    def __init__(self, max_items: int, max_bytes: int, size_of: Callable[[T], int]) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        self._items: deque[T] = deque()
        self._bytes = 0
        self._awaited = 1  # how many items end a wait
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> bool:
        """Append an item; True if it is the only one, so that the taking thread may have to be woken."""
        with self._lock:
            is_first = not self._items
            self._items.append(item)
            self._bytes += self._size_of(item)
            while len(self._items) > self._max_items or self._bytes > self._max_bytes:
                self._bytes -= self._size_of(self._items.popleft())
                self.dropped += 1
                self._awaited = 1  # more will not fit
            if len(self._items) >= self._awaited:
                self._filled.notify()
            return is_first

    def wait_to_put(self, item: T, timeout: float) -> bool:
        """Append an item once there is room for it; False if there was none for `timeout` seconds."""
        with self._lock:
            size = self._size_of(item)
            if not self._emptied.wait_for(
                lambda: len(self._items) < self._max_items and self._has_bytes(size), timeout
            ):
                return False
            self._items.append(item)
            self._bytes += size
            if len(self._items) >= self._awaited:
                self._filled.notify()
            return True

    def has_room(self, size: int) -> bool:
        """Tell whether so many bytes more fit without dropping an item for them. An empty mailbox takes any item."""
        with self._lock:
            return self._has_bytes(size)

    def _has_bytes(self, size: int) -> bool:
        return not self._items or self._bytes + size <= self._max_bytes

    def drop_oldest(self) -> None:
        """Drop the oldest item and count it. If there is none, count one that never got in."""
        with self._lock:
            self.dropped += 1
            if self._items:
                self._bytes -= self._size_of(self._items.popleft())

    def take(self, limit: int, timeout: float = 0.0, least: int = 1) -> list[T]:
        """Remove and return up to `limit` items, oldest first. For one thread.

        It waits up to `timeout` seconds until there are `least`, or until an item was dropped.
        """
        if not self._items and timeout <= 0:
            return []
        with self._lock:
            if timeout > 0:
                self._awaited = min(least, self._max_items)
                self._filled.wait_for(lambda: len(self._items) >= self._awaited, timeout)
            taken = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
            self._bytes -= sum(map(self._size_of, taken))
            self._emptied.notify_all()
            return taken


@value
class Received:
    """An item for the node: its id, who signed it, its body and topic, and the unix time (s) its signer gave.

    `frame` is the signed item as it came (`protocol.wire.envelope.open_item`).
    """

    id: ItemId
    sender: NodeId
    body: bytes
    time: float
    topic: bytes
    frame: bytes = b""


class _Leaving:
    """A wait for others to take what we published: `left` items have no other holder."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.is_over = threading.Event()


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A live peer: `state` is the failure detector's, `rtt_s` the last round trip, if one was measured.

    It has been live for `age_s` seconds; the bytes of frames are counted since. Its `score` is 0 at best; below
    `Limits.graylist_score` the peer is refused for a while.
    """

    node_id: NodeId
    endpoint: str
    agent: str
    state: str
    rtt_s: float | None
    age_s: float
    bytes_sent: int
    bytes_received: int
    score: float


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the start; how many peers are live (`peers`) and known (`known`) now.

    `dialable` is how many members others can dial, this one included, as far as is known here.
    """

    bytes_sent: int
    bytes_received: int
    items_sent: int
    items_received: int
    duplicates: int
    peers: int
    known: int
    rejected: Mapping[str, int]
    dialable: int = 0


class Host:
    """A member of a swarm. Construct, `start`, then `publish` from any thread and `receive` from one, `stop`."""

    def __init__(  # noqa: PLR0913  # what a node is takes this many words, and most have a default
        self,
        identity: Identity,
        swarm: bytes,
        listen: str | None,
        seeds: Sequence[Address],
        limits: Limits | None = None,
        agent: str = "",
        peers_file: Path | None = None,
        *,
        timing: Timing = LAN,
        grant: bytes = b"",
        manifest: bytes | None = None,
        gate: Gate | None = None,
        revocations: Path | None = None,
        advertise: Sequence[str] = (),
        watch: Callable[[Core, Instant], object] = lambda core, now: None,
    ) -> None:
        """Prepare a host; nothing is opened yet.

        `swarm` is the swarm's id (16 bytes). `listen` is "tcp://HOST:PORT" (port 0: any), or None for a node that
        nobody can dial. `advertise` are the endpoints to tell peers instead, for a node behind a forwarded port.
        `agent` says in a few words what runs here. `grant`, `manifest` and `gate` are those of a `Setup`.
        `revocations` is the file of the revocation list: a list that a person puts there is told to the swarm. `watch`
        is called on the network thread each `DESCRIBE_INTERVAL_S`, and may look at the core for a moment.

        Raises:
            BadAddress: `listen` is no endpoint.
            ValueError: `swarm` has another length.
        """
        if len(swarm) != SWARM_BYTES:
            raise ValueError(f"a swarm id has {SWARM_BYTES} bytes, got {len(swarm)}")
        self._setup = Setup(identity, swarm, (), limits or Limits(), timing, agent, grant, manifest, gate or Gate())
        self._listen = None if listen is None else Endpoint.parse(listen, bind=True)
        self._advertise = tuple(Endpoint.parse(text) for text in advertise)
        self._seeds = tuple(seeds)
        self._limits = self._setup.limits
        self._peers_file = peers_file
        self._watch = watch
        self._disk = ThreadPoolExecutor(1, "gossamer-disk")  # its thread starts with the first job
        self._revocations = revocations
        self._list_on_disk = self._setup.gate.revocations
        self._looking: Future[bytes] | None = None
        self._next_list = 0.0
        self._saving: Future[None] | None = None
        self._inbox: Mailbox[Item] = Mailbox(
            self._limits.inbox_items, self._limits.inbox_bytes, lambda item: len(item.frame)
        )
        self._later: dict[ItemId, None] = {}  # items that came while the inbox was full; the store keeps them
        self._wish: Subscribe | None = None  # the newest wish, set by any thread
        self._told: Subscribe | None = None  # the newest wish that the core knows, set by the network thread
        self._outbox: Mailbox[Offer] = Mailbox(
            self._limits.inbox_items, self._limits.inbox_bytes, lambda offer: len(offer.body)
        )
        self._commands: Mailbox[Command] = Mailbox(self._limits.inbox_items, self._limits.inbox_bytes, lambda _: 0)
        self._stopping = threading.Event()
        self._leaving: _Leaving | None = None
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._core: Core | None = None
        self._driver: Driver | None = None
        self._peers: list[PeerInfo] = []
        self._standing = Standing()
        self._dialable = 0
        self._services: tuple[Service, ...] = ()
        self._offers: list[tuple[NodeId, Service]] = []
        self._admitted: dict[NodeId, PeerRecord] = {}  # replaced whole
        self._records: list[PeerRecord] = []  # replaced whole
        self._transport: ZmqTransport | None = None

    def start(self) -> Address | None:
        """Bind, start the network thread, and return the address to dial; None for a node that does not listen.

        Raises:
            PortInUse: another process listens there.
            BadAddress: this machine has no such address.
        """
        if self._thread is not None:
            raise RuntimeError("a host is started once")
        now = read_clock()
        setup = self._setup
        transport = ZmqTransport(setup.identity, self._listen, setup.limits, self._refuses)
        book = Book(self._seeds, self._limits)
        saved = load_peers(self._peers_file) if self._peers_file else []
        rng = random.Random()  # spreads load in time; no secret depends on it
        book.load(saved_records(saved, setup.swarm), now, rng)
        endpoints = self._endpoints(transport)
        core = Core(replace(setup, endpoints=endpoints), book, rng, now)
        self._transport, self._core = transport, core
        driver = self._driver = Driver(core, transport, read_clock, self._receive)
        self._thread = threading.Thread(
            target=self._run, args=(core, transport, driver), name="gossamer-network", daemon=True
        )
        self._thread.start()
        return Address(endpoints[0], setup.identity.curve_key) if endpoints else None

    def publish(self, body: bytes, topic: bytes = NO_TOPIC, timeout: float = PUBLISH_TIMEOUT_S) -> ItemId:
        """Offer `body` to the swarm and return its id, which depends on nothing but our key, the topic and the body.

        It waits up to `timeout` seconds while the network thread has not yet taken what was published before, if that
        is more than `inbox_items` or `inbox_bytes`.

        Raises:
            ValueError: the body is larger than the limit `max_item_bytes`, or the topic has not `TOPIC_BYTES`.
            OutboxFull: there was no room in that time. The item was not published.
            NetworkFailed: as `check`.
        """
        self.check()
        if len(body) > self._limits.max_item_bytes:
            raise ValueError(f"an item has at most {self._limits.max_item_bytes} bytes, got {len(body)}")
        if len(topic) != TOPIC_BYTES:
            raise ValueError(f"a topic has {TOPIC_BYTES} bytes, got {len(topic)}")
        packed = pack_content(body, topic)  # here, and not on the network thread
        hashes = chunk_hashes(packed)
        if not self._outbox.wait_to_put(Offer(packed, hashes), timeout):
            self.check()
            raise OutboxFull(f"{len(self._outbox)} items wait for the network thread: publish this one again later")
        self._wake()
        return item_id(self._setup.identity.public_key, digest_of_hashes(hashes))

    def subscribe(self, topics: frozenset[bytes] | None, demand: float, beside: frozenset[bytes] = frozenset()) -> None:
        """Ask for items of these topics only (8 bytes each; None: all), `demand` of them a second at most.

        Small items of the topics in `beside` have an allowance of their own, an eighth of that.
        """
        self._wish = Subscribe(topics, demand, beside)  # only the newest counts, so it needs no place in the mailbox
        self._wake()

    def receive(self, limit: int, timeout: float = 0.0, least: int = 1) -> list[Received]:
        """Return up to `limit` items that came since the last call, oldest first. Raises as `check`.

        It waits up to `timeout` seconds until `least` came and one of them can be unpacked. It returns fewer if they
        unpack, or claim to unpack, to more than `inbox_bytes`.
        """
        self.check()
        items: list[Received] = []
        room = self._limits.inbox_bytes
        largest = self._limits.max_item_bytes
        deadline = time.monotonic() + timeout
        while len(items) < limit and room > 0:
            fit = 1 + room // (largest + 1)  # so many that all but the last have room, whatever they unpack to
            wait = 0.0 if items else deadline - time.monotonic()
            taken = self._inbox.take(min(limit - len(items), fit), wait, min(least, limit))
            if self._later:
                self._wake()  # there is room now
            if not taken:
                break
            for item in taken:
                try:
                    body = unpack_content(item.content, largest)
                except MessageError as error:
                    self.judge(item.id, ItemVerdict.REJECT, error.reason)
                    room -= error.size if isinstance(error, UnpackError) else 0
                    continue
                room -= len(body)
                items.append(Received(item.id, item.signer, body, item.time, item.topic, item.frame))
        return items

    def check(self) -> None:
        """Check that the network thread runs.

        Raises:
            NetworkFailed: it ended by an error, which is in the log.
        """
        if self._failure is not None:
            raise NetworkFailed(f"the network failed ({self._failure}): start the node again") from self._failure

    def judge(self, id: ItemId, verdict: ItemVerdict, reason: str) -> None:  # noqa: A002  # the domain's word
        """Tell the node's verdict on an item. Unless it was accepted, it is counted by `reason`."""
        if verdict is not ItemVerdict.ACCEPT:
            self._command(Judgement(id, verdict, reason))

    def counters(self) -> Counters:
        """Return a snapshot of the counts."""
        core = self._core
        if core is None:
            return Counters(0, 0, 0, 0, 0, 0, 0, {})
        rejected = dict(core.scores.rejected)
        for reason, count in dict(core.membership.refusals.counts).items():
            rejected[reason] = rejected.get(reason, 0) + count
        rejected |= {"inbox_full": self._inbox.dropped, "outbox_full": self._commands.dropped}
        return Counters(
            bytes_sent=core.bytes_sent,
            bytes_received=core.bytes_received,
            items_sent=core.items_sent,
            items_received=core.items_received,
            duplicates=core.duplicates,
            peers=len(core.membership.peers),
            known=len(core.membership.book),
            rejected={reason: count for reason, count in rejected.items() if count},
            dialable=self._dialable,
        )

    @property
    def refusal(self) -> str:
        """Why a peer did not admit us, since one last did; empty if none refused."""
        if self._core is None:
            return ""
        refusals = self._core.membership.refusals
        return refusals.latest or (f"{refusals.full} is full" if refusals.full else "")

    @property
    def twin(self) -> str:
        """Where another process with this node's key can be dialled ("unknown" if nowhere); empty if there is none."""
        twin = self._core.membership.directory.twin if self._core else None
        return "" if twin is None else _where(twin)

    def peers(self) -> list[PeerInfo]:
        """Return the live peers, as of at most `DESCRIBE_INTERVAL_S` ago."""
        return list(self._peers)

    def records(self) -> list[PeerRecord]:
        """Return the records of all nodes that we have heard of, as of at most `DESCRIBE_INTERVAL_S` ago.

        They include nodes that only one peer told us of, which it may have made up.
        """
        return list(self._records)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where this node can be dialled, by its own record: public addresses first, then private, then loopback."""
        endpoints = self._core.membership.record.endpoints if self._core is not None else ()
        farthest_first = sorted(endpoints, key=lambda endpoint: -scope_of(endpoint.host))
        return tuple(Address(endpoint, self._setup.identity.curve_key) for endpoint in farthest_first)

    @property
    def port(self) -> int:
        """The port of this machine at which it listens, 0 if it does not; another may be advertised."""
        endpoint = self._transport.endpoint if self._transport is not None else None
        return endpoint.port if endpoint is not None else 0

    @property
    def standing(self) -> Standing:
        """How others see this node, and whether they can dial it; see `Standing`."""
        return self._standing

    def serve(self, *services: Service) -> None:
        """Tell the swarm what else runs here, at most `MAX_SERVICES`. This replaces what was told before."""
        self._services = services[:MAX_SERVICES]
        if self._transport is not None:
            self._transport.wake()

    def offers(self, name: str) -> list[tuple[NodeId, Endpoint]]:
        """Return the other nodes that say they run the service of this name, and where.

        Nothing proves it: check that the node at that endpoint is the one named.
        """
        return [(node, service.endpoint) for node, service in self._offers if service.name == name]

    def admits(self, node: NodeId) -> bool:
        """Tell whether the swarm admits `node`: whether we have its valid record.

        This is as of at most `DESCRIBE_INTERVAL_S` ago. One of the last `MAX_ADMITTED` records counts even if its node
        is out of reach, or it has left the book; a record that is no longer admitted does not count.
        """
        return node in self._admitted

    def mapped(self, external: str) -> None:
        """Note that our router says it forwards our port from that IP address; "": it no longer does."""
        self._command(PortMapped(external))

    def neighbour(self, *addresses: Address) -> None:
        """Note that somebody in our own network says that a node of our swarm is at one of these, all of one key."""
        self._command(Neighbour(addresses))

    def node_at(self, address: Address) -> NodeId | None:
        """Return the node that is dialled by the address's key, if the swarm admits it as far as `admits` knows."""
        return next((node for node, record in self._admitted.items() if record.curve_key == address.key), None)

    def is_revoked(self, node: NodeId) -> bool:
        """Tell whether the swarm's owner has revoked `node`, as far as is known here."""
        return self._setup.gate.is_revoked(node)

    def hand_over(self, timeout: float = HAND_OVER_TIMEOUT_S) -> int:
        """Wait until others have what we published in the last minute; return how many items nobody else has.

        To be called before `stop`. It waits `timeout` seconds at most, and no longer than somebody may still take an
        item: a peer that wants its topic and is not sated, one that asked for it, or, where there is no peer, one that
        we may still dial. An item has another holder once a peer, or several together, acknowledged or announced all of
        it. Raises nothing: if the network failed, nothing more is taken.
        """
        leaving = self._leaving = _Leaving(len(self._outbox))
        if self._thread is None or self._failure is not None:
            return leaving.left
        self._wake()
        leaving.is_over.wait(timeout)
        return leaving.left

    def stop(self) -> None:
        """Leave: end the thread and close every socket. Safe to call twice.

        What is queued for peers is sent first, for `STOP_S` seconds at most. What nobody asked for yet is lost: see
        `hand_over`.
        """
        self._stopping.set()
        if self._transport is not None:
            self._transport.wake()
        if self._thread is not None:
            self._thread.join()
        self._disk.shutdown()

    def _endpoints(self, transport: ZmqTransport) -> tuple[Endpoint, ...]:
        """Return where we can be dialled now. For a wildcard these are this machine's present addresses."""
        if self._listen is None or transport.endpoint is None:
            return ()
        return self._advertise or tuple(
            Endpoint(host, transport.endpoint.port) for host in own_hosts(self._listen.host)
        )

    def _refuses(self, key: bytes) -> bool:
        """Tell whether the holder of a CURVE key may not even connect. Called by the network thread."""
        return self._core is not None and self._driver is not None and self._core.refuses(key, self._driver.now())

    def _command(self, command: Command) -> None:
        if self._commands.put(command):
            self._wake()

    def _has_commands(self) -> bool:
        return len(self._commands) + len(self._outbox) > 0

    def _wake(self) -> None:
        if self._transport is not None:
            self._transport.wake()

    def _run(self, core: Core, transport: ZmqTransport, driver: Driver) -> None:
        saved, next_save, save_pause, next_description = core.membership.book.revision, 0.0, FIRST_SAVE_S, 0.0
        warned = ""
        endpoints, services, next_look = core.membership.record.endpoints, core.membership.record.services, 0.0
        wait = driver.wait()
        try:
            while not self._stopping.is_set():
                wait = driver.step(0 if self._has_commands() else max(MIN_WAIT_S, wait))
                now = driver.at
                if self._has_commands():
                    for command in (*self._commands.take(COMMANDS_PER_STEP), *self._outbox.take(COMMANDS_PER_STEP)):
                        driver.feed(command)
                    wait = driver.wait()
                if core.gossip.may_rest(now) and transport.is_clear and not self._has_commands():
                    # One wake-up for all that comes meanwhile: each takes the interpreter from the training.
                    self._stopping.wait(transport.until_review)
                    wait = driver.wait()
                self._hand_over(core, now)
                self._take_later(core, driver)
                self._take_wish(driver)
                self._keep_list(driver, now)
                if now.steady >= next_description:
                    self._describe(core, now)
                    next_description = now.steady + DESCRIBE_INTERVAL_S
                    if self.twin != warned:
                        warned = self.twin
                        log.warning("another process runs with this node's key: stop one of the two", endpoint=warned)
                if now.steady >= next_look or self._services != services:
                    next_look = now.steady + ADDRESS_INTERVAL_S
                    found = self._endpoints(transport), self._services
                    if found != (endpoints, services):
                        endpoints, services = found
                        driver.feed(Moved(endpoints, services))
                revision = core.membership.book.revision
                is_saving = self._saving is not None and not self._saving.done()  # the disk is slow
                if revision != saved and now.steady >= next_save and not is_saving:
                    self._save(core)
                    saved, next_save, save_pause = revision, now.steady + save_pause, min(LAST_SAVE_S, 2 * save_pause)
            self._save(core)
            transport.flush(STOP_S)
        except Exception as error:
            log.exception("the network failed")
            self._failure = error
        finally:
            transport.close()
            if (leaving := self._leaving) is not None:
                leaving.is_over.set()

    def _hand_over(self, core: Core, now: Instant) -> None:
        """Tell who waits in `hand_over` how much is left, and whether to wait longer."""
        if (leaving := self._leaving) is None or leaving.is_over.is_set():
            return
        waiting, state = len(self._outbox), core.gossip.hand_over(now)
        leaving.left = waiting + state.untaken
        may_be_taken = state.has_takers or (not core.membership.peers and core.membership.may_find_peers)
        if not leaving.left or not (waiting or may_be_taken):
            leaving.is_over.set()

    def _describe(self, core: Core, now: Instant) -> None:
        """Take the snapshots that other threads read, and let the node look."""
        self._peers = describe_peers(core, now)
        self._dialable = dialable_members(core)
        self._standing = core.membership.reachability.standing
        self._watch(core, now)
        self._offers = core.membership.book.services()
        self._records = core.membership.book.all_records()
        self._admitted = still_admitted(self._admitted, core.membership.book.records(), self._setup, now)

    def _receive(self, item: Item) -> None:
        """Put an item into the inbox. If there is no room, or others wait for room, ask the store for it later."""
        if item.id in self._later or (not self._later and self._inbox.has_room(len(item.frame))):
            self._later.pop(item.id, None)
            self._inbox.put(item)
        else:
            self._later[item.id] = None
            if len(self._later) + len(self._inbox) > self._limits.inbox_items:
                self._inbox.drop_oldest()

    def _take_later(self, core: Core, driver: Driver) -> None:
        """Ask the store for items that wait for the inbox, one after the other, while there is room."""
        while self._later:
            first = next(iter(self._later))
            size = core.gossip.size(first)
            if not size:
                del self._later[first]
                self._inbox.dropped += 1  # the store had no room either
            elif self._inbox.has_room(size):
                driver.feed(Bring(first))
                self._later.pop(first, None)  # in any case: a defect must not keep the thread here
            else:
                return

    def _take_wish(self, driver: Driver) -> None:
        """Tell the core what the node wants, if that is news."""
        if (wish := self._wish) is not None and wish is not self._told:
            self._told = wish
            driver.feed(wish)

    def _keep_list(self, driver: Driver, now: Instant) -> None:
        """Now and then, on the disk's thread, write our revocation list, or read a person's newer one."""
        if self._revocations is None:
            return
        ours = self._setup.gate.revocations
        if self._looking is not None and self._looking.done():
            future, self._looking = self._looking, None
            if failure := future.exception():
                log.warning("cannot keep the revocation list", path=str(self._revocations), error=str(failure))
                self._next_list = now.steady + LIST_RETRY_S
            else:
                before, self._list_on_disk = self._list_on_disk, future.result()
                if self._list_on_disk not in (before, ours):
                    driver.feed(Revoked(self._list_on_disk))
        elif self._looking is None and now.steady >= self._next_list:
            self._next_list = now.steady + LIST_INTERVAL_S
            self._looking = self._on_disk(
                exchange_bytes, self._revocations, self._list_on_disk, ours, MAX_REVOCATIONS_BYTES
            )

    def _save(self, core: Core) -> None:
        """Have the known peers written on the disk's thread."""
        if self._peers_file is not None:
            records = [record.encoded for record in core.membership.saved_records]
            self._saving = self._on_disk(_try_to_save, self._peers_file, records)

    def _on_disk(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Do this on the disk's thread, or here while the program ends, when no thread pool takes work any more."""
        try:
            return self._disk.submit(work, *arguments)
        except RuntimeError:
            done: Future[T] = Future()
            try:
                done.set_result(work(*arguments))
            except OSError as error:
                done.set_exception(error)
            return done


def _try_to_save(path: Path, records: Sequence[bytes]) -> None:
    try:
        save_peers(path, records)
    except OSError as error:  # no harm: they are still in memory
        log.warning("cannot write the peers file", path=str(path), error=str(error))


def still_admitted(
    known: Mapping[NodeId, PeerRecord], records: Iterable[PeerRecord], setup: Setup, now: Instant
) -> dict[NodeId, PeerRecord]:
    """Return the newest record of each node that the swarm admits, of those `known` and `records`."""
    newest = {**known, **{record.node_id: record for record in records}}
    late = now.unix * 1000
    good = [record for record in newest.values() if record.expiry_ms > late and not setup.gate.admits(record, now)]
    return {record.node_id: record for record in good[-MAX_ADMITTED:]}


def dialable_members(core: Core) -> int:
    """Return how many members others can dial, this one included, as far as is known here."""
    membership = core.membership
    is_dialable = bool(membership.record.endpoints) and membership.reachability.standing.dialable is not False
    return membership.book.dialable + is_dialable


def describe_peers(core: Core, now: Instant) -> list[PeerInfo]:
    """Return what there is to say about each live peer."""
    membership = core.membership
    return [
        PeerInfo(
            node,
            str(record.endpoints[0]) if record.endpoints else "",
            record.agent,
            membership.detector.state(node).name.lower(),
            membership.detector.rtt(node),
            now.steady - traffic.since,
            traffic.sent,
            traffic.received,
            core.scores.score(node, now),
        )
        for node in membership.peers
        if (traffic := core.traffic.get(node)) is not None
        for record in [membership.links.peers[node].record]
    ]


def _where(record: PeerRecord) -> str:
    return str(record.endpoints[0]) if record.endpoints else "unknown"
