"""Found, invite, join over real sockets: who gets in, through whom peers meet, and how they find back."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from node.cli.app import run
from node.config import NodeConfig
from node.errors import UserError
from node.operations import swarm_diagnosis
from node.operations.diagnosis import Diagnosis
from node.operations.swarm_diagnosis import examine_swarm
from node.swarm import founding, inviting, joining, revoking, swarm_folder
from node.swarm.peering import Network, agent, open_network
from node.swarm.swarm_folder import load_grant, load_manifest
from node.telemetry.status_server import ask
from protocol.credentials.grants import make_pass
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address, Endpoint
from protocol.errors import JoinError
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope
from protocol.transport.zeromq import ZmqTransport
from tests import commands
from tests.swarms import events_of, gossamer, small_config
from tests.waiting import wait_until

NOWHERE = ""  # a node that nobody can dial
LOOPBACK = "tcp://127.0.0.1:0"
DAY = 86400.0
START_S = 100  # for which a process may start: near the limit of a test, as only the machine's load decides it
GONE = Address.parse(f"tcp://127.0.0.1:1?key={'ab' * 32}")  # nobody listens there


def config(listen: str = NOWHERE) -> NodeConfig:
    return small_config(1, network={"listen": listen}, tasks=[{"name": "builtin/sums"}])


@contextmanager
def relay(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A relay in a process of its own; it is asked to stop at the end of the block."""
    process = gossamer("node", "--state", folder, "--set", "role=relay")
    try:
        wait_until(lambda: (folder / "observe.json").exists() or process.poll() is not None, START_S)
        assert process.poll() is None, process.communicate()[1]
        yield process
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode in (0, -9), errors


def found(folder: Path, policy: JoinPolicy = JoinPolicy.OPEN, *, allowed: tuple[Identity, ...] = ()) -> Path:
    founding.found(config(LOOPBACK), folder, "club", policy, [identity.node_id for identity in allowed])
    return folder


def key_of(folder: Path) -> Identity:
    folder.mkdir(exist_ok=True)
    return Identity.load_or_generate(folder / "identity.key")


def join(folder: Path, invite: Invite, listen: str = NOWHERE) -> NodeConfig:
    return joining.join(Invite.parse(str(invite)), config(listen).model_copy(update={"role": "relay"}), folder)


def received(network: Network, body: bytes) -> Callable[[], bool]:
    return lambda: any(item.body == body for item in network.host.receive(100))


@pytest.mark.slow
def test_an_allowlist_admits_the_listed_the_invited_and_nobody_else(tmp_path: Path) -> None:
    listed = key_of(tmp_path / "listed")
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST, allowed=(listed,))
    guest = key_of(tmp_path / "guest")
    with relay(club):
        plain = inviting.make_invite(club, [])

        def refused(name: str, invite: Invite, says: str) -> None:
            with pytest.raises(JoinError, match=says) as caught:
                join(tmp_path / name, invite)
            assert key_of(tmp_path / name).node_id in str(caught.value)
            assert load_manifest(tmp_path / name) is None

        refused("stranger", plain, "does not admit")
        assert join(tmp_path / "listed", plain).network.seeds == [str(plain.seeds[0])]

        own_pass = inviting.make_invite(club, [], inviting.pass_for(club, guest.node_id, DAY))
        refused("stranger", own_pass, "does not admit")
        refused("guest", inviting.make_invite(club, [], inviting.pass_for(club, guest.node_id, -1.0)), "has expired")
        forged = make_pass(guest, plain.swarm, guest.node_id, int((time.time() + DAY) * 1000))
        refused("guest", inviting.make_invite(club, [], forged), "does not admit")
        join(tmp_path / "guest", own_pass)
        longer = inviting.pass_for(club, guest.node_id, 2 * DAY)
        join(tmp_path / "guest", inviting.make_invite(club, [], longer))
        assert load_grant(tmp_path / "guest") == longer.encode()

        two = inviting.make_invite(club, [], inviting.shared_invite(club, 2, DAY))
        join(tmp_path / "first", two)
        join(tmp_path / "second", two)
        refused("third", two, "used up")
        refused("third", inviting.make_invite(club, [], inviting.shared_invite(club, 2, -1.0)), "has expired")
        first = load_grant(tmp_path / "first")
        join(tmp_path / "first", two)
        assert load_grant(tmp_path / "first") == first  # again, without another use

        # What got in shares what is published, and the one who was refused cannot speak at all.
        with ExitStack() as stack:
            networks = [
                stack.enter_context(
                    open_network(join(tmp_path / name, two if name == "first" else own_pass), tmp_path / name)
                )
                for name in ("first", "guest")
            ]
            wait_until(lambda: all(network.host.counters().peers for network in networks), 20)
            networks[0].host.publish(b"from the first")
            wait_until(received(networks[1], b"from the first"), 20)
        state = ask(club)
        assert state["rejected"]["not_admitted"] >= 2
        assert state["rejected"]["invite_used"] == 1
        assert state["rejected"]["invite_expired"] >= 2
        expected = {
            (key_of(tmp_path / "stranger").node_id, "not_admitted"),
            (key_of(tmp_path / "third").node_id, "invite_used"),
        }

        def told() -> set[tuple[str, str]]:
            return {(entry["node"], entry["reason"]) for entry in events_of(club, "a node was not admitted")}

        wait_until(lambda: expected <= told(), 20, "the log to name them")


@pytest.mark.slow
def test_a_join_that_one_member_refuses_is_granted_by_another(tmp_path: Path) -> None:
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST)
    apart = tmp_path / "apart"  # another member, which never met the first and so does not know what it granted
    key_of(apart)
    (apart / "manifest.bin").write_bytes((club / "manifest.bin").read_bytes())
    with relay(club), relay(apart):
        seeds = [Address.parse((folder / "address").read_text()) for folder in (club, apart)]
        right = inviting.shared_invite(club, 1, DAY)
        join(tmp_path / "first", inviting.make_invite(club, seeds[:1], right))
        alone = inviting.make_invite(club, seeds[:1], right)
        with pytest.raises(JoinError, match=rf"used up.*{seeds[0].endpoint} says invite_used"):
            join(tmp_path / "second", Invite(alone.name, alone.manifest, alone.seeds[:1], alone.grant))
        join(tmp_path / "second", inviting.make_invite(club, seeds, right))


@pytest.mark.slow
def test_what_the_owner_takes_back_or_hands_over_reaches_every_node_and_their_disks(tmp_path: Path) -> None:
    """Also the recipes of docs/swarms.md: revoke, hand over, and an owner that has nothing left but its key."""
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST)
    with ExitStack() as stack:
        stack.enter_context(relay(club))
        shared = inviting.make_invite(club, [], inviting.shared_invite(club, 50, DAY))

        def member(name: str, invite: Invite) -> Network:
            settled = join(tmp_path / name, invite, LOOPBACK)
            return stack.enter_context(open_network(settled, tmp_path / name))

        friend, foe = member("friend", shared), member("foe", shared)
        wait_until(
            lambda: friend.host.counters().peers == foe.host.counters().peers == 2, 20, "three that know each other"
        )
        revoking.revoke(club, [foe.identity.node_id])
        wait_until(
            lambda: [peer.node_id for peer in friend.host.peers()] == [key_of(club).node_id], 20, "the foe to go"
        )
        wait_until(lambda: foe.host.refusal == "revoked", 60, "the foe to be told why")
        wait_until((tmp_path / "friend" / "revocations.bin").exists, 20, "the list on the friend's disk")
        with pytest.raises(JoinError, match="was revoked"):
            join(tmp_path / "foe", inviting.make_invite(club, [], inviting.pass_for(club, foe.identity.node_id, DAY)))

        revoking.hand_over(club, friend.identity.public_key)
        owned = swarm_folder.load_gate(tmp_path / "friend", load_manifest(club)).owners  # type: ignore[arg-type]
        assert len(owned) == 1
        wait_until(
            lambda: len(swarm_folder.load_gate(tmp_path / "friend", load_manifest(club)).owners) == 2,  # type: ignore[arg-type]
            30,
            "the next owner to hear of it",
        )
        with pytest.raises(UserError, match="can sign this"):
            inviting.shared_invite(club, 1, DAY)
        revoking.revoke(tmp_path / "friend", [foe.identity.node_id])
        member("guest", inviting.make_invite(club, [], inviting.shared_invite(tmp_path / "friend", 1, DAY)))

        (tmp_path / "restored").mkdir()
        key_of(tmp_path / "friend").save(tmp_path / "restored" / "identity.key")
        join(tmp_path / "restored", inviting.make_invite(tmp_path / "guest", []))
        assert revoking.revoke(tmp_path / "restored", []).revoked == {foe.identity.node_id}


def test_a_relay_alone_bridges_two_nodes_that_nobody_can_dial(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    with relay(club), ExitStack() as stack:
        invite = inviting.make_invite(club, [])
        assert inviting.reach(invite) is Scope.LOOPBACK
        with pytest.raises(UserError, match="another node is running"):
            join(club, invite)  # two hosts with one key would push each other out
        left, right = (
            stack.enter_context(open_network(join(tmp_path / name, invite), tmp_path / name)) for name in "lr"
        )
        wait_until(lambda: left.host.counters().peers and right.host.counters().peers, 20)
        small, large = b"small" * 100, random.Random(1).randbytes(300_000)
        left.host.publish(small)
        wait_until(received(right, small), 20)
        right.host.publish(large)
        wait_until(received(left, large), 20)
        wait_until(lambda: [peer.node_id for peer in left.host.peers()] == [key_of(club).node_id], 20)
        wait_until(lambda: ask(club)["counters"]["items_received"] == 2, 20)
        state = ask(club)
    assert (state["rounds"], state["counters"]["live_peers"]) == (None, 2)
    row = json.loads((club / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["swarm/items_received"] == 2
    assert "round" not in row


@pytest.mark.slow
def test_a_node_comes_back_through_its_peers_when_its_seed_is_gone(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    with ExitStack() as stack:
        with relay(club) as process:
            invite = inviting.make_invite(club, [])
            friend = stack.enter_context(open_network(join(tmp_path / "friend", invite, LOOPBACK), tmp_path / "friend"))
            # Nobody can dial it, so it is the one that has to remember.
            settled = join(tmp_path / "own", invite)
            with open_network(settled, tmp_path / "own") as own:
                wait_until(lambda: own.host.counters().peers == friend.host.counters().peers == 2, 20)
            process.kill()
        assert settled.network.seeds == [str(invite.seeds[0])]
        again = stack.enter_context(open_network(join(tmp_path / "own", invite), tmp_path / "own"))
        wait_until(lambda: again.host.counters().peers == 1, 20)
        again.host.publish(b"back again")
        wait_until(received(friend, b"back again"), 20)


def test_a_node_started_again_listens_where_its_invites_say(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    addresses = []
    for _ in range(2):
        with open_network(config(LOOPBACK), club) as network:
            addresses.append(network.address)
    assert addresses[0] == addresses[1]
    founding.found(config(LOOPBACK), tmp_path / "other", "other", JoinPolicy.OPEN, [])
    (tmp_path / "other" / "address").write_text(str(addresses[0]))
    with open_network(config(LOOPBACK), club), open_network(config(LOOPBACK), tmp_path / "other") as other:
        assert other.address != addresses[0]


def looked(invite: Invite) -> dict[str, Diagnosis]:
    """What is found of a swarm from outside, by name, or by its endpoint for a seed."""
    checks = examine_swarm(invite, quiet=0.5)
    return {check.text.split()[0].rstrip(":") if check.name == "seed" else check.name: check for check in checks}


def test_a_stranger_looks_at_a_swarm_and_sees_its_seeds_its_nodes_and_what_they_run(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    with open_network(config(LOOPBACK), club):
        invite = inviting.make_invite(club, [])
        with open_network(join(tmp_path / "hidden", invite), tmp_path / "hidden") as hidden:
            wait_until(lambda: hidden.host.counters().peers, 20)
            looked(invite)  # who only looked is not counted
            checks = looked(invite)
            assert hidden.host.counters().items_received == 0
        (seed,) = (str(seed.endpoint).removeprefix("tcp://") for seed in invite.seeds)
    assert {name for name, check in checks.items() if not check.ok} == {"dialable"}
    assert "answers after" in checks[seed].text
    assert checks["manifest"].text.startswith("the invite's: one task, open, founded on 20")
    assert checks["stranger"].text.startswith("gets in after ")
    assert checks["nodes"].text == "2 known by their records of the last day, 1 answers this stranger"
    assert checks["dialable"].text == "1 can be dialled" and not checks["dialable"].needed
    assert checks["versions"].text == f"{agent()} at 2; this is {agent()}"


def test_a_stranger_is_kept_out_by_an_allowlist_and_an_invite_is_looked_at_without_spending_a_use(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST)
    with open_network(config(LOOPBACK), club):
        once = inviting.make_invite(club, [], inviting.shared_invite(club, 1, 30 * DAY))
        assert run(["doctor", "--swarm", str(once)], debug=False) == 0
        said = capfd.readouterr().out
        assert "answers after" in said and "so no use is spent" in said and "is kept out, as an allowlist" in said
        join(tmp_path / "first", once)
        late = inviting.make_invite(club, [], inviting.shared_invite(club, 1, -1.0))
        assert not looked(late)["invite"].ok and looked(late)["invite"].needed
        soon = inviting.make_invite(club, [], inviting.shared_invite(club, 1, DAY))
        assert not looked(soon)["invite"].ok and not looked(soon)["invite"].needed
    assert run(["doctor", "--swarm", str(once), "--model", "builtin"], debug=False) == 2
    assert "leave out --model" in capfd.readouterr().err


@pytest.mark.slow
def test_a_seed_that_is_gone_is_to_be_mended_though_others_answer(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    with open_network(config(LOOPBACK), club):
        invite = inviting.make_invite(club, [])
        checks = looked(replace(invite, seeds=(*invite.seeds, GONE)))
    assert {name for name, check in checks.items() if not check.ok and check.needed} == {"127.0.0.1:1"}
    assert "does not answer within 10 s" in checks["127.0.0.1:1"].text
    assert checks["stranger"].ok


def test_a_swarm_of_which_no_seed_answers_makes_doctor_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swarm_diagnosis, "examine_swarm", partial(examine_swarm, patience=0.5))
    club = found(tmp_path / "club")
    invite = inviting.make_invite(club, [GONE])
    assert run(["doctor", "--swarm", str(invite), "--json"], debug=False) == 1
    told = json.loads(capfd.readouterr().out)
    ((title, (seed,)),) = told["checks"].items()
    assert (title, told["ok"], seed["ok"]) == ("The swarm club, from outside", False, False)
    assert "start it again on its folder" in seed["do"]


def test_a_manifest_from_a_false_seed_and_a_seed_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    club, other = found(tmp_path / "club"), found(tmp_path / "other")
    monkeypatch.setattr(joining, "FETCH_TIMEOUT_S", 1.0)
    with relay(other):
        address = Address.parse((other / "address").read_text())
        manifest = load_manifest(club)
        assert manifest is not None
        with pytest.raises(JoinError, match=r"within 1 s .*: see that the invite is whole, or ask"):
            join(tmp_path / "own", Invite("club", manifest.hash, (address,)))
        # The swarm's id is half of the hash: a seed could have what fits that half and not the other.
        half = load_manifest(other).hash[:16] + bytes(16)  # type: ignore[union-attr]
        with pytest.raises(JoinError, match="not the one that the invite names"):
            join(tmp_path / "own", Invite("other", half, (address,)))
        (seed,) = looked(Invite("other", half, (address,))).values()
        assert not seed.ok and "not the one that the invite names: do not join it" in seed.text
    assert not (tmp_path / "own").exists()
    with pytest.raises(JoinError, match="ask for a newer one"):
        join(tmp_path / "own", Invite("other", load_manifest(other).hash, (address,)))  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_member_with_a_newer_invite_goes_on_with_what_it_has_while_no_seed_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = key_of(tmp_path / "listed")
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST, allowed=(listed,))
    with relay(club):
        join(tmp_path / "guest", inviting.make_invite(club, [], inviting.shared_invite(club, 2, DAY)))
        join(tmp_path / "listed", inviting.make_invite(club, []))
        held = load_grant(tmp_path / "guest")
        newer = inviting.make_invite(club, [], inviting.shared_invite(club, 2, 2 * DAY))
    monkeypatch.setattr(joining, "FETCH_TIMEOUT_S", 1.0)  # of the commands, too: they are forked from here
    for name in ("guest", "listed"):
        folder = tmp_path / name
        output = tmp_path / f"{name}-printed"
        output.mkdir()
        child = commands.start(output, "join", newer, "--state", folder, "--listen", LOOPBACK)  # as a container does
        try:
            wait_until(lambda: events_of(folder, "listening") or child.exitcode is not None, 60, "it to start")  # noqa: B023
            os.kill(child.pid or 0, signal.SIGTERM)
            child.join(20)
        finally:
            child.kill()
            child.join()
        said = (output / "stderr").read_text()
        assert child.exitcode == 0, said
        assert said.count("going on without what the invite grants") == said.count("answered within 1 s") == 1
    assert load_grant(tmp_path / "guest") == held and load_grant(tmp_path / "listed") == b""
    stranger = commands.run("join", newer, "--state", tmp_path / "stranger", "--set", "role=relay")
    assert (stranger.returncode, stranger.stderr.splitlines()[-1][:52]) == (
        2,
        "error: no seed of the invite answered within 1 s (tc",
    )
    assert not (tmp_path / "stranger").exists()
    monkeypatch.undo()
    with relay(club):
        settled = join(tmp_path / "guest", newer)
        assert load_grant(tmp_path / "guest") != held
        with open_network(settled, tmp_path / "guest") as network:
            wait_until(lambda: network.host.counters().peers, 20, "it to meet the swarm")


def test_a_member_whose_newer_invite_is_refused_is_told_so(tmp_path: Path) -> None:
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST)
    with relay(club):
        join(tmp_path / "guest", inviting.make_invite(club, [], inviting.shared_invite(club, 2, DAY)))
        expired = inviting.make_invite(club, [], inviting.shared_invite(club, 2, -1.0))
        with pytest.raises(JoinError, match="has expired"):
            join(tmp_path / "guest", expired)


def test_whose_key_a_seed_refuses_in_the_handshake_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FETCH_TIMEOUT_S", 2.0)
    seed, ended = Identity.generate(), threading.Event()
    transport = ZmqTransport(seed, Endpoint.parse(LOOPBACK, bind=True), Limits(), lambda key: True)
    assert transport.endpoint is not None

    def serve() -> None:
        while not ended.is_set():
            transport.poll(0.1)

    server = threading.Thread(target=serve)
    server.start()
    try:
        with pytest.raises(JoinError, match="are its clock, its line and its version in order") as caught:
            join(tmp_path / "own", Invite("club", bytes(32), (Address(transport.endpoint, seed.curve_key),)))
    finally:
        ended.set()
        server.join()
        transport.close()
    assert caught.value.refusals == {str(transport.endpoint): "graylisted"}


def test_a_folder_belongs_to_one_swarm(tmp_path: Path) -> None:
    club, other = found(tmp_path / "club"), found(tmp_path / "other")
    with pytest.raises(UserError, match="belongs to swarm 'club' already"):
        found(club)
    with pytest.raises(UserError, match="no address of this node is known"):
        inviting.make_invite(other, [])
    invite = inviting.make_invite(other, [Address.parse(f"tcp://192.0.2.1:4001?key={'ab' * 32}")])
    with pytest.raises(UserError, match="belongs to another swarm, 'club'"):
        join(club, invite)
    with pytest.raises(UserError, match="is open: an invite needs neither"):
        inviting.shared_invite(club, 3, DAY)


def test_only_the_founder_signs(tmp_path: Path) -> None:
    club = found(tmp_path / "club", JoinPolicy.ALLOWLIST)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "manifest.bin").write_bytes((club / "manifest.bin").read_bytes())
    key_of(tmp_path / "copy")
    with pytest.raises(UserError, match="only the founder of swarm 'club'"):
        inviting.shared_invite(tmp_path / "copy", 3, DAY)


def test_a_relay_does_not_import_torch(tmp_path: Path) -> None:
    club = found(tmp_path / "club")
    code = (
        "import sys; from node.cli.app import run; status = run(sys.argv[1:], debug=False)\n"
        "print(status, sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", code, "node", "--state", str(club), "--set", "role=relay"]
    process = subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (club / "observe.json").exists() or process.poll() is not None, START_S)
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert output.splitlines() == ["0 []"], errors
    assert not (club / "observe.json").exists()
