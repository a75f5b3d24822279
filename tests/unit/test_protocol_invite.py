"""The invite's line: what was written is read back, and a damaged one is refused with one clear line."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.credentials.grants import make_certificate, make_pass
from protocol.credentials.invite import MAX_INVITE_CHARS, MAX_SEEDS, Invite, SharedInvite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestLimits, ManifestSplit, ManifestTask, make_manifest
from protocol.credentials.records import Address, Endpoint
from protocol.errors import InviteError
from protocol.identity import Identity

FOUNDER, GUEST = Identity(bytes(32)), Identity(bytes([1]) * 32)
CLUB = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, [ManifestTask("t", 1, "ab", "{}")])
HOSTS = ["127.0.0.1", "::1", "2001:db8::7", "node-1.example.org", "localhost"]
SEED = Address(Endpoint("192.0.2.7", 4001), bytes(range(32)))

keys = st.binary(min_size=32, max_size=32)
seeds = st.builds(Address, st.builds(Endpoint, st.sampled_from(HOSTS), st.integers(1, 65535)), keys)
grants = st.one_of(
    st.none(),
    st.integers(0, 2**63).map(lambda expiry: make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, expiry)),
    st.builds(make_shared_invite, st.just(FOUNDER), st.just(CLUB), st.integers(1, 4096), st.integers(0, 2**63)),
)
invites = st.builds(
    Invite,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    keys,
    st.lists(seeds, min_size=1, max_size=MAX_SEEDS, unique=True).map(tuple),
    grants,
)


@given(invites)
def test_an_invite_is_read_as_it_was_written(invite: Invite) -> None:
    text = str(invite)
    assert Invite.parse(f"Join us with\n\n  {text}\n\nuntil Friday!") == invite
    assert len(text) <= MAX_INVITE_CHARS
    assert not set(text) & set(" \t\n'\"$&;|<>()*?#~`\\{}!")


@given(invites, st.data())
def test_a_line_that_was_cut_or_lacks_a_character_is_refused(invite: Invite, data: st.DataObject) -> None:
    text = str(invite)
    end = data.draw(st.integers(0, len(text) - 1))
    for wrong in (text[:end], text[:end] + text[end + 1 :]):
        with pytest.raises(InviteError):
            Invite.parse(wrong)


@given(
    st.text(max_size=200),
    st.sampled_from(["", "gossamer://", "gossamer://club/", str(Invite("a", bytes(32), (SEED,)))[:-4]]),
)
def test_any_other_text_gives_one_line(text: str, start: str) -> None:
    try:
        Invite.parse(start + text)
    except InviteError as error:
        assert len(str(error).splitlines()) == 1


LINE = str(Invite("club", bytes(32), (SEED,)))[:-5]


def checked(line: str) -> str:
    """Return a line with its checksum, whatever else is wrong with it."""
    return f"{line}/{base64.urlsafe_b64encode(hashlib.sha256(line.encode()).digest()[:3]).decode()}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with gossamer://"),
        ("https://club", "begins with gossamer://"),
        ("gossamer://club", "not complete"),
        (LINE.replace("club", "../up"), "name"),
        (LINE.replace("club", "cl\0ub"), "name"),
        (LINE.replace("AAAA", "AA", 1), "damaged"),
        (LINE.replace("AAAA", "AA+A", 1), "damaged"),
        (LINE.replace("AAA/", "AAB/", 1), "damaged"),  # the same 32 bytes with other spare bits
        (LINE.replace("@192", "192"), "no key"),
        (LINE.replace(":4001", ":0"), "port must be"),
        (LINE.replace("192.0.2.7", "192.0.2.999.;x"), "no endpoint"),
        (LINE.replace("192.0.2.7:4001", "*:4001"), "no host name"),
        (LINE + "," + LINE.rpartition("/")[2], "twice"),
        (LINE + "/", "damaged"),
        (LINE + "/AAAA", "grant"),
        (LINE + "/a/b", "not complete"),
        (LINE + "A" * MAX_INVITE_CHARS, "at most"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(InviteError, match=says):
        Invite.parse(checked(text))


def test_of_two_invites_none_is_taken() -> None:
    with pytest.raises(InviteError, match="there are 2 invites"):
        Invite.parse(f"{checked(LINE)}\n{checked(LINE)}")


def test_a_ticket_is_no_invite() -> None:
    ticket = make_shared_invite(FOUNDER, CLUB, 3, 9).ticket(CLUB.swarm, GUEST.public_key)
    with pytest.raises(InviteError, match="grant"):
        Invite.parse(str(Invite("club", CLUB.hash, (SEED,), ticket)))  # type: ignore[arg-type]


def test_the_swarm_is_that_of_the_manifest() -> None:
    assert Invite("club", CLUB.hash, (SEED,)).swarm == CLUB.swarm


def test_the_documented_vector_holds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "swarms.md").read_text()
    match = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert match is not None
    vector = json.loads(match[1])
    founder, joiner = (Identity(bytes.fromhex(vector[name])) for name in ("founder_seed", "joiner_seed"))
    manifest = make_manifest(
        founder,
        vector["name"],
        vector["created_ms"],
        JoinPolicy(vector["policy"]),
        [ManifestTask(*vector["task"])],
        vector["allowed"],
        ManifestLimits(*vector["limits"]),
        ManifestSplit(*vector["split"]),
    )
    assert manifest.encoded.hex() == vector["manifest"]
    assert (manifest.hash.hex(), manifest.swarm.hex()) == (vector["manifest_hash"], vector["swarm"])
    assert make_pass(founder, manifest.swarm, joiner.node_id, vector["expiry_ms"]).encode().hex() == vector["pass"]
    secret = bytes.fromhex(vector["invite_seed"])
    key = Identity(secret).public_key
    certificate = make_certificate(founder, manifest.swarm, key, vector["uses"], vector["expiry_ms"])
    shared = SharedInvite(secret, certificate)
    assert shared.ticket(manifest.swarm, joiner.public_key).encode().hex() == vector["ticket"]
    seed = Address.parse(vector["seed_address"])
    assert str(Invite(vector["name"], manifest.hash, (seed,), shared)) == vector["invite"]
