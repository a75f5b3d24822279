"""A swarm's manifest: it comes back as it was signed, certifies itself, and is refused for anything else."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.credentials.manifest import (
    MAX_ALLOWED,
    MAX_GROUP_BYTES,
    MAX_MANIFEST_BYTES,
    JoinPolicy,
    ManifestLimits,
    ManifestSplit,
    ManifestTask,
    make_manifest,
    open_manifest,
)
from protocol.errors import ManifestError
from protocol.identity import Identity, node_id
from protocol.wire.encoding import pack
from protocol.wire.envelope import HEADER_BYTES

FOUNDER = Identity(bytes(32))
TASK = ManifestTask("builtin/sums", 1, "0123456789abcdef", '{"difficulty":2}')
NODES = [node_id(bytes([n % 256, n // 256]) * 16) for n in range(MAX_ALLOWED + 1)]

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
tasks = st.builds(
    ManifestTask,
    name=st.from_regex(r"[a-z0-9_][a-z0-9_./-]{0,30}", fullmatch=True),
    version=st.integers(0, 2**64 - 1),
    config=st.from_regex(r"[0-9a-f]{1,64}", fullmatch=True),
    options=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
)


def small(**changes):
    return make_manifest(
        **{"founder": FOUNDER, "name": "s", "created_ms": 1, "policy": JoinPolicy.OPEN, "tasks": [TASK]} | changes
    )


def reason(data: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        open_manifest(data)
    return caught.value.reason


@given(
    names,
    st.integers(0, 2**64 - 1),
    st.sampled_from(JoinPolicy),
    st.lists(st.sampled_from(NODES), max_size=9),
    st.lists(tasks, min_size=1, max_size=5, unique_by=lambda task: task[:3]),
    st.builds(
        ManifestLimits,
        st.integers(1, 1 << 20),
        st.integers(1, 1024),
        st.integers(1, 86400),
        st.just(0) | st.integers(60, 86400),
    ),
    st.builds(ManifestSplit, st.integers(1, 500_000), st.integers(0, 2**32 - 1)),
    st.booleans(),
)
def test_a_manifest_comes_back_as_it_was_signed(name, created, policy, allowed, listed, limits, split, archive) -> None:
    made = make_manifest(FOUNDER, name, created, policy, listed, allowed, limits, split, archive=archive)
    opened = open_manifest(made.encoded)
    assert opened == made
    assert (opened.name, opened.created_ms, opened.policy, opened.limits) == (name, created, policy, limits)
    assert (opened.split, opened.archive) == (split, archive)
    assert opened.tasks == tuple(listed)
    assert opened.allowed == set(allowed)
    assert opened.founder == FOUNDER.node_id
    assert opened.swarm == hashlib.sha256(made.encoded).digest()[:16]


@given(st.integers(0, len(small().encoded) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, change: int) -> None:
    data = bytearray(small().encoded)
    data[place] ^= change
    assert reason(bytes(data)) == "forged"


@given(st.binary(max_size=300))
def test_noise_is_no_manifest(noise: bytes) -> None:
    assert reason(noise) in {"malformed", "forged"}
    assert reason(signed(noise)) == "malformed"


def signed(payload: bytes) -> bytes:
    return FOUNDER.public_key + FOUNDER.sign(b"gossamer/manifest/1\x00" + payload) + payload


def fields(**changes) -> bytes:
    tree = {
        "format": 1,
        "name": "s",
        "version": 256,
        "created": 1,
        "policy": "open",
        "allowed": b"",
        "tasks": [list(TASK)],
        "limits": [1000, 8, 60],
        "split": [1000, 7],
        "archive": 1,
    }
    return signed(pack(list((tree | changes).values())))


def test_fields_of_a_newer_minor_version_are_skipped() -> None:
    newer = [*TASK, "something new"]
    opened = open_manifest(fields(tasks=[newer], limits=[1000, 8, 60, 300, 7], split=[1000, 7, "salted"], more="more"))
    assert opened.tasks == (TASK,)
    assert opened.limits == ManifestLimits(1000, 8, 60, 300)
    assert opened.split == ManifestSplit(1000, 7) and opened.archive


def test_a_manifest_that_says_nothing_of_them_has_the_default_split_and_allows_no_archive() -> None:
    payload = pack([1, "s", 256, 1, "open", b"", [list(TASK)], [1000, 8, 60]])
    opened = open_manifest(signed(payload))
    assert opened.split == ManifestSplit(125_000, 0) == small().split
    assert not opened.archive and not small().archive
    assert opened.encoded == signed(payload)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"archive": True},
        {"archive": 2},
        {"archive": b"yes"},
        {"name": ""},
        {"name": "../up"},
        {"name": "x" * 65},
        {"name": 7},
        {"version": -1},
        {"created": True},
        {"policy": "closed"},
        {"policy": ["open"]},
        {"allowed": bytes(19)},
        {"allowed": "text"},
        {"tasks": []},
        {"tasks": [list(TASK), list(TASK)]},
        {"tasks": [list(TASK)[:3]]},
        {"tasks": [[TASK.name, 1, "no hex", ""]]},
        {"tasks": [["a name", 1, "ab", ""]]},
        {"tasks": [[TASK.name, 1, "ab", "x" * 2049]]},
        {"tasks": [[f"t{n}", 1, "ab", ""] for n in range(65)]},
        {"limits": [0, 8, 60]},
        {"limits": [1000, 8]},
        {"limits": [1000, 8, 1e3]},
        {"limits": [1000, 8, 60, 59]},
        {"limits": [1000, 8, 60, 86401]},
        {"limits": [MAX_GROUP_BYTES + 1, 8, 60]},
        {"split": []},
        {"split": [1000]},
        {"split": "1000"},
        {"split": None},
        {"split": [0, 7]},
        {"split": [-1, 7]},
        {"split": [500_001, 7]},
        {"split": [1000.0, 7]},
        {"split": [True, 7]},
        {"split": [1000, -1]},
        {"split": [1000, 2**32]},
        {"split": [1000, "7"]},
    ],
)
def test_what_is_signed_but_not_a_manifest_is_malformed(change) -> None:
    assert open_manifest(fields()).name == "s"
    assert reason(fields(**change)) == "malformed"


def test_its_size_is_checked_before_anything_else() -> None:
    largest = small(allowed=NODES[:MAX_ALLOWED])
    assert len(largest.encoded) < MAX_MANIFEST_BYTES
    assert reason(bytes(MAX_MANIFEST_BYTES + 1)) == "oversized"
    with pytest.raises(ManifestError, match="ValueError"):
        small(allowed=NODES)
    long = [ManifestTask(f"t{n}", 1, "ab", "x" * 2048) for n in range(20)]
    with pytest.raises(ManifestError, match="at most 32768 bytes"):
        small(tasks=long)


def test_another_signer_makes_another_swarm() -> None:
    other = make_manifest(Identity(bytes([1]) * 32), "s", 1, JoinPolicy.OPEN, [TASK])
    assert other.swarm != small().swarm
    assert reason(other.encoded[:32] + small().encoded[32:]) == "forged"
    assert len(small().encoded) > HEADER_BYTES
