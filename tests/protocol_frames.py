"""Frames as a test says and reads them: sealed or not, as their kind has it."""

from protocol.identity import Identity
from protocol.wire.envelope import Control, Envelope, Kind, control_frame, open_frame, read_control, seal


def frame_of(identity: Identity, swarm: bytes, kind: int, sequence: int, time_ms: int, body: bytes) -> bytes:
    """Return a frame of that kind, which `identity` signs if such are sealed."""
    is_sealed = kind in (Kind.HELLO, Kind.ITEM)
    return seal(identity, swarm, kind, sequence, time_ms, body) if is_sealed else control_frame(kind, body)


def opened(frame: bytes) -> Control | Envelope:
    """Return what a good frame says."""
    return read_control(frame) or open_frame(frame)
