"""Whose shared state holds: what each member says of its own, and the choice that all of them compute alike.

A member's `Share` is some 100 bytes, however many tensors there are: revision, strategy, one hash
of the layout (names, types, shapes) and one of the content. A table of the tensors, with a hash
each, comes along while it is short, and is otherwise asked for by those who need it.

The choice is a function of all shares, so nobody decides it for the others:

1. A RECEIVE_ONLY member offers nothing. If anybody is SEND_ONLY, only those offer, and they must have one content, for
   none of them can be given another.
2. A revision may only advance by one between two synchronisations: who breaks that is named in a `Mismatch`. The
   revision that most members with a history have synchronised last counts (if equally many, the newest of those). An
   offer more than one ahead of it is of another history, as after a partition or from a newcomer, and does not count.
3. The newest revision of the offers left is taken; of its contents, the one that most members have; if equally many,
   the one with the greatest hash.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collectives.errors import Aborted, Mismatch, NotEnoughPeers
from collectives.types import SyncStrategy
from protocol.errors import PeerError
from protocol.identity import NodeId
from protocol.wire.encoding import UINT64_MAX, is_bytes, is_uint, pack, unpack

HASH_BYTES = hashlib.sha256().digest_size
# The coordinator sends every share to every member: at 1,000 members 2 KiB each are 2 MB to each of them.
MAX_INLINE_TABLE = 2048
MAX_TABLE_BYTES = 64 << 20  # some 500,000 tensors

_VERSION = 1
_STRATEGIES = tuple(SyncStrategy)  # their order is what travels


class ShareError(PeerError):
    """Bytes that are no share, or a table that is not the one that was promised."""


@dataclass(frozen=True, slots=True)
class Share:
    """A member's statement of its shared state.

    `synced` is the revision that it last had in common with others, None for one without a history.
    """

    strategy: SyncStrategy
    revision: int
    synced: int | None
    layout: bytes
    content: bytes
    table_bytes: int
    table: bytes  # empty when it is too long to come along

    def encode(self) -> bytes:
        """Return the wire form, at most `MAX_INLINE_TABLE` and 100 bytes more."""
        synced = 0 if self.synced is None else self.synced + 1
        fields = [_VERSION, _STRATEGIES.index(self.strategy), self.revision, synced]
        return pack([*fields, self.layout, self.content, self.table_bytes, self.table])

    @classmethod
    def decode(cls, data: bytes) -> "Share":
        """Read what another member sent; raises `ShareError` for anything else."""
        fields: list[Any] = unpack(data, 8, error=ShareError, max_bytes=MAX_INLINE_TABLE)
        version, strategy, revision, synced, layout, content, table_bytes, table = fields
        sound = (
            version == _VERSION
            and is_uint(strategy, len(_STRATEGIES) - 1)
            and is_uint(revision)
            and is_uint(synced)
            and is_bytes(layout, HASH_BYTES)
            and is_bytes(content, HASH_BYTES)
            and is_uint(table_bytes, MAX_TABLE_BYTES)
            and isinstance(table, bytes)
            and len(table) in (0, table_bytes)
        )
        if not sound:
            raise ShareError("malformed", "share")
        return cls(_STRATEGIES[strategy], revision, synced - 1 if synced else None, layout, content, table_bytes, table)


@dataclass(frozen=True, slots=True)
class StateChoice:
    """The state that holds, and the members that have it, in the order of their ids."""

    revision: int
    content: bytes
    holders: tuple[NodeId, ...]


def choose(shares: Mapping[NodeId, Share]) -> StateChoice:
    """Return the state that holds among members whose layouts are equal; a pure function.

    Raises:
        Mismatch: a member's revision advanced by more than one, or two SEND_ONLY members differ.
        NotEnoughPeers: nobody offers a state.
    """
    _check_revisions(shares)
    offers = {member: share for member, share in shares.items() if share.strategy is not SyncStrategy.RECEIVE_ONLY}
    if not offers:
        raise NotEnoughPeers("every member would only receive: let one of them offer its state, or wait for another")
    senders = {member: share for member, share in offers.items() if share.strategy is SyncStrategy.SEND_ONLY}
    if senders:
        _check_senders(senders)
    else:
        offers = _of_this_history(offers, shares)
    offers = senders or offers
    newest = max(share.revision for share in offers.values())
    holders = Counter(share.content for share in offers.values() if share.revision == newest)
    content = max(holders, key=lambda found: (holders[found], found))
    # Any member that has the content may serve it, and one that only receives is none the worse a source.
    having = sorted(member for member, share in shares.items() if share.content == content)
    return StateChoice(newest, content, tuple(having))


def _check_revisions(shares: Mapping[NodeId, Share]) -> None:
    for member in sorted(shares):
        share = shares[member]
        if share.synced is not None and share.revision > share.synced + 1:
            raise Mismatch(member, "revision", share.revision, f"at most {share.synced + 1}, one more than the last")


def _check_senders(senders: Mapping[NodeId, Share]) -> None:
    first, *others = sorted(senders)
    for other in others:
        mine, theirs = senders[first], senders[other]
        if (mine.revision, mine.content) != (theirs.revision, theirs.content):
            raise Mismatch(
                other,
                "SEND_ONLY content",
                f"revision {theirs.revision}, {theirs.content.hex()[:12]}",
                f"revision {mine.revision}, {mine.content.hex()[:12]} of member {first}",
            )


def _of_this_history(offers: Mapping[NodeId, Share], shares: Mapping[NodeId, Share]) -> dict[NodeId, Share]:
    """Leave out offers more than one revision ahead of what most members share; if none is left, keep all."""
    synced = Counter(share.synced for share in shares.values() if share.synced is not None)
    if not synced:
        return dict(offers)
    last = max(synced, key=lambda revision: (synced[revision], revision))
    near = {member: share for member, share in offers.items() if share.revision <= min(last + 1, UINT64_MAX)}
    return near or dict(offers)


def decode_all(shares: Mapping[NodeId, bytes]) -> dict[NodeId, Share]:
    """Read every member's share.

    Raises:
        Aborted: a member sent something else; it runs another version, or lies.
    """
    read = {}
    for member, data in shares.items():
        try:
            read[member] = Share.decode(data)
        except ShareError as error:
            raise Aborted(f"member {member} sent no share of a state ({error}): run one version", member) from None
    return read
