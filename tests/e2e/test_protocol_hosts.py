"""Hosts on real sockets: they meet, share, restart, and tell a person what is wrong."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from node.telemetry.logs import setup_logs
from protocol.credentials.records import Address, Endpoint, make_record
from protocol.driver import Driver
from protocol.errors import BadAddress, NetworkFailed, OutboxFull, PortInUse
from protocol.host import Host, ItemVerdict
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.membership.links import DIAL_TIMEOUT_S
from protocol.transport.addresses import check_bindable
from protocol.transport.zeromq import REVIEW_INTERVAL_S
from protocol.wire.envelope import HEADER_BYTES, Kind
from protocol.wire.messages import Hello
from tests.log_places import hanging_log, own_logs
from tests.protocol_hosts import SWARM, ask, collect, mesh, running, spawn, written
from tests.protocol_raw import raw_peer
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def test_two_hosts_exchange_items_of_every_size() -> None:
    with mesh(2) as (one, two):
        bodies = [b"", b"x", os.urandom(10_000), os.urandom(100_000), os.urandom(1 << 20)]
        ids = [one.publish(body) for body in bodies]
        items = collect(two, len(bodies))
        assert {(item.id, item.body) for item in items} == set(zip(ids, bodies, strict=True))
        assert len({item.sender for item in items}) == 1
        assert all(abs(item.time - time.time()) < 30 for item in items)
        assert one.receive(10) == []
        assert one.counters().items_sent == two.counters().items_received == len(bodies)
        assert two.counters().bytes_received > sum(map(len, bodies))
        assert two.counters().rejected == {}


def test_four_hosts_from_one_seed_all_get_everything_once() -> None:
    with mesh(4) as hosts:
        sent = {host.publish(os.urandom(size)) for host in hosts for size in (1000, 50_000, 150_000)}
        for host in hosts:
            got = [item.id for item in collect(host, 9)]
            assert len(got) == len(set(got)) == 9 and set(got) < sent
            assert host.counters().rejected == {}


@pytest.mark.real
def test_a_host_without_a_listening_port_gives_and_gets() -> None:
    with running() as (hub, address), running(address) as (other, _), running(address, listen=None) as (hidden, none):
        assert none is None
        wait_until(lambda: [h.counters().peers for h in (hub, other, hidden)] == [2, 2, 2], 20, "the mesh")
        wait_until(lambda: [h.counters().dialable for h in (hub, other, hidden)] == [2, 2, 2], 20, "those that listen")
        hidden.publish(b"from behind the wall")
        hub.publish(b"to everybody")
        assert {item.body for item in collect(other, 2)} == {b"from behind the wall", b"to everybody"}
        assert collect(hidden, 1)[0].body == b"to everybody"


def test_a_host_that_leaves_waits_until_others_have_what_it_published_and_says_what_nobody_took() -> None:
    with running() as (hub, address), running(address) as (other, _):
        wait_until(lambda: hub.counters().peers == 1, 20, "the link")
        other.subscribe(frozenset([b"a topic!"]), math.inf)
        bodies = {os.urandom(size) for size in (100, 10_000, 300_000)}
        with running(address, listen=None) as (brief, _):
            wait_until(lambda: brief.counters().peers > 0, 20, "a peer")
            for body in bodies:
                brief.publish(body)
            assert brief.hand_over(60.0) == 0
        assert {item.body for item in collect(hub, len(bodies))} == bodies
        for host in (hub, other):
            host.subscribe(frozenset(), math.inf)
        with running(address, listen=None) as (brief, _):
            wait_until(lambda: brief.counters().peers > 0, 20, "a peer")
            brief.publish(b"of no topic that anybody wants", b"no topic")
            assert brief.hand_over(600.0) == 1, "nobody will ask for it, so it does not wait"
    with running() as (alone, _):
        alone.publish(b"heard by nobody")
        assert alone.hand_over(600.0) == 1


def test_a_host_that_takes_less_than_is_on_offer_rests_from_one_review_of_its_connections_to_the_next(
    monkeypatch,
) -> None:
    rests: list[float] = []
    with running() as (host, _):
        wait = host._stopping.wait
        monkeypatch.setattr(host._stopping, "wait", lambda seconds: rests.append(seconds) or wait(seconds))
        host.subscribe(None, math.inf)
        host.publish(b"what wakes the network thread up")
        wait_until(lambda: not len(host._commands), 20, "the commands to be taken")
        assert not rests
        host.subscribe(None, 0.0)
        wait_until(lambda: len(rests) > 1, 20, "the network thread to rest")
    assert all(0 <= seconds <= REVIEW_INTERVAL_S for seconds in rests)
    assert max(rests) > REVIEW_INTERVAL_S / 2


def test_who_waits_for_an_item_is_woken_when_one_comes() -> None:
    with mesh(2) as (one, two):
        for number in range(20):
            one.publish(b"question %d" % number)
            (question,) = two.receive(10, timeout=20)
            two.publish(b"answer to " + question.body)
            (answer,) = one.receive(10, timeout=20)
            assert answer.body == b"answer to question %d" % number


def test_another_swarm_is_not_joined() -> None:
    with running() as (host, address), running(address, swarm=b"another swarm id") as (stranger, _):
        wait_until(lambda: host.counters().rejected.get("wrong_swarm"), 20, "the stranger's hello")
        host.publish(b"ours")
        stranger.publish(b"theirs")
        with running(address) as (friend, _):
            assert collect(friend, 1)[0].body == b"ours"
            assert (host.counters().peers, stranger.counters().peers) == (1, 0)
        assert stranger.receive(10) == host.receive(10) == []


def test_verdicts_are_counted_by_reason() -> None:
    with mesh(2) as (one, two):
        for verdict, reason in (
            (ItemVerdict.ACCEPT, ""),
            (ItemVerdict.IGNORE, "unknown_task"),
            (ItemVerdict.REJECT, "lie"),
        ):
            one.publish(reason.encode())
            (item,) = collect(two, 1)
            two.judge(item.id, verdict, reason)
        wait_until(lambda: two.counters().rejected == {"unknown_task": 1, "lie": 1}, 20)


def test_a_refused_peer_that_dials_again_is_counted_as_that_and_not_as_one_that_talks_nonsense() -> None:
    with running() as (one, address), running(address) as (two, _):
        wait_until(lambda: two.counters().peers == 1, 20)
        assert one._core is not None and one._driver is not None
        for _ in range(6):
            one._core.scores.offence("forged", two._setup.identity.node_id, one._driver.now())
        two.publish(b"heard no more")
        wait_until(lambda: one.counters().rejected.get("graylisted", 0) >= 4, 60, "its dialling")
        assert set(one.counters().rejected) == {"forged", "graylisted"} and one.receive(10) == []


def test_an_inbox_that_nobody_empties_is_bounded_and_counts_what_it_drops() -> None:
    with running() as (one, address), running(address, limits=Limits(inbox_items=5)) as (two, _):
        wait_until(lambda: one.counters().peers == two.counters().peers == 1, 20)
        for number in range(12):
            one.publish(b"%d" % number)
            wait_until(lambda: two.counters().items_received == number + 1, 20)  # noqa: B023
        wait_until(lambda: two.counters().rejected.get("inbox_full") == 7, 20)
        assert [item.body for item in two.receive(100)] == [b"7", b"8", b"9", b"10", b"11"]


def given_while_nobody_reads(one: Host, two: Host) -> list[bytes]:
    """Publish twelve items of 300 kB; return them once `two` has received all."""
    wait_until(lambda: two.counters().peers == 1, 20)
    bodies = [os.urandom(300_000) for _ in range(12)]
    for body in bodies:
        one.publish(body)
    wait_until(lambda: two.counters().items_received == 12, 40, "all to come while nobody reads")
    return bodies


def test_what_the_inbox_has_no_room_for_is_taken_from_the_store_as_the_node_reads() -> None:
    limits = Limits(inbox_bytes=1 << 20)
    with running() as (one, address), running(address, limits=limits) as (two, _):
        bodies = given_while_nobody_reads(one, two)
        assert len(two._inbox) == 3
        assert {item.body for item in collect(two, 12)} == set(bodies)
        assert "inbox_full" not in two.counters().rejected and two.counters().items_received == 12


@pytest.mark.slow
def test_what_waited_for_room_and_the_store_let_go_drops_nothing_that_waits_to_be_read() -> None:
    limits = Limits(inbox_bytes=1 << 20, held_bytes=1 << 20)
    with running() as (one, address), running(address, limits=limits) as (two, _):
        given_while_nobody_reads(one, two)
        first = two.receive(1)
        wait_until(lambda: two.counters().rejected.get("inbox_full") == 12 - 3 - 3, 20, "what the store let go")
        assert len({item.id for item in (*first, *collect(two, 5))}) == 6


def test_a_peers_file_is_written_ever_more_seldom_while_the_book_changes_all_the_time(tmp_path, monkeypatch) -> None:
    """Among 1,000 nodes that did nothing each wrote 621 MB a day."""
    writes: list[float] = []
    monkeypatch.setattr("protocol.host.save_peers", lambda path, records: writes.append(time.monotonic()))
    monkeypatch.setattr("protocol.host.FIRST_SAVE_S", 0.1)
    with running(peers_file=tmp_path / "peers.json") as (host, _):

        def five_times() -> bool:
            host._core.membership.book.revision += 1
            host._transport.wake()
            return len(writes) >= 5

        wait_until(five_times, 60, "the file to be written")
    assert all(later - earlier > 0.05 * 2**at for at, (earlier, later) in enumerate(pairwise(writes[:5])))


def test_who_publishes_more_than_there_is_room_for_waits_and_nothing_is_lost() -> None:
    """Of 10,000 items that were published at once, 4,352 arrived, and nobody was told."""
    with running() as (one, address), running(address, limits=Limits(inbox_items=20)) as (two, _):
        wait_until(lambda: one.counters().peers == two.counters().peers == 1, 20, "the pair")
        bodies = {b"%d" % number for number in range(300)}
        for body in bodies:
            two.publish(body)
        assert {item.body for item in collect(one, 300)} == bodies


def test_who_publishes_while_the_network_thread_takes_nothing_is_told_that_there_is_no_room(monkeypatch) -> None:
    looks = threading.Event()
    feed = Driver.feed

    def slow(driver: Driver, event) -> None:
        looks.wait(60)
        feed(driver, event)

    with running(limits=Limits(inbox_items=5)) as (host, _):
        monkeypatch.setattr(Driver, "feed", slow)
        published = 0
        with pytest.raises(OutboxFull, match="5 items wait"):
            while published < 100:
                host.publish(b"%d" % published, timeout=0.01)
                published += 1
        assert published < 20
        looks.set()
        host.publish(b"later")


def test_a_wish_is_not_pushed_out_by_what_a_node_publishes_before_the_network_thread_looks(monkeypatch) -> None:
    topic, other = b"a topic!", b"another!"
    looks = threading.Event()
    feed = Driver.feed

    def slow(driver: Driver, event) -> None:
        looks.wait(20)
        feed(driver, event)

    monkeypatch.setattr(Driver, "feed", slow)
    with running() as (one, address), running(address, limits=Limits(inbox_items=5)) as (two, _):
        wait_until(lambda: one.counters().peers == two.counters().peers == 1, 20, "the pair")
        two.subscribe(frozenset([topic]), float("inf"))
        for number in range(5):
            two.publish(b"%d" % number)
        looks.set()
        (peer,) = one._core.gossip._peers.values()
        wait_until(lambda: not peer.wants.covers(other), 20, "what two wants to reach one")
        one.publish(b"unwanted", other)
        one.publish(b"wanted", topic)
        assert [item.body for item in collect(two, 1)] == [b"wanted"]


def test_a_port_in_use_and_a_bad_address_are_told_apart() -> None:
    with running() as (_, address), pytest.raises(PortInUse, match="choose another port"):
        Host(Identity.generate(), SWARM, str(address.endpoint), []).start()
    bad = {"tcp://203.0.113.7:0": "listen on tcp://0.0.0.0:0, and", "tcp://no-such-host.invalid:0": "no such host"}
    for listen, says in (bad | {"127.0.0.1:0": "", "tcp://127.0.0.1": ""}).items():
        with pytest.raises(BadAddress, match=says):
            Host(Identity.generate(), SWARM, listen, []).start()


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://*:0", "tcp://0.0.0.0:0"])
def test_that_a_port_is_in_use_is_told_without_a_host(listen: str) -> None:
    with running(listen=listen) as (_, address):
        same = Endpoint(Endpoint.parse(listen, bind=True).host, address.endpoint.port)
        with pytest.raises(PortInUse, match=f"{same.port} is in use: choose another port"):
            check_bindable(same)
    check_bindable(same)
    with pytest.raises(BadAddress, match="no address of this machine"):
        check_bindable(Endpoint("203.0.113.7", 0))


def test_a_wildcard_host_is_advertised_as_something_that_can_be_dialled() -> None:
    with running(listen="tcp://*:0") as (host, address):
        assert address.endpoint.host not in {"*", "0.0.0.0"}
        with running(address) as (other, _):
            wait_until(lambda: other.counters().peers == host.counters().peers == 1, 20)


def test_a_node_behind_a_forwarded_port_tells_peers_the_outer_one() -> None:
    with running(advertise=["tcp://gossamer.example.org:7700"]) as (_, address):
        assert str(address.endpoint) == "tcp://gossamer.example.org:7700"


def test_a_machine_that_changes_its_address_tells_its_peers(monkeypatch) -> None:
    monkeypatch.setattr("protocol.host.ADDRESS_INTERVAL_S", 0.1)
    with running() as (one, address), running(address) as (two, _):
        wait_until(lambda: one.counters().peers == two.counters().peers == 1, 20, "both to meet")
        monkeypatch.setattr("protocol.host.own_hosts", lambda _: ("moved.example.org",))
        wait_until(lambda: any("moved" in peer.endpoint for peer in two.peers()), 20, "the new address at the other")


def test_hosts_meet_over_ipv6() -> None:
    with running(listen="tcp://[::1]:0") as (host, address), running(address, listen="tcp://[::1]:0") as (other, _):
        assert str(address).startswith("tcp://[::1]:")
        wait_until(lambda: other.counters().peers == host.counters().peers == 1, 20)


@pytest.mark.parametrize(
    ("told", "at"),
    [(("::1", "127.0.0.1"), "::1"), (("255.255.255.255", "127.0.0.1"), "127.0.0.1")],
    ids=["IPv6 first", "what there is a route to"],
)
def test_of_a_nodes_addresses_the_first_is_dialled_to_which_there_is_a_route(monkeypatch, told, at: str) -> None:
    monkeypatch.setattr("protocol.host.own_hosts", lambda host: told if host == "::" else (host,))
    with (
        running() as (_, address),
        running(address, listen="tcp://[::]:0") as (both, first),
        running(address, listen=None) as (other, _),
    ):
        wait_until(lambda: both.counters().peers == other.counters().peers == 2, DIAL_TIMEOUT_S, "them to meet")
        links = other._core.membership.links
        assert [peer.host for peer in links.peers.values() if peer.link.key == first.key] == [at]


def test_stopping_is_prompt_and_may_be_repeated() -> None:
    with running(Address.parse(f"tcp://127.0.0.1:9?key={'ab' * 32}")) as (host, _):
        host.publish(b"to nobody")
        began = time.monotonic()
        host.stop()
        host.stop()
        assert time.monotonic() - began < 5


def test_a_killed_node_comes_back_at_a_new_port_without_a_seed_and_hears_what_it_missed(tmp_path: Path) -> None:
    with running() as (one, address), running(address) as (two, _):
        child, first = spawn(tmp_path, address)
        try:
            ask(one, "before")
            wait_until(lambda: one.counters().peers == two.counters().peers == 2, 20, "the child at both")
            wait_until((tmp_path / "peers.json").exists, 20, "whom it knows, on disk")
            child.send_signal(signal.SIGKILL)
            child.wait()
            wait_until(lambda: one.counters().peers == two.counters().peers == 1, 20, "the child's absence")
            two.publish(b"ask while away")
            child, second = spawn(tmp_path)
            assert second.key == first.key and second.endpoint != first.endpoint
            wait_until(lambda: any(i.body == b"answer while away" for i in two.receive(100)), 40, "what it missed")
            ask(one, "after")
            assert one.counters().rejected == two.counters().rejected == {}
        finally:
            child.kill()
            child.wait()


def test_a_host_whose_network_failed_says_so_instead_of_going_on_in_silence() -> None:
    def broken(timeout: float) -> list:
        raise OSError("no more descriptors")

    with running() as (host, _):
        host.receive(1)
        host._transport.poll = broken

        def failed() -> bool:
            try:
                host.receive(1)
            except NetworkFailed as error:
                return "no more descriptors" in str(error)
            return False

        wait_until(failed, 20, "the host to fail")
        with pytest.raises(NetworkFailed):
            host.publish(b"body")


def test_two_hosts_of_one_identity_are_noticed_by_both_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    # The two take the third's only link for them from each other, and it hears each out as soon as it is there.
    monkeypatch.setattr("protocol.membership.membership.LEAST_HELLO_PAUSE_S", 0.0)
    identity = Identity.generate()
    with capture_logs() as logs, running() as (third, seed), running(seed, identity=identity) as (first, _):
        wait_until(lambda: first.counters().peers == third.counters().peers == 1, 20, "the first")
        assert first.twin == ""
        with running(seed, identity=identity) as (second, _):
            wait_until(lambda: first.twin and second.twin, 60, "both notice")
            wait_until(
                lambda: any("another process runs with this node's key" in log["event"] for log in logs), 20, "the log"
            )
        assert third.twin == ""


def test_a_log_that_hangs_holds_up_no_network_thread(tmp_path: Path) -> None:
    with (
        own_logs(),
        running(watch=written()) as (host, address),
        running(address) as (other, _),
        hanging_log(tmp_path) as place,
    ):
        wait_until(lambda: host.counters().peers == 1, 20, "the peer")
        setup_logs(tmp_path, stderr=False)
        with raw_peer(address, SWARM) as stranger:
            expiry_ms = int((time.time() + 3600) * 1000)
            hello = Hello(make_record(stranger.identity, SWARM, (), 1, "", expiry_ms).encoded).encode()
            ours = stranger.frame(Kind.HELLO, hello)
            stranger.send(ours[:HEADER_BYTES] + b"\x02\x00" + ours[HEADER_BYTES + 2 :])
            assert stranger.receive(20)  # our goodbye: the host saw it, and has logged that or is about to
            other.publish(b"all the same")
            assert collect(host, 1)[0].body == b"all the same"
        assert place.read(1)[0]["event"] == "refused a peer that speaks another version of the protocol"


FORGETFUL = """
import atexit, sys
from pathlib import Path
from protocol.host import Host
from protocol.identity import Identity

host = Host(Identity.generate(), b"a swarm of tests", "tcp://127.0.0.1:0", (), peers_file=Path(sys.argv[1]))
host.start()
atexit.register(host.stop)
"""


def test_a_host_that_is_stopped_as_its_program_ends_keeps_its_peers_and_reports_no_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORGETFUL, str(tmp_path / "peers.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "the network failed" not in ended.stdout + ended.stderr
    assert (tmp_path / "peers.json").exists()
