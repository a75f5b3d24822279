"""An invite: one line of text with which a person joins a swarm.

    gossamer://NAME/MANIFEST/SEED[,SEED...][/GRANT]/CHECK
    SEED = KEY@HOST:PORT, up to 8 of them

MANIFEST is the hash of the swarm's manifest, KEY the CURVE key that a seed proves, GRANT what lets the bearer into a
swarm with an allowlist. CHECK is the first three bytes of a hash of the line before it: of a line that was cut or
altered we dial nobody. All four are base64url without padding. The name is for people; the name in the manifest
counts. Only the brackets of an IPv6 address need quoting in a shell.

    GRANT = MessagePack [1, [expiry in ms, signature]]                              a pass, for one node
          | MessagePack [3, [private seed (32), uses, expiry in ms, signature]]     an invite, for several
"""

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass

from protocol.credentials.grants import (
    Certificate,
    Pass,
    Ticket,
    make_certificate,
    make_ticket,
    open_grant,
    read_certificate,
    unpack_kind,
)
from protocol.credentials.manifest import NAME, SwarmManifest, swarm_id
from protocol.credentials.records import Address, Endpoint
from protocol.errors import BadAddress, GrantError, InviteError
from protocol.identity import KEY_BYTES, Identity
from protocol.wire.encoding import is_bytes, pack

SCHEME = "gossamer://"
HASH_BYTES = 32
CHECK_BYTES = 3
MAX_SEEDS = 8
MAX_INVITE_CHARS = 4096
_SHARED = 3
_BASE64 = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class SharedInvite:
    """An invite for several uses: its private seed (32 bytes), and an owner's certificate of its public key."""

    secret: bytes
    certificate: Certificate

    def ticket(self, swarm: bytes, holder: bytes) -> Ticket:
        """Return a grant for the node with the public key `holder`."""
        return make_ticket(self.certificate, Identity(self.secret), swarm, holder)

    def encode(self) -> bytes:
        """Return the bytes that an invite holds."""
        invite = self.certificate
        return pack([_SHARED, [self.secret, invite.uses, invite.expiry_ms, invite.signature]])


def make_shared_invite(founder: Identity, manifest: SwarmManifest, uses: int, expiry_ms: int) -> SharedInvite:
    """Draw a key pair from the system's random source and certify it for `uses` nodes."""
    secret = secrets.token_bytes(KEY_BYTES)
    key = Identity(secret).public_key
    return SharedInvite(secret, make_certificate(founder, manifest.swarm, key, uses, expiry_ms))


@dataclass(frozen=True, slots=True)
class Invite:
    """The content of the line: whom to ask (`seeds`), for what (`manifest`, a hash), and with what right (`grant`)."""

    name: str
    manifest: bytes
    seeds: tuple[Address, ...]
    grant: Pass | SharedInvite | None = None

    @property
    def swarm(self) -> bytes:
        """The swarm's id, 16 bytes."""
        return swarm_id(self.manifest)

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """Read the line, which may stand among other words.

        Raises:
            InviteError: says what is wrong.
        """
        text = text.strip()
        if len(text) > MAX_INVITE_CHARS:
            raise InviteError(f"an invite has at most {MAX_INVITE_CHARS} characters, this one {len(text)}")
        lines = [word for word in text.split() if word.startswith(SCHEME)]
        if len(lines) > 1:
            raise InviteError(f"there are {len(lines)} invites: give one of them")
        if not lines:
            raise InviteError(f"an invite begins with {SCHEME}: paste the whole line that `gossamer invite` printed")
        line, _, check = lines[0].rpartition("/")
        parts = line.removeprefix(SCHEME).split("/")
        if not 3 <= len(parts) <= 4 or check != _check(line):
            raise InviteError(
                "the invite is not complete, or was altered: paste the whole line that `gossamer invite` printed"
            )
        name, manifest, seeds, *grant = parts
        if not NAME.fullmatch(name):
            raise InviteError("the invite's name is damaged: paste the whole line that `gossamer invite` printed")
        addresses = tuple(map(_seed, seeds.split(",", MAX_SEEDS)))
        if len(set(addresses)) != len(addresses) or len(addresses) > MAX_SEEDS:
            raise InviteError(f"the invite has more than {MAX_SEEDS} seeds, or one of them twice: ask for another")
        return cls(name, _binary(manifest, HASH_BYTES), addresses, _grant(_binary(grant[0])) if grant else None)

    def __str__(self) -> str:
        seeds = ",".join(f"{_text(seed.key)}@{str(seed.endpoint).removeprefix('tcp://')}" for seed in self.seeds)
        grant = f"/{_text(self.grant.encode())}" if self.grant else ""
        line = f"{SCHEME}{self.name}/{_text(self.manifest)}/{seeds}{grant}"
        return f"{line}/{_check(line)}"


def _check(line: str) -> str:
    return _text(hashlib.sha256(line.encode()).digest()[:CHECK_BYTES])


def _seed(text: str) -> Address:
    key, at, endpoint = text.partition("@")
    if not at:
        raise InviteError("a seed of the invite has no key: paste the whole line that `gossamer invite` printed")
    try:
        return Address(Endpoint.parse(f"tcp://{endpoint}"), _binary(key, KEY_BYTES))
    except BadAddress as error:
        raise InviteError(f"a seed of the invite: {error}") from None


def _grant(data: bytes) -> Pass | SharedInvite:
    try:
        kind, fields = unpack_kind(data)
        if kind != _SHARED:
            grant = open_grant(data)
            if isinstance(grant, Pass):
                return grant
        elif len(fields) >= 4 and is_bytes(fields[0], KEY_BYTES):
            secret, *certified = fields[:4]
            return SharedInvite(secret, read_certificate(Identity(secret).public_key, *certified))
    except GrantError:
        pass
    raise InviteError("the invite's last part, the grant, cannot be read: paste the whole line")


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _binary(text: str, size: int | None = None) -> bytes:
    """Decode base64url. Each value has one form only, so that a line that was cut or altered is noticed."""
    if _BASE64.fullmatch(text) and len(text) % 4 != 1:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        if _text(data) == text and size in (None, len(data)):
            return data
    raise InviteError("a part of the invite is damaged: paste the whole line that `gossamer invite` printed")
