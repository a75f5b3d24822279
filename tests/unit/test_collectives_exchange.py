"""What streams bring for operations that have not started, are over, or are late; and whose memory it goes to."""

import fcntl
import gc
import queue
import socket
import struct
import termios
import threading
import time
import tracemalloc
import types
import weakref

import pytest
import torch

from collectives import Codec, Op
from collectives.agreement.views import OpId
from collectives.errors import Aborted, DeadlineExceeded
from collectives.mesh.addresses import prepare
from collectives.mesh.data_plane import MAX_UNKNOWN, PATIENCE_S, DataPlane
from collectives.mesh.framing import (
    HEADER_BYTES,
    MAX_HELD_BYTES,
    MAX_HELD_PIECES,
    PIECE_BYTES,
    RECORD_BYTES,
    Piece,
    PieceKind,
    WireError,
    header,
    operation_key,
    read_header,
)
from collectives.mesh.handshake import ProvenPeer, Purpose
from collectives.mesh.port import MAX_REQUEST_BYTES, MAX_SLOT
from collectives.mesh.sealing import KEY_BYTES, TAG_BYTES, Opener, Sealer
from collectives.mesh.socket_port import MAX_UNSENT_ANSWERS, Inbox, Landing
from collectives.mesh.stream import Outgoing, SendQueue, Stream
from collectives.reduce import direct, gather
from collectives.reduce.kernels import Scratch, describe
from collectives.threads import join_all
from collectives.types import Protection
from protocol.identity import NodeId
from tests.waiting import wait_until

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
ORDER = (A, B)
COUNT = 1 << 20
OP = OpId(b"12345678", 1, 0, 0)


def fill(exchange, op=OP):
    """Bring as much for `op` as is held of a member, and return a piece that is too much."""
    exchange.link(B)
    pieces = [Piece(slot, 0, PIECE_BYTES, PIECE_BYTES) for slot in range(MAX_HELD_BYTES // PIECE_BYTES + 1)]
    for piece in pieces[:-1]:
        exchange.arrived(B, operation_key(op), piece, exchange.place(B, operation_key(op), piece))
    return pieces[-1]


def add_stream(exchange, member, sock, number=0, dialled=True):
    """Let a socket be a data stream with a member."""
    sealer, opener = Sealer(bytes(KEY_BYTES)), Opener(bytes(KEY_BYTES))
    exchange.add_stream(ProvenPeer(member, bytes(8), Purpose.DATA, number, sealer, opener, b""), sock, dialled)


class Meanwhile(threading.Condition):
    """What happens while somebody waits."""

    def __init__(self, event):
        super().__init__()
        self.event = event

    def wait(self, timeout=None):
        self.event()
        return False


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("collectives.mesh.socket_port.time", clock)
    return clock


def test_a_stream_waits_for_a_member_that_stands_still_as_long_as_the_operation_has_time(clock):
    exchange = DataPlane(A)
    port = exchange.open(OP, {A, B}, clock.now + 300)
    piece = fill(exchange)
    into = memoryview(bytearray(PIECE_BYTES))

    def stand_still():
        clock.now += 200
        port.expect(B, piece.slot, into)

    port.inbox.changed = Meanwhile(stand_still)
    assert exchange.place(B, port.key, piece).owner is into.obj
    assert port.inbox.ended is None


def test_nothing_waits_for_an_operation_that_is_out_of_time(clock):
    exchange = DataPlane(A)
    port = exchange.open(OP, {A, B}, clock.now + 30)
    piece = fill(exchange)
    port.inbox.changed = Meanwhile(lambda: setattr(clock, "now", clock.now + 31))
    assert exchange.place(B, port.key, piece) is None


def test_a_stream_waits_a_bounded_time_for_an_operation_that_does_not_start(clock, monkeypatch):
    waits = []

    def pass_time():
        waits.append(clock.now)
        clock.now += PATIENCE_S

    monkeypatch.setattr("collectives.mesh.data_plane.Inbox", lambda: inbox)
    inbox = Inbox()
    exchange = DataPlane(A)
    piece = fill(exchange)
    inbox.changed = Meanwhile(pass_time)
    assert exchange.place(B, operation_key(OP), piece) is None
    assert len(waits) == 1 and isinstance(inbox.ended, Aborted)


@pytest.mark.parametrize("end", [lambda exchange: exchange.begin_view(), lambda exchange: exchange.forget(OP)])
def test_what_came_for_an_operation_that_will_not_start_is_dropped_and_its_stream_goes_on(end):
    exchange = DataPlane(A)
    piece = fill(exchange)
    found = []
    reader = threading.Thread(target=lambda: found.append(exchange.place(B, operation_key(OP), piece)), daemon=True)
    reader.start()
    end(exchange)
    reader.join(10)
    assert found == [None]
    assert exchange.place(B, operation_key(OP), piece) is None  # and what comes later has no place either


def test_an_operation_whose_payloads_were_dropped_does_not_wait_for_them():
    exchange = DataPlane(A)
    exchange.link(B)
    for n in range(MAX_UNKNOWN + 1):
        exchange.told(B, operation_key(OP._replace(n=n)), PieceKind.REQUEST, 0, b"")
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    with pytest.raises(Aborted, match="in flight"):
        port.wait(port.expect(B, 0, memoryview(bytearray(1))))


def test_what_one_member_sends_early_costs_no_other_its_place():
    exchange = DataPlane(A)
    exchange.link(C)
    port = exchange.open(OP, {A, B, C}, time.monotonic() + 60)
    fill(exchange)
    for n in range(1, 2 * MAX_UNKNOWN):
        exchange.told(B, operation_key(OP._replace(n=n)), PieceKind.REQUEST, 0, b"")
    early = OP._replace(n=10_000)
    for key in (port.key, operation_key(early)):
        assert exchange.place(C, key, Piece(0, 0, PIECE_BYTES, PIECE_BYTES)) is not None
    port = exchange.open(early, {A, C}, time.monotonic() + 60)
    assert port.inbox.ended is None


def test_what_is_held_of_a_member_is_given_back_when_its_operation_ends():
    exchange = DataPlane(A)
    for n in range(3):
        op = OP._replace(n=n)
        port = exchange.open(op, {A, B}, time.monotonic() + 60)
        fill(exchange, op)
        exchange.close_port(port)
    early = OP._replace(n=3)
    fill(exchange, early)
    exchange.begin_view()
    fill(exchange, OP._replace(n=4))


def test_one_that_comes_back_again_and_again_has_no_more_held_than_one_that_stays(monkeypatch):
    made = []

    def make():
        inbox = Inbox()
        made.append(weakref.ref(inbox))
        return inbox

    monkeypatch.setattr("collectives.mesh.data_plane.Inbox", make)
    exchange = DataPlane(A)
    for n in range(5):
        fill(exchange, OP._replace(n=n))
        exchange.drop(B, "the connection is lost")
    gc.collect()
    assert made and not any(inbox() for inbox in made)
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    with pytest.raises(Aborted, match="the connection is lost"):
        port.wait(port.expect(B, 0, memoryview(bytearray(PIECE_BYTES))))


def test_one_that_asks_and_never_reads_does_not_have_its_answers_pile_up():
    exchange, answered = DataPlane(A), queue.SimpleQueue()
    exchange.link(B)  # and no stream
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    before = set(threading.enumerate())
    port.serve(lambda _, question: answered.put(question) or b"x")
    (server,) = set(threading.enumerate()) - before
    for n in range(1, MAX_UNSENT_ANSWERS + 11):
        exchange.told(B, port.key, PieceKind.REQUEST, MAX_SLOT + n, b"?")
        if n <= MAX_UNSENT_ANSWERS:
            assert answered.get(timeout=10) == b"?"
    wait_until(lambda: port._left._waiters or not answered.empty(), 10, "the server to wait")
    exchange.close_port(port)
    server.join(10)
    assert not server.is_alive() and answered.empty()


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (PieceKind.REQUEST, MAX_REQUEST_BYTES + 1),
        (PieceKind.REFUSAL, MAX_REQUEST_BYTES + 1),
        (PieceKind.DATA, 2**23),
        (PieceKind.FIN, 1),
    ],
)
def test_what_is_longer_than_its_kind_may_be_is_not_read(kind, length):
    with pytest.raises(WireError):
        read_header(header(operation_key(OP), kind, Piece(0, 0, length, length)))


def test_one_that_is_no_member_has_no_place_at_all():
    exchange = DataPlane(A)
    port = exchange.open(OP, {A, B, C}, time.monotonic() + 60)
    for key in (port.key, operation_key(OP._replace(n=1))):
        assert exchange.place(C, key, Piece(0, 0, 1, 1)) is None
    exchange.link(C)
    assert exchange.place(C, port.key, Piece(0, 0, 1, 1)) is not None


def test_a_stream_that_cannot_go_on_ends_as_a_whole():
    class Full:
        def place(self, source, key, piece):
            raise MemoryError

    here, there = socket.socketpair()
    peer = ProvenPeer(B, bytes(8), Purpose.DATA, 0, Sealer(bytes(KEY_BYTES)), Opener(bytes(KEY_BYTES)), b"")
    ended = []
    stream = Stream(peer, here, SendQueue(), Full(), lambda _, reason: ended.append(reason))
    stream.start()
    with there:
        there.sendall(Sealer(bytes(KEY_BYTES)).seal(header(operation_key(OP), PieceKind.DATA, Piece(0, 0, 1, 1))))
        assert there.recv(1) == b""
    join_all(stream.threads, 10)
    assert ended == ["internal_error"] and here.fileno() == -1


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_stream_keeps_no_memory_of_the_large_pieces_that_it_carried(encrypted):
    class Places:
        came = threading.Event()

        def place(self, source, key, piece):
            return Landing(memoryview(into))

        def arrived(self, source, key, piece, where):
            self.came.set()

    class Handed:
        key, wanted = operation_key(OP), True

        def left(self):
            pass

    def stream(own, other, sock, outbox):
        sealer, opener = Sealer(bytes(KEY_BYTES)), Opener(bytes(KEY_BYTES))
        peer = ProvenPeer(other, bytes(8), Purpose.DATA, 0, sealer, opener, b"", bare=not encrypted)
        return Stream(peer, sock, outbox, Places(), lambda *_: None)

    into, payload = bytearray(PIECE_BYTES), bytes(PIECE_BYTES)
    outboxes = SendQueue(), SendQueue()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pair = [stream(*ends) for ends in zip((A, B), (B, A), socket.socketpair(), outboxes, strict=True)]
        for side in pair:
            side.start()
        outboxes[0].put(
            [Outgoing(Handed(), PieceKind.DATA, Piece(0, 0, PIECE_BYTES, PIECE_BYTES), memoryview(payload))]
        )
        assert Places.came.wait(10)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 4 * RECORD_BYTES + (200 << 10)
    finally:
        tracemalloc.stop()
        for side in pair:
            side.close()
            join_all(side.threads, 10)


def job():
    return describe(ORDER, torch.float32, Op.SUM, dict.fromkeys(ORDER, 1.0), Codec.NONE)


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda port, values, scratch: direct.all_reduce(port, job(), values, scratch),
        lambda port, values, scratch: gather.all_gather(port, ORDER, values, scratch),
        lambda port, values, scratch: gather.broadcast(port, ORDER, values, B, scratch),
    ],
    ids=["direct", "all_gather", "broadcast"],
)
def test_no_later_operation_gets_memory_that_a_stream_may_still_write_to(algorithm):
    """A reader that was given a place before the attempt ended fills it after: nobody else may have that memory."""
    exchange, scratch = DataPlane(A), Scratch()
    exchange.link(B)
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    expected, raised = [], []
    expect = port.expect
    port.expect = lambda source, slot, into: (expected.append((slot, into)), expect(source, slot, into))[1]

    def run():
        try:
            algorithm(port, torch.zeros(COUNT), scratch)
        except Aborted as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    slot, into = wait_until(lambda: expected and expected[0], 10, "the algorithm to expect something")
    length = min(into.nbytes, PIECE_BYTES)
    where = exchange.place(B, port.key, Piece(slot, 0, into.nbytes, length))
    exchange.close_port(port)
    thread.join(10)
    assert raised

    later = [scratch.take(COUNT * factor, torch.float32).zero_() for factor in (1, 2)]
    later.append(scratch.take(32 * 2**20, torch.uint8).zero_())
    where.part(0, length)[:] = b"\xff" * length
    assert all(not buffer.any() for buffer in later)


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("came", [1, RECORD_BYTES + 1000])
def test_nothing_is_received_to_the_buffers_of_an_operation_that_is_over(protection, came):
    """A slow stream is in the middle of a piece when its operation is called off; the next operation uses it still."""
    encrypts, bare = protection is Protection.ENCRYPTED, protection is Protection.UNAUTHENTICATED
    exchange, sealer = DataPlane(A), Sealer(bytes(KEY_BYTES), encrypts=encrypts)
    exchange.link(B)
    here, there = socket.socketpair()
    opener = Opener(bytes(KEY_BYTES), encrypts=encrypts)
    peer = ProvenPeer(B, bytes(8), Purpose.DATA, 0, Sealer(bytes(KEY_BYTES)), opener, b"", bare=bare)
    exchange.add_stream(peer, here, True)
    payload = b"\xff" * (2 * RECORD_BYTES)

    def piece_of(port):
        head = sealer.seal(header(port.key, PieceKind.DATA, Piece(0, 0, len(payload), len(payload))))
        parts = [payload[at : at + RECORD_BYTES] for at in range(0, len(payload), RECORD_BYTES)]
        return head, b"".join(parts if bare else map(sealer.seal, parts))

    ports = [exchange.open(OP._replace(n=n), {A, B}, time.monotonic() + 60) for n in (0, 1)]
    buffers = [bytearray(len(payload)) for _ in ports]
    tickets = [port.expect(B, 0, memoryview(buffer)) for port, buffer in zip(ports, buffers, strict=True)]
    with there:
        head, rest = piece_of(ports[0])
        there.sendall(head + rest[:came])
        wait_until(lambda: unread(here) == 0, 10, "the stream to read what came")
        exchange.close_port(ports[0])
        buffers[0][:] = b"\x01" * len(payload)
        there.sendall(rest[came:] + b"".join(piece_of(ports[1])))
        ports[1].wait(tickets[1])
        assert buffers == [b"\x01" * len(payload), payload]
    exchange.close()


def test_memory_that_is_handed_over_before_the_handshake_is_read_breaks_no_stream():
    """What comes with the end of the handshake is read without descriptors."""
    exchange, sealer = DataPlane(A), Sealer(bytes(KEY_BYTES))
    exchange.link(B)
    here, there = socket.socketpair()
    early = sealer.seal(header(bytes(16), PieceKind.MEMORY, Piece(0, 0, 16, 16))) + bytes(16)
    peer = ProvenPeer(
        B, bytes(8), Purpose.DATA, 0, Sealer(bytes(KEY_BYTES)), Opener(bytes(KEY_BYTES)), early, bare=True
    )
    exchange.add_stream(peer, here, True)
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    ticket = port.expect(B, 0, memoryview(into := bytearray(3)))
    with there:
        there.sendall(sealer.seal(header(port.key, PieceKind.DATA, Piece(0, 0, 3, 3))) + b"abc")
        port.wait(ticket)
    assert into == b"abc"
    exchange.close()


def test_a_plane_that_closes_waits_for_the_threads_of_a_stream_that_the_other_end_closed_before(monkeypatch):
    """A thread that lived on while Python ended freed a tensor, and the process ended by SIGABRT."""
    write, may_end, writers, lived_on = Stream._write, threading.Event(), [], []

    def slow(stream):
        write(stream)
        writers.append(threading.current_thread())
        assert may_end.wait(60)

    monkeypatch.setattr(Stream, "_write", slow)
    plane, (here, there) = DataPlane(A), socket.socketpair()
    plane.link(B)
    add_stream(plane, B, here)
    there.close()
    wait_until(lambda: writers and not plane.open_streams(B), 60, "the stream to end")

    def close():
        plane.close()
        lived_on.extend(thread for thread in writers if thread.is_alive())

    closing = threading.Thread(target=close)
    closing.start()
    closing.join(0.2)  # long enough for one that does not wait
    may_end.set()
    closing.join(60)
    assert not closing.is_alive() and lived_on == []


def unread(sock):
    """Return how many bytes have come that nobody has read."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]


def test_a_stream_whose_path_drops_everything_is_closed_by_the_first_operation_that_times_out():
    planes, sockets, far = {A: DataPlane(A), B: DataPlane(B)}, {}, {}
    for own, other in ((A, B), (B, A)):
        sockets[own], far[own] = socket.socketpair()  # nobody carries what is sent, and nobody says so
        planes[own].link(other)
        add_stream(planes[own], other, sockets[own], dialled=own == A)
    assert planes[A].open_streams(B) == {0}
    for late in (False, True):
        op = OP._replace(n=int(late))
        ports = {own: planes[own].open(op, {A, B}, time.monotonic() + 0.02) for own in (A, B)}
        ports[A].send(B, 0, memoryview(bytes(1000)))
        with pytest.raises(DeadlineExceeded):
            ports[B].wait(ports[B].expect(A, 0, memoryview(bytearray(1000))))
        for own, port in ports.items():
            planes[own].close_port(port, late=late)
        if not late:
            assert planes[A].open_streams(B) == {0}
    wait_until(lambda: planes[A].open_streams(B) == set(), 10, "the stream to end")
    for plane in planes.values():
        plane.close()
    for sock in far.values():
        sock.close()


def test_tcp_streams_find_out_that_their_path_is_dead():
    with socket.socket() as sock:
        prepare(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15


# --- the end of a member ---


def test_a_member_has_finished_when_as_much_has_come_as_it_says_it_sent_whatever_overtakes_what():
    exchange = DataPlane(A)
    exchange.link(B)
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    sent, unsent = (port.expect(B, slot, memoryview(bytearray(1))) for slot in (0, 1))
    piece = Piece(0, 0, 1, 1)
    where = exchange.place(B, port.key, piece)
    exchange.finished(B, 2)  # by another stream
    assert not exchange.has_finished(B) and not unsent.done()
    where.part(0, 1)[:] = b"x"
    exchange.arrived(B, port.key, piece, where)
    exchange.forget(OP._replace(n=1))
    assert not exchange.has_finished(B)
    assert exchange.place(B, operation_key(OP._replace(n=1)), piece) is None  # nobody wants it, and it counts
    assert exchange.has_finished(B)
    port.wait(sent)
    with pytest.raises(Aborted, match="member b has ended"):
        port.wait(unsent)
    port.send(B, 0, memoryview(b"x"))  # B does not want it: that is no error of ours
    with pytest.raises(Aborted, match="member b has ended"):
        port.check(B)


def test_an_operation_that_starts_after_a_member_has_finished_gets_what_that_sent_and_waits_for_nothing_else():
    exchange = DataPlane(A)
    exchange.link(B)
    piece = Piece(0, 0, 1, 1)
    where = exchange.place(B, operation_key(OP), piece)
    where.part(0, 1)[:] = b"x"
    exchange.arrived(B, operation_key(OP), piece, where)
    exchange.finished(B, 1)
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    early, never = bytearray(1), port.expect(B, 1, memoryview(bytearray(1)))
    port.wait(port.expect(B, 0, memoryview(early)))
    assert early == b"x"
    with pytest.raises(Aborted, match="member b has ended"):
        port.wait(never)


def test_one_that_ends_waits_until_all_others_have_what_it_sent_or_are_lost_or_time_is_up():
    exchange = DataPlane(A)
    for member in (B, C):
        exchange.link(member)
    exchange.taken(B)  # before it has said that it ends
    exchange.finish()
    assert exchange.wait_taken(time.monotonic()) == {B, C}
    exchange.taken(B)
    assert exchange.wait_taken(time.monotonic()) == {C}
    waiting = threading.Thread(target=exchange.wait_taken, args=(time.monotonic() + 60,), daemon=True)
    waiting.start()
    exchange.drop(C, "lost")
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_member_one_of_whose_streams_broke_is_not_waited_for_though_not_all_has_come():
    here, there = socket.socketpair()
    exchange = DataPlane(A)
    exchange.link(B)
    add_stream(exchange, B, here)
    there.close()
    wait_until(lambda: not exchange.open_streams(B), 10, "the stream to end")
    exchange.finished(B, 1)
    assert exchange.has_finished(B)
    exchange.close()


def test_what_a_member_sent_that_ended_and_left_is_taken_later_and_one_that_did_not_end_is_lost():
    exchange = DataPlane(A)
    for member in (B, C):
        exchange.link(member)
    exchange.outlive_views()
    piece = Piece(0, 0, 1, 1)
    where = exchange.place(B, operation_key(OP), piece)
    where.part(0, 1)[:] = b"x"
    exchange.arrived(B, operation_key(OP), piece, where)
    exchange.finished(B, 1)
    under_way = exchange.open(OP._replace(n=1), {A, B, C}, time.monotonic() + 60)
    ticket = under_way.expect(C, 0, memoryview(bytearray(1)))
    exchange.drop(B, "left")
    exchange.begin_view()
    assert exchange.has_finished(B) and not exchange.lost({A, B, C}) and not ticket.done()
    port = exchange.open(OP, {A, B}, time.monotonic() + 60)
    port.wait(port.expect(B, 0, memoryview(early := bytearray(1))))
    assert early == b"x"
    with pytest.raises(Aborted, match="member b has ended"):
        port.wait(port.expect(B, 1, memoryview(bytearray(1))))
    port.send(B, 0, memoryview(b"x"))
    with pytest.raises(Aborted, match="member b has ended"):
        port.flush()
    exchange.drop(C, "it is lost")
    assert exchange.lost({A, B, C}) == {C}
    with pytest.raises(Aborted, match="it is lost"):
        under_way.wait(ticket)


def test_what_is_on_the_other_streams_of_a_member_still_comes_where_one_has_broken():
    exchange, ends = DataPlane(A), [socket.socketpair() for _ in range(3)]
    exchange.link(B)
    for number, (here, _) in enumerate(ends):
        add_stream(exchange, B, here, number)
    broken, early, late = (there for _, there in ends)
    sealers = {sock: Sealer(bytes(KEY_BYTES)) for sock in (early, late)}

    def say(sock, kind, piece, payload=b""):
        sealer, key = sealers[sock], operation_key(OP)
        sock.sendall(sealer.seal(header(key, kind, piece)) + (sealer.seal(payload) if payload else b""))

    broken.close()  # with two pieces on it
    wait_until(lambda: len(exchange.open_streams(B)) == 2, 10, "the stream to end")
    port = exchange.open(OP, {A, B}, time.monotonic() + 10)
    asked = port.expect(B, 1, memoryview(bytearray(1)))
    say(early, PieceKind.FIN, Piece(0, 0, 3, 0))
    say(early, PieceKind.REFUSAL, Piece(1, 0, 1, 1), b"x")
    with pytest.raises(Aborted, match="does not have"):  # the refusal is here, and the FIN before it
        port.wait(asked)
    assert not exchange.has_finished(B)
    say(late, PieceKind.DATA, Piece(0, 0, 1, 1), b"y")
    port.wait(port.expect(B, 0, memoryview(got := bytearray(1))))
    assert got == b"y" and not exchange.has_finished(B)
    say(late, PieceKind.FIN, Piece(0, 0, 3, 0))
    wait_until(lambda: exchange.has_finished(B), 10, "the end")
    exchange.close()
    for sock in (early, late):
        sock.close()


def test_one_fin_that_overtakes_another_takes_back_no_piece():
    exchange = DataPlane(A)
    exchange.link(B)
    exchange.finished(B, 2)
    exchange.finished(B, 1)
    exchange.place(B, operation_key(OP), Piece(0, 0, 1, 1))
    exchange.forget(OP)
    for finished in (False, True):
        assert exchange.place(B, operation_key(OP), Piece(0, 0, 1, 1)) is None
        assert exchange.has_finished(B) == finished


@pytest.mark.parametrize("streams", [1, 3])
def test_two_members_whose_fins_were_lost_with_their_streams_say_them_again_on_those_that_come_next(streams):
    planes, lost = {A: DataPlane(A), B: DataPlane(B)}, []
    for own, other in ((A, B), (B, A)):
        planes[own].link(other)
        for number in range(streams):
            here, there = socket.socketpair()  # nobody carries what is sent
            add_stream(planes[own], other, here, number)
            there.settimeout(10)
            lost.append(there)
        planes[own].finish()
    for sock in lost:
        _, kind, piece = read_header(Opener(bytes(KEY_BYTES)).open(sock.recv(1000)))
        assert (kind, piece) == (PieceKind.FIN, Piece(0, 0, 0, 0))
        sock.close()
    for own, other in ((A, B), (B, A)):
        wait_until(lambda o=own, m=other: not planes[o].open_streams(m), 10, "the streams to end")
    assert not planes[A].has_finished(B) and not planes[B].has_finished(A)
    for (own, other), sock in zip(((A, B), (B, A)), socket.socketpair(), strict=True):
        add_stream(planes[own], other, sock, dialled=own == A)
    for plane in planes.values():
        assert plane.wait_taken(time.monotonic() + 10) == set()
    for plane in planes.values():
        plane.close()


def test_a_member_that_has_finished_is_told_on_each_later_stream_too_that_nothing_is_missing():
    exchange = DataPlane(A)
    exchange.link(B)
    exchange.finished(B, 0)
    for number in range(2):
        here, there = socket.socketpair()
        there.settimeout(10)
        add_stream(exchange, B, here, number)
        _, kind, _ = read_header(Opener(bytes(KEY_BYTES)).open(there.recv(HEADER_BYTES + TAG_BYTES)))
        assert kind is PieceKind.TAKEN
        there.close()
    exchange.close()


def test_a_fin_says_how_many_pieces_of_data_were_taken_before_it_and_goes_to_links_that_come_later():
    class Sent:
        key = operation_key(OP)

        def __init__(self, wanted=True):
            self.wanted = wanted

        def left(self):
            pass

    queue = SendQueue()
    piece, none = Piece(0, 0, 1, 1), memoryview(b"")
    for sender, kind in (
        (Sent(), PieceKind.DATA),
        (Sent(wanted=False), PieceKind.DATA),
        (Sent(), PieceKind.REFUSAL),
        (Sent(), PieceKind.DATA),
    ):
        queue.put([Outgoing(sender, kind, piece, none)])
    queue.finish(Outgoing(Sent(), PieceKind.FIN, piece, none))
    taken = [queue.take(lambda: False) for _ in range(4)]
    assert [item.kind for item in taken] == [PieceKind.DATA, PieceKind.REFUSAL, PieceKind.DATA, PieceKind.FIN]
    assert taken[-1].piece == Piece(0, 0, 2, 0)
    queue.put([Outgoing(Sent(), PieceKind.DATA, piece, none)])
    assert queue.take(lambda: False, has_fin=True).kind is PieceKind.DATA
    assert queue.take(lambda: False).piece == Piece(0, 0, 3, 0)  # another reader's

    planes = {A: DataPlane(A), B: DataPlane(B)}
    planes[A].finish()
    for (own, other), sock in zip(((A, B), (B, A)), socket.socketpair(), strict=True):
        planes[own].link(other)
        add_stream(planes[own], other, sock, dialled=own == A)
    wait_until(lambda: planes[B].has_finished(A), 10, "the FIN")
    for plane in planes.values():
        plane.close()


def data(op):
    """A piece of data of an operation, on its way out."""
    sender = types.SimpleNamespace(key=operation_key(op), wanted=True, left=lambda: None)
    return Outgoing(sender, PieceKind.DATA, Piece(0, 0, 1, 1), memoryview(b"x"))


def takes(queue, count):
    """Take so many items; return the kind and the operation's key of each."""
    taken = [queue.take(lambda: False) for _ in range(count)]
    return [(item.kind, item.sender.key) for item in taken]


def test_what_has_no_room_waits_and_goes_when_there_is_room_or_its_operation_has_started(monkeypatch):
    monkeypatch.setattr("collectives.mesh.stream.MAX_HELD_PIECES", 2)
    ops = [OP._replace(n=n) for n in range(5)]
    keys = [operation_key(op) for op in ops]
    queue = SendQueue()
    queue.put([data(op) for op in ops])
    sent, held = PieceKind.DATA, (PieceKind.HELD, bytes(16))
    assert takes(queue, 3) == [(sent, keys[0]), (sent, keys[1]), held]
    queue.grant(keys[4])
    assert takes(queue, 1) == [(sent, keys[4])]
    queue.credit(2, 2)  # one of which the granted piece has used
    assert takes(queue, 2) == [(sent, keys[2]), held]
    queue.forget(keys[3])  # it is over here
    queue.put([data(ops[3]), data(ops[4])])
    assert takes(queue, 1) == [(sent, keys[4])]
    queue.grant(bytes(16))
    assert takes(queue, 1) == [(sent, keys[3])]


@pytest.fixture
def planes():
    """Two members with a stream between them."""
    planes = {A: DataPlane(A), B: DataPlane(B)}
    for (own, other), sock in zip(((A, B), (B, A)), socket.socketpair(), strict=True):
        planes[own].link(other)
        add_stream(planes[own], other, sock, dialled=own == A)
    yield planes
    for plane in planes.values():
        plane.close()


def test_members_that_hold_back_what_the_other_will_never_take_come_to_their_end(planes):
    ports = []
    for own, other in ((A, B), (B, A)):
        for n in range(MAX_HELD_PIECES + 100):
            port = planes[own].open(OP._replace(tag=ord(own), n=n), {A, B}, time.monotonic() + 60)
            port.send(other, 0, memoryview(b"x"))
            ports.append(port)
    for own in (A, B):
        planes[own].finish()
    for own in (A, B):
        assert planes[own].wait_taken(time.monotonic() + 20) == set()
    for port in ports:
        port.flush()
