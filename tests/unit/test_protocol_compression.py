"""How an item's content is packed, and that no peer's bytes unpack to more than is allowed."""

import random
import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MessageError
from protocol.wire.compression import PLAIN, WORTH_BYTES, ZSTD, pack_content, unpack_content


@given(st.binary(max_size=20_000) | st.text(max_size=20_000).map(str.encode))
def test_contents_come_back(body: bytes) -> None:
    assert unpack_content(pack_content(body), len(body)) == body
    assert unpack_content(pack_content(body * 9), 9 * len(body)) == body * 9


def test_text_is_compressed_and_noise_and_small_bodies_are_not() -> None:
    text = b"the quick brown fox jumps over the lazy dog " * 500
    assert len(pack_content(text)) < len(text) / 3
    noise = random.Random(1).randbytes(50_000)
    assert pack_content(noise) == PLAIN + noise
    assert pack_content(text[: WORTH_BYTES - 1]) == PLAIN + text[: WORTH_BYTES - 1]


def bomb(size: int) -> bytes:
    return ZSTD + zstandard.ZstdCompressor().compress(bytes(size))


def test_no_content_unpacks_to_more_than_is_allowed() -> None:
    huge = bomb(256 << 20)
    assert len(huge) < 32 << 10
    tracemalloc.start()
    for content, reason in (
        (huge, "oversized"),
        (PLAIN + bytes(1001), "oversized"),
        (bomb(1001), "oversized"),
        (ZSTD + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(500)), "malformed"),
        (bomb(500)[:-1], "malformed"),
        (bomb(500) + b"x", "malformed"),
        (bomb(300) + bomb(300)[1:], "malformed"),
        (b"", "malformed"),
        (b"\x02rest", "malformed"),
    ):
        with pytest.raises(MessageError) as caught:
            unpack_content(content, 1000)
        assert caught.value.reason == reason, content[:20]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@given(st.binary(max_size=200), st.sampled_from([PLAIN, ZSTD, ZSTD + b"\x28\xb5\x2f\xfd", b""]))
def test_arbitrary_contents_raise_nothing_but_the_typed_error(data: bytes, start: bytes) -> None:
    with suppress(MessageError):
        assert len(unpack_content(start + data, 1000)) <= 1000


def test_a_frame_that_claims_less_than_it_holds_is_malformed() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(range(256)) * 2)
    at = honest.index((512 - 256).to_bytes(2, "little"), 4)  # two bytes of size, less 256 (RFC 8878, 3.1.1.1.4)
    lying = honest[:at] + (0).to_bytes(2, "little") + honest[at + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == 256
    with pytest.raises(MessageError):
        unpack_content(ZSTD + lying, 1000)
