"""Addresses, and the signed record that a node spreads about itself.

    record = public key (32) | signature (64) | payload
    payload = MessagePack [1, swarm id (16), CURVE key (32), [endpoint, ...], incarnation, agent, expiry in ms, grant,
                           [[service's name, endpoint], ...]]

The incarnation is the time of the node's start in ms, times 2^16, plus the number of records that it signed since.
A record with a later start comes from a restarted node.

An endpoint becomes a ZeroMQ connect string, so its grammar is checked here and is
narrower than ZeroMQ's: TCP only, one host, one port, no source address, no wildcard.
"""

import contextlib
import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from protocol.errors import BadAddress, RecordError
from protocol.identity import KEY_BYTES, Identity, NodeId, Verify, node_id, verify
from protocol.limits.networks import Scope, netgroup, scope_of
from protocol.lru import Recent
from protocol.wire.encoding import MAX_NEWER_FIELDS, is_bytes, is_uint, pack, unpack
from protocol.wire.envelope import HEADER_BYTES, SWARM_BYTES

VERSION = 1
MAX_RECORD_BYTES = 2688  # holds all of the following at their largest
MAX_ENDPOINTS = 4
MAX_ENDPOINT_BYTES = 280  # a host name has at most 253 characters
MAX_AGENT_BYTES = 128
MAX_GRANT_BYTES = 512
MAX_SERVICES = 2
MAX_SERVICE_BYTES = 48  # of a name
RENEWAL_BITS = 16
# Long enough that a node which was away for a night still finds somebody in its peers file.
RECORD_LIFE_S = 24 * 3600.0
MAX_RECORD_LIFE_S = 7 * 24 * 3600.0
READER_CAPACITY = 1024  # records of about 1 kB; twice as many as in a book
_DOMAIN = b"gossamer/record/1\x00"
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_SERVICE = re.compile(rf"[a-z0-9._/-]{{1,{MAX_SERVICE_BYTES}}}")
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_ENDPOINT = re.compile(r"tcp://(\[[0-9a-fA-F:.]{2,45}\]|[^\s/\[\]:;@?#]{1,253}):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP host and port; `host` is a name, an IPv4 or an IPv6 address without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, bind: bool = False) -> "Endpoint":
        """Read "tcp://HOST:PORT"; with `bind`, port 0 (any free port) and host "*" are allowed too.

        Raises:
            BadAddress: anything else.
        """
        match = _ENDPOINT.fullmatch(text) if len(text) <= MAX_ENDPOINT_BYTES else None
        if match is None:
            raise BadAddress(f"{text[:MAX_ENDPOINT_BYTES]!r} is no endpoint: write tcp://HOST:PORT")
        host, port = match[1].strip("[]"), int(match[2])
        if port > 65535 or (port == 0 and not bind):
            raise BadAddress(f"{text!r}: the port must be between {0 if bind else 1} and 65535")
        if not (_is_host(host, bracketed=match[1].startswith("[")) or (bind and host == "*")):
            raise BadAddress(f"{text!r}: {host!r} is no host name or IP address")
        return cls(host, port)

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is a literal IPv6 address."""
        return ":" in self.host

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: "127.example" may be anywhere
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if self.is_ipv6 else f"tcp://{self.host}:{self.port}"


def _is_host(host: str, *, bracketed: bool) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return not bracketed and _NAME.fullmatch(host) is not None
    return (address.version == 6) == bracketed


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node listens and the CURVE key it proves there: what a person gives as a seed."""

    endpoint: Endpoint
    key: bytes

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read "tcp://HOST:PORT?key=HEX".

        Raises:
            BadAddress: the line says which part is wrong.
        """
        endpoint, separator, key = text.strip().partition("?key=")
        if not separator:
            raise BadAddress(f"{text!r} has no key: write tcp://HOST:PORT?key=HEX, as the other node prints it")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", key):
            raise BadAddress(f"{text!r}: the key must be 64 hex digits, as the other node prints it")
        return cls(Endpoint.parse(endpoint), bytes.fromhex(key))

    def __str__(self) -> str:
        return f"{self.endpoint}?key={self.key.hex()}"


@dataclass(frozen=True, slots=True)
class Service:
    """Something else that a node runs: the `name` by which peers know it, and its endpoint."""

    name: str
    endpoint: Endpoint

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ValueError: it is not 1 to 48 of a-z, 0-9, ".", "_", "/" and "-".
        """
        if not _SERVICE.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no service's name: 1 to {MAX_SERVICE_BYTES} of a-z 0-9 . _ / -")


@dataclass(frozen=True)
class PeerRecord:
    """A node's signed statement about itself; `encoded` holds the exact bytes to pass on.

    `incarnation` grows with every start of the node and every new record. Without an endpoint, nobody can dial the
    node. `grant` is what admits it to a swarm that is not open. `services` are what else it runs.
    """

    public_key: bytes
    swarm: bytes
    curve_key: bytes
    endpoints: tuple[Endpoint, ...]
    incarnation: int
    agent: str
    expiry_ms: int
    grant: bytes
    services: tuple[Service, ...]
    encoded: bytes

    @cached_property
    def node_id(self) -> NodeId:
        """The id of the node that signed."""
        return node_id(self.public_key)

    @cached_property
    def summary(self) -> tuple[bytes, bytes]:
        """The record's entry in a digest: 8 bytes of the node id, 8 that change with the record."""
        return hashlib.sha256(self.public_key).digest()[:8], hashlib.sha256(self.encoded).digest()[:8]

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        """Where to dial the node."""
        return tuple(Address(endpoint, self.curve_key) for endpoint in self.endpoints)

    @cached_property
    def nearest(self) -> Scope:
        """The scope of its nearest endpoint, services' included; public if there is none."""
        endpoints = (*self.endpoints, *(service.endpoint for service in self.services))
        return min((scope_of(endpoint.host) for endpoint in endpoints), default=Scope.PUBLIC)

    @cached_property
    def networks(self) -> frozenset[str]:
        """The public networks in which it can be dialled (see `netgroup`)."""
        return frozenset(filter(None, (netgroup(endpoint.host) for endpoint in self.endpoints)))

    @property
    def started(self) -> int:
        """When the node started (Unix ms): two records of one process have the same."""
        return self.incarnation >> RENEWAL_BITS

    def replaces(self, other: "PeerRecord") -> bool:
        """Tell whether this record is newer than `other`, of the same node."""
        return (self.incarnation, self.expiry_ms) > (other.incarnation, other.expiry_ms)


def make_record(
    identity: Identity,
    swarm: bytes,
    endpoints: tuple[Endpoint, ...],
    incarnation: int,
    agent: str,
    expiry_ms: int,
    grant: bytes = b"",
    services: tuple[Service, ...] = (),
) -> PeerRecord:
    """Sign a record about ourselves; `agent` is cut to what fits, and so is the list of services."""
    services = services[:MAX_SERVICES]
    agent = agent.encode(errors="replace")[:MAX_AGENT_BYTES].decode(errors="ignore")
    names = [str(endpoint) for endpoint in endpoints]
    others = [[service.name, str(service.endpoint)] for service in services]
    payload = pack([VERSION, swarm, identity.curve_key, names, incarnation, agent, expiry_ms, grant, others])
    encoded = identity.public_key + identity.sign(_DOMAIN + payload) + payload
    return PeerRecord(
        identity.public_key,
        swarm,
        identity.curve_key,
        endpoints,
        incarnation,
        agent,
        expiry_ms,
        grant,
        services,
        encoded,
    )


def open_record(data: bytes, swarm: bytes, now_unix: float, check: Verify = verify) -> PeerRecord:
    """Verify and decode a record of a member of `swarm`.

    Raises:
        RecordError: reason "malformed", "forged", "wrong_swarm" or "stale" (expired, or beyond any honest expiry).
    """
    record = _decode(data, swarm, check)
    check_expiry(record, now_unix)
    return record


def _decode(data: bytes, swarm: bytes, check: Verify) -> PeerRecord:
    if not HEADER_BYTES < len(data) <= MAX_RECORD_BYTES:
        raise RecordError("malformed", f"record of {len(data)} bytes")
    public_key, signature, payload = data[:KEY_BYTES], data[KEY_BYTES:HEADER_BYTES], data[HEADER_BYTES:]
    if not check(public_key, signature, _DOMAIN + payload):
        raise RecordError("forged", "record")
    fields = unpack(
        payload,
        9,
        error=RecordError,
        max_bytes=MAX_GRANT_BYTES,
        max_text=max(MAX_ENDPOINT_BYTES, MAX_AGENT_BYTES),
        max_array=MAX_ENDPOINTS,
    )
    version, record_swarm, curve_key, endpoints, incarnation, agent, expiry_ms, grant, services = fields
    if version != VERSION or not is_bytes(record_swarm, SWARM_BYTES) or not is_bytes(curve_key, KEY_BYTES):
        raise RecordError("malformed", "record layout")
    if not (is_uint(incarnation) and is_uint(expiry_ms) and isinstance(agent, str)):
        raise RecordError("malformed", "record fields")
    if not (isinstance(grant, bytes) and isinstance(endpoints, list) and isinstance(services, list)):
        raise RecordError("malformed", "record fields")
    if len(agent.encode()) > MAX_AGENT_BYTES or len(endpoints) > MAX_ENDPOINTS or len(services) > MAX_SERVICES:
        raise RecordError("malformed", "record sizes")
    if record_swarm != swarm:
        raise RecordError("wrong_swarm", "record")
    return PeerRecord(
        public_key,
        swarm,
        curve_key,
        tuple(map(_endpoint, endpoints)),
        incarnation,
        agent,
        expiry_ms,
        grant,
        tuple(map(_service, services)),
        data,
    )


def saved_records(encoded: Iterable[bytes], swarm: bytes) -> list[PeerRecord]:
    """Return those of some saved records that are of this swarm, expired or not."""
    records = []
    for data in encoded:
        with contextlib.suppress(RecordError):
            records.append(_decode(data, swarm, verify))
    return records


def check_expiry(record: PeerRecord, now_unix: float) -> None:
    """Raise `RecordError` ("stale") for a record that is expired, or beyond any honest expiry."""
    if not now_unix * 1000 < record.expiry_ms <= (now_unix + MAX_RECORD_LIFE_S) * 1000:
        raise RecordError("stale", "record")


class RecordReader:
    """Reads peers' records. The same bytes come again and again, so it checks each signature once.

    It remembers the newest records that it found good, by a hash of their bytes.
    """

    def __init__(self, capacity: int = READER_CAPACITY) -> None:
        self._known: Recent[bytes, PeerRecord] = Recent(capacity)

    def open(self, data: bytes, swarm: bytes, now_unix: float, check: Verify) -> PeerRecord:
        """Verify and decode a record; see `open_record`, also for the errors."""
        record = self.read(data, swarm, check)
        check_expiry(record, now_unix)
        return record

    def read(self, data: bytes, swarm: bytes, check: Verify) -> PeerRecord:
        """Verify and decode a record, whenever it expires.

        Raises:
            RecordError: reason "malformed", "forged" or "wrong_swarm".
        """
        digest = hashlib.sha256(data).digest()
        record = self._known.get(digest)
        if record is None or record.swarm != swarm:
            record = _decode(data, swarm, check)
            self._known.set(digest, record)
        return record


def _endpoint(value: object) -> Endpoint:
    if not isinstance(value, str):
        raise RecordError("malformed", "endpoint")
    try:
        return Endpoint.parse(value)
    except BadAddress:
        raise RecordError("malformed", "endpoint") from None


def _service(value: object) -> Service:
    if not isinstance(value, list) or not 2 <= len(value) <= 2 + MAX_NEWER_FIELDS or not isinstance(value[0], str):
        raise RecordError("malformed", "service")
    try:
        return Service(value[0], _endpoint(value[1]))
    except ValueError:
        raise RecordError("malformed", "service") from None
