import pytest
import zmq
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from zmq.utils import z85

from protocol.errors import IdentityError
from protocol.identity import Identity, node_id, verify

SEED = bytes(range(32))
# The points of order 1, 2, 4 and 8 (Chalkias, Garillot, Nikolaenko 2020), the last two also with the other sign.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]


def test_ids_and_curve_keys_follow_from_the_seed_alone() -> None:
    one, two = Identity(SEED), Identity(SEED)
    assert (one.node_id, one.curve_key, one.curve_secret) == (two.node_id, two.curve_key, two.curve_secret)
    assert one.curve_key == z85.decode(zmq.curve_public(z85.encode(one.curve_secret)))
    assert one.curve_secret != SEED
    assert one.node_id == node_id(one.public_key) and len(one.node_id) == 32 and one.node_id.islower()
    assert Identity.generate().node_id != Identity.generate().node_id


def test_the_seed_is_not_printed() -> None:
    assert SEED.hex() not in repr(Identity(SEED))
    assert Identity(SEED).node_id in repr(Identity(SEED))


@given(st.binary(max_size=200), st.integers(0, 63))
def test_a_changed_signature_or_message_does_not_verify(message: bytes, position: int) -> None:
    identity = Identity(SEED)
    signature = bytearray(identity.sign(message))
    assert verify(identity.public_key, bytes(signature), message)
    assert not verify(identity.public_key, bytes(signature), message + b"\0")
    signature[position] ^= 1
    assert not verify(identity.public_key, bytes(signature), message)


@given(st.binary(min_size=70, max_size=200), st.integers(1, 64))
def test_a_signature_ends_where_it_has_to_and_so_does_a_key(message: bytes, moved: int) -> None:
    identity = Identity(SEED)
    key, signature = identity.public_key, identity.sign(message)
    assert not verify(key, signature + message[:moved], message[moved:])
    assert not verify(key, signature[:-moved], signature[-moved:] + message)
    assert not verify(key + message[:moved], signature, message)


# Signatures over "msg" by the key of `SEED` of which verifiers think differently: with an R of small order, which
# OpenSSL takes, and with a point of order 8 added to R, good for those only that multiply by the cofactor.
SMALL_R = (
    "0100000000000000000000000000000000000000000000000000000000000000"
    "c8494a4e5947f76c6559acfc0898f8f1908b6d2140466365408a068df916220e"
)
R_BESIDE_THE_GROUP = (
    "cdbc161be64c4302f56443ff29ccf36a2075be1a1fa67ff126b56315f5681c38"
    "ea18df343bc62ef3c4fca8563ee83e052820d6d50519a7101b1e0269242a330d"
)


@pytest.mark.parametrize("signature", [SMALL_R, R_BESIDE_THE_GROUP], ids=["small R", "R beside the group"])
def test_of_what_verifiers_disagree_about_nothing_is_good(signature: str) -> None:
    identity = Identity(SEED)
    assert verify(identity.public_key, identity.sign(b"msg"), b"msg")
    assert not verify(identity.public_key, bytes.fromhex(signature), b"msg")
    openssl = Ed25519PublicKey.from_public_bytes(identity.public_key)
    assert is_good(openssl, bytes.fromhex(signature), b"msg") is (signature == SMALL_R)


@pytest.mark.parametrize("key", [bytes.fromhex(key) for key in SMALL_ORDER])
def test_a_key_as_which_anybody_can_sign_is_nobodys(key: bytes) -> None:
    """R, the neutral point, and S = 0 satisfy S B = R + h A for messages whose h is a multiple of the order of A."""
    signature = bytes.fromhex(SMALL_ORDER[0]) + bytes(32)
    messages = [number.to_bytes(2, "big") for number in range(256)]
    openssl = Ed25519PublicKey.from_public_bytes(key)
    assert any(is_good(openssl, signature, message) for message in messages)  # so the signature is one
    assert not any(verify(key, signature, message) for message in messages)


def is_good(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


@given(st.binary(max_size=40), st.binary(max_size=70))
def test_verify_never_raises(key: bytes, signature: bytes) -> None:
    assert verify(key, signature, b"message") is False


def test_save_and_load_and_export_keep_the_key(tmp_path) -> None:
    path = tmp_path / "identity.key"
    identity = Identity.load_or_generate(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_generate(path).node_id == identity.node_id
    assert Identity.import_(identity.export()).node_id == identity.node_id
    assert [file.name for file in tmp_path.iterdir()] == ["identity.key"]


def test_saving_over_a_readable_file_makes_it_private(tmp_path) -> None:
    path = tmp_path / "identity.key"
    path.write_text("old")
    path.chmod(0o644)
    Identity(SEED).save(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o660, 0o640, 0o620])
def test_a_key_that_its_group_can_read_is_its_owners_alone_again_and_that_is_said(tmp_path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity(SEED).save(path)
    path.chmod(mode)
    with capture_logs() as said:
        assert Identity.load(path).node_id == Identity(SEED).node_id
    assert path.stat().st_mode & 0o777 == 0o600
    ((level, told),) = [(event["log_level"], event["path"]) for event in said]
    assert (level, told) == ("warning", str(path))
    with capture_logs() as said:
        Identity.load(path)
    assert said == []


def test_somebody_elses_key_that_a_group_can_read_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity.key"
    Identity(SEED).save(path)
    path.chmod(0o660)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(path)
    assert path.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o664, 0o606, 0o666])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity(SEED).save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(path)


def test_a_file_that_holds_no_key_is_named(tmp_path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(IdentityError, match="no key file"):
        Identity.load(path)
    for content in (b"", b"not a key", b"\xff" * 64, b"x" * 10_000):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(IdentityError, match=r"identity\.key"):
            Identity.load(path)
    with pytest.raises(IdentityError, match="cannot write"):
        Identity(SEED).save(tmp_path / "nowhere" / "identity.key")


@given(st.text(max_size=200))
def test_import_raises_only_the_typed_error(text: str) -> None:
    with pytest.raises(IdentityError):
        Identity.import_(text)


def test_another_type_of_key_is_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(IdentityError, match="Ed25519"):
        Identity.import_(other.decode())
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    with pytest.raises(IdentityError, match="unencrypted"):
        Identity.import_(locked.decode())
