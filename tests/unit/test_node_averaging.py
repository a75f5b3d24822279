"""Averaging weights in the background of a node: what is taken up and when, checkpoints, who is in a group."""

import threading
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from collectives import Communicator
from collectives.errors import Aborted, DeadlineExceeded, Mismatch
from collectives.outer_optimizer import TrainedParameters
from node.config import WeightsConfig, parse_config
from node.errors import UserError
from node.swarm.averaging import ADDRESS_FILE, STATE_FILE, OwnWeights, WeightExchange, exchange_weights, group_name
from node.swarm.peering import swarm_id
from node.swarm.swarm_folder import save_manifest
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.credentials.records import Endpoint, Service
from protocol.identity import Identity
from protocol.membership.reachability import Standing
from protocol.transport.port_mapping import Mapping as RouterSaid
from tests.fakes.groups import FakeCommunicator, Hall
from tests.policies import tiny_policy
from tests.waiting import wait_until

LIMIT = 20.0


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy"))


class Member(FakeCommunicator):
    address = "tcp://127.0.0.1:1"
    left = False

    def leave(self) -> None:
        self.left = True
        self.hall.leave(self.name)


class Node:
    """A node whose rounds each add a number of its own to all weights."""

    def __init__(self, folder, policy, hall: Hall, name: str, start: float = 0.0, **config) -> None:
        self.model = torch.nn.Linear(3, 1)
        self.policy = type("Policy", (), {"model": self.model, "name": policy.name})
        self.set(start)
        self.member = Member(hall, name)
        self.exchange = WeightExchange(
            WeightsConfig(**{"mode": "average", "every": 2} | config), self.policy, lambda: self.member, folder / name
        )
        self.number = 0

    def set(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def round(self, learnt: float) -> dict:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(learnt)
        self.number += 1
        return dict(self.exchange.after_round(self.number))

    def idle_round(self) -> dict:
        """Train nothing in a round that is no time for an exchange, until a result is taken up."""
        return wait_until(lambda: self.exchange.after_round(1), LIMIT, "a result")

    @property
    def value(self) -> float:
        flat = TrainedParameters(self.model.parameters()).flat_copy()
        assert (flat == flat[0]).all()
        return flat[0].item()


@pytest.fixture
def make(tmp_path, policy):
    nodes = []

    def one(hall, name, **options):
        nodes.append(Node(tmp_path, policy, hall, name, **options))
        return nodes[-1]

    yield one
    for node in nodes:
        node.exchange.close()


def test_the_mean_is_taken_up_and_what_was_learnt_meanwhile_stays(make):
    hall = Hall("a", "b")
    a, b = make(hall, "a", start=1.0), make(hall, "b", start=1.0)
    for node in (a, b):
        node.exchange.begin()
    a.idle_round()
    b.idle_round()
    assert (a.value, b.value) == (1.0, 1.0)
    assert a.round(1.0) == {}
    assert a.round(1.0) == {}  # an exchange begins with 3.0, and waits for b
    a.round(0.5)  # learnt meanwhile
    assert a.value == 3.5
    b.round(3.0)
    b.round(3.0)  # and b's with 7.0
    row = a.idle_round()
    assert (row["weights/revision"], row["weights/members"], row["weights/joined"]) == (1, 2, False)
    assert a.value == 5.5
    b.idle_round()
    assert b.value == 5.0
    a.round(0.5)  # the exchange that begins here says 6.0: all since the mean of 5.0 counts
    b.round(0.0)
    b.round(0.0)
    a.idle_round()
    b.idle_round()
    assert (a.value, b.value) == (5.5, 5.5)


def test_no_round_waits_and_an_exchange_that_is_not_over_is_left_alone(make):
    hall = Hall("a", "b")  # b never comes
    a = make(hall, "a")
    a.exchange.begin()
    assert [a.round(1.0) for _ in range(20)] == [{}] * 20
    assert a.value == 20.0


def ahead_of_another(make):
    """Two nodes of a group at 1.0; the first has trained for two rounds since."""
    hall = Hall("a", "b")
    a, b = make(hall, "a", start=1.0), make(hall, "b", start=1.0)
    for node in (a, b):
        node.exchange.begin()
    a.idle_round()
    b.idle_round()
    a.round(1.0)
    a.round(1.0)
    return a, b


def test_a_mean_that_is_not_finite_is_left_out_and_what_was_learnt_stays(make, tmp_path):
    a, b = ahead_of_another(make)
    b.exchange._jobs.put(torch.full((4,), torch.inf))  # it lies
    assert a.idle_round() == {"weights/nonfinite": 1}
    assert a.value == 3.0
    a.exchange.write(tmp_path)
    state = load_file(tmp_path / STATE_FILE)
    assert (state["revision"].item(), state["outer"].tolist()) == (0, [1.0] * 4)
    a.round(1.0)
    assert a.value == 4.0, "it trains on"
    # The group's own state is finite still, so once all values are numbers the next exchange counts, with all of a's.
    wait_until(lambda: not b.exchange._results.empty(), LIMIT, "b's part")
    b.idle_round()
    a.round(0.0)
    b.round(0.0), b.round(0.0)
    row = a.idle_round()
    assert (row["weights/revision"], a.value) == (1, 2.5)


def test_weights_that_are_not_finite_are_not_offered_to_the_group(make):
    a, b = ahead_of_another(make)
    b.round(0.0)
    assert b.round(float("inf")) == {"weights/nonfinite": 1}  # it has diverged
    b.set(1.0)
    b.round(0.0)
    b.round(0.0)
    assert a.idle_round()["weights/members"] == 2
    assert (a.value, b.idle_round()["weights/revision"], b.value) == (2.0, 1, 2.0)


def test_async_takes_a_result_up_at_the_next_exchange_only(make, monkeypatch):
    monkeypatch.setattr("collectives.outer_optimizer._ONE_LATE", (1.0, 0.0))
    a = make(Hall("a"), "a", mode="async-diloco")
    a.exchange.begin()
    wait_until(lambda: not a.exchange._results.empty(), LIMIT)
    assert a.round(1.0) == {}
    assert a.round(1.0)["weights/revision"] == 0
    wait_until(lambda: not a.exchange._results.empty(), LIMIT)
    assert a.round(1.0) == {}
    assert a.round(1.0)["weights/revision"] == 1
    assert a.value == 4.0


def test_a_newcomer_takes_the_groups_weights_and_keeps_what_it_learns_from_then_on(make):
    hall = Hall("a")
    a = make(hall, "a", start=1.0)
    a.exchange.begin()
    a.idle_round()
    a.round(0.5)
    a.round(0.5)
    a.idle_round()
    c = make(hall, "c", start=9.0)
    entered = threading.Event()

    def connect():
        entered.set()
        hall.meet("c", "admit")
        return c.member

    c.exchange._connect = connect
    c.exchange.begin()
    assert entered.wait(LIMIT)
    wait_until(lambda: hall.waits("c"), LIMIT)
    c.round(0.25)  # meanwhile
    a.round(0.5)
    a.round(0.5)
    a.idle_round()
    row = c.idle_round()
    assert row["weights/joined"] is True
    assert a.value == 3.0
    assert c.value == 3.25


def test_a_group_that_is_not_reached_is_tried_again(make, monkeypatch):
    monkeypatch.setattr("node.swarm.averaging.FIRST_RETRY", 0.01)
    a = make(Hall("a"), "a")
    tries = []

    def connect():
        tries.append(1)
        if len(tries) < 3:
            raise Aborted("nobody answered")
        return a.member

    a.exchange._connect = connect
    a.exchange.begin()
    a.idle_round()
    assert len(tries) == 3


def test_a_member_that_does_not_fit_does_not_end_the_exchange(make, monkeypatch):
    monkeypatch.setattr("node.swarm.averaging.LAST_RETRY", 0.01)
    hall = Hall("a")
    a = make(hall, "a")
    sync, calls = a.member.sync_state, []

    def differ_once(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise Mismatch("b", "layout", "1", "2")
        return sync(*args, **options)

    a.member.sync_state = differ_once
    a.exchange._connect = lambda: hall.members.add("a") or a.member
    a.exchange.begin()
    a.idle_round()
    assert len(calls) == 2


def test_a_group_is_patient_over_the_internet(policy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Communicator, "connect", lambda *_, **options: asked.append(options) or 1 / 0)
    for number, listen in enumerate(("tcp://127.0.0.1:0", "tcp://0.0.0.0:0")):
        config = parse_config({"weights": {"mode": "average"}, "network": {"listen": listen}})
        with exchange_weights(config, tmp_path, policy, None, Board()) as weights:
            weights.begin()
            wait_until(lambda n=number: len(asked) > n, LIMIT)
    assert [options["timing"].timeout for options in asked] == [1.5, 6.0]


def test_what_cannot_be_mended_ends_the_exchange_and_not_the_node(make):
    a = make(Hall("a"), "a")
    a.member.admit = a.member.sync_state = None  # a defect
    a.exchange.begin()
    wait_until(lambda: a.member.left, LIMIT, "the end of the exchange")
    assert [a.round(1.0) for _ in range(4)] == [{}] * 4


def test_close_leaves_the_group_and_ends_the_thread(make, tmp_path):
    a = make(Hall("a", "b"), "a")
    a.exchange.begin()
    wait_until(lambda: a.member.hall.waits("a"), LIMIT)
    assert (tmp_path / "a").read_text() == "tcp://127.0.0.1:1\n"
    a.exchange.close()
    assert a.member.left
    assert not a.exchange._thread.is_alive()


def test_one_that_is_let_in_after_its_node_has_closed_leaves_and_says_nothing(make, tmp_path):
    a, closed = make(Hall("a"), "a"), threading.Event()

    def connect():
        assert closed.wait(LIMIT)
        return a.member

    a.exchange._connect = connect
    a.exchange.begin()
    a.exchange.close()
    closed.set()
    a.exchange._thread.join(LIMIT)
    assert a.member.left and not (tmp_path / "a").exists()


def test_what_was_not_exchanged_before_a_restart_counts_after_it(make, tmp_path):
    a = make(Hall("a"), "a", mode="diloco")
    a.exchange.begin()
    a.idle_round()
    a.round(1.0)
    a.round(1.0)
    a.idle_round()
    a.round(1.0)  # since the last exchange, and in the checkpoint's weights
    a.exchange.write(tmp_path)
    expected = a.value

    again = make(Hall("b"), "b", mode="diloco")
    again.exchange.resume(tmp_path)
    again.set(expected)
    again.exchange.begin()
    again.idle_round()
    assert again.value == expected
    for node in (a, again):
        node.number = 3
        node.round(1.0)
        node.idle_round()
    assert again.value == a.value
    assert again.exchange._revision == a.exchange._revision == 2


def test_a_checkpoint_without_this_state_is_a_first_start_and_a_damaged_one_is_named(make, tmp_path):
    a = make(Hall("a"), "a")
    a.exchange.resume(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(UserError, match=STATE_FILE):
        a.exchange.resume(tmp_path)
    revision = torch.tensor(3)
    for sizes in ((2, 2), (4, 2), (2, 4)):
        state = {name: torch.zeros(size) for name, size in zip(("outer", "momentum"), sizes, strict=True)}
        save_file(state | {"revision": revision}, tmp_path / STATE_FILE)
        with pytest.raises(UserError, match="another model"):
            a.exchange.resume(tmp_path)


def test_a_group_is_a_swarm_an_architecture_and_a_way_of_stepping(policy, tmp_path, monkeypatch):
    wider = tiny_policy(tmp_path / "wider", width=32)
    adapters = tiny_policy(tmp_path / "adapters", lora=2)
    same, other = bytes(16), bytes([1] * 16)
    names = [
        group_name(WeightsConfig(mode="diloco"), same, policy),
        group_name(WeightsConfig(mode="diloco"), other, policy),
        group_name(WeightsConfig(mode="async-diloco"), same, policy),
        group_name(WeightsConfig(mode="average"), same, policy),
        group_name(WeightsConfig(mode="diloco", codec="int8"), same, policy),
        group_name(WeightsConfig(mode="diloco"), same, wider),
        group_name(WeightsConfig(mode="diloco"), same, adapters),
    ]
    assert len(set(names)) == len(names)
    with monkeypatch.context() as other:  # a release that takes another step
        other.setattr("collectives.outer_optimizer._AT_ONCE", (0.5, 0.9))
        assert group_name(WeightsConfig(mode="diloco"), same, policy) not in names
    assert group_name(WeightsConfig(mode="diloco", every=7, listen="tcp://x:1"), same, policy) == names[0]


class Board:
    """A swarm's directory."""

    def __init__(self, *nodes: str) -> None:
        self.served: list[Service] = []
        self.nodes = nodes

    def serve(self, *services: Service) -> None:
        self.served = list(services)

    def offers(self, name: str) -> list[tuple[str, Endpoint]]:
        return [(node, Endpoint("127.0.0.1", 9)) for node in self.nodes]

    def admits(self, node: str) -> bool:
        return node in self.nodes

    standing = Standing()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "listen", "told"),
    [
        ({"listen": "tcp://127.0.0.1:0"}, "", True),
        ({"listen": "tcp://0.0.0.0:4001"}, "tcp://127.0.0.1:0", False),  # nobody there could dial it
        ({"listen": ""}, "", False),
    ],
    ids=["a swarm on this machine", "loopback in a public swarm", "a node that nobody can dial"],
)
def test_the_swarm_is_told_where_the_group_is_if_it_can_be_dialled(policy, tmp_path, network, listen, told):
    config = parse_config({"weights": {"mode": "average", "listen": listen}, "network": network})
    board = Board()
    with exchange_weights(config, tmp_path, policy, None, board) as weights:
        weights.begin()
        wait_until((tmp_path / ADDRESS_FILE).exists, LIMIT)
        address = (tmp_path / ADDRESS_FILE).read_text().strip()
        name = group_name(config.weights, swarm_id(config, tmp_path), policy).removeprefix("gossamer/")
        assert board.served == ([Service(name, Endpoint.parse(address))] if told else [])


def test_members_that_the_swarm_tells_of_are_dialled_before_each_exchange(make):
    a = make(Hall("a"), "a")
    a.exchange._find = lambda: ["tcp://10.0.0.1:7"]
    a.exchange.begin()
    a.idle_round()
    assert a.member.met == ["tcp://10.0.0.1:7"]
    a.exchange._find = lambda: ["tcp://10.0.0.2:7"]
    a.round(1.0)
    a.round(1.0)
    a.idle_round()
    assert a.member.met == ["tcp://10.0.0.2:7"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listen", "standing", "found", "warned"),
    [
        ("", Standing(), [], True),
        ("tcp://127.0.0.1:0", Standing("192.168.0.7", False, 2), [], True),
        ("tcp://127.0.0.1:0", Standing("198.41.0.4", True, 2), [], True),  # its router forwards another port
        ("tcp://127.0.0.1:0", Standing("192.168.0.7", True, 2), [], False),
        ("tcp://127.0.0.1:0", Standing(), [], False),
        ("", Standing(), [Identity(bytes(32)).node_id], False),
    ],
)
def test_a_node_that_nobody_can_dial_is_told_once_that_it_knows_of_no_member_to_dial_either(
    policy, tmp_path, listen, standing, found, warned
):
    config = parse_config({"weights": {"mode": "average", "every": 1}, "network": {"listen": listen}})
    board = Board(*found)
    board.standing = standing
    with capture_logs() as said, exchange_weights(config, tmp_path, policy, None, board) as weights:
        weights.begin()
        for _ in range(2):
            wait_until(lambda: weights.after_round(1), LIMIT)
    warnings = [line["reason"] for line in said if line["event"] == "this node averages weights with nobody"]
    assert warnings == ["nobody can dial it, and it knows no member of its group to dial"] * warned


@pytest.mark.parametrize(
    ("who", "listen", "warns"), [("OPEN", "0.0.0.0", 1), ("ALLOWLIST", "0.0.0.0", 0), ("OPEN", "127.0.0.1", 0)]
)
def test_weights_that_anyone_may_move_are_a_warning(policy, tmp_path, who, listen, warns):
    save_manifest(
        tmp_path, make_manifest(Identity.generate(), "s", 1, JoinPolicy[who], [ManifestTask("t", 1, "ab", "{}")])
    )
    config = parse_config({"weights": {"mode": "average"}, "network": {"listen": f"tcp://{listen}:0"}})
    with capture_logs() as said, exchange_weights(config, tmp_path, policy, None, Board()):
        pass
    assert sum("anyone may join this swarm" in line["event"] for line in said) == warns


class Router:
    """A router's mapping of a port that has answered `word` already."""

    word = RouterSaid("198.41.0.4")
    forwards: ClassVar[list[int]] = []

    def __init__(self, port: int, tell: object) -> None:
        self.port, self.said = port, self.word

    def start(self) -> None:
        self.forwards.append(self.port)

    def stop(self) -> None:
        self.forwards.remove(self.port)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "seen_at", "local", "outside"),
    [
        (RouterSaid("198.41.0.4"), "198.41.0.4", "all", True),
        (RouterSaid("198.41.0.4"), "198.41.0.9", "port", False),  # peers see the node elsewhere
        (RouterSaid("100.64.0.9", "behind another"), "100.64.0.9", "all", False),
        (RouterSaid("198.41.0.4"), "198.41.0.4", "peers", None),  # the router is not asked
    ],
)
def test_the_router_forwards_the_groups_port_too_and_the_swarm_is_told_where_once_peers_see_the_node_there(
    policy, tmp_path, monkeypatch, word, seen_at, local, outside
):
    monkeypatch.setattr("node.swarm.averaging.PortMapping", Router)
    monkeypatch.setattr("collectives.mesh.addresses.own_hosts", lambda host: ("192.168.0.7",))
    monkeypatch.setattr(Router, "word", word)
    board = Board()
    network = {"listen": "tcp://0.0.0.0:4001", "local": local}
    config = parse_config({"weights": {"mode": "average", "every": 1}, "network": network})
    with exchange_weights(config, tmp_path, policy, None, board) as weights:
        weights.begin()
        wait_until((tmp_path / ADDRESS_FILE).exists, LIMIT)
        wait_until(lambda: weights.after_round(1), LIMIT)
        here = board.served[0].endpoint
        assert here.host == "192.168.0.7" and len(board.served) == 1  # nobody has seen the node yet
        assert Router.forwards == ([] if outside is None else [here.port])
        board.standing = Standing(seen_at, True, 1)
        wait_until(lambda: weights.after_round(1), LIMIT)
        wait_until(lambda: weights.after_round(1), LIMIT)
        assert [address.endpoint for address in board.served[1:]] == ([Endpoint(seen_at, here.port)] if outside else [])
    assert Router.forwards == []


@pytest.mark.slow
def test_only_nodes_that_the_swarm_admits_can_be_in_the_group(policy, tmp_path):
    friend, stranger = Identity.generate(), Identity.generate()
    config = parse_config({"weights": {"mode": "average"}, "network": {"listen": "tcp://127.0.0.1:0"}})
    with exchange_weights(config, tmp_path, policy, None, Board(friend.node_id)) as weights:
        weights.begin()
        wait_until((tmp_path / ADDRESS_FILE).exists, LIMIT)
        seed = (tmp_path / ADDRESS_FILE).read_text().strip()
        name = group_name(config.weights, swarm_id(config, tmp_path), policy)
        with pytest.raises(DeadlineExceeded, match="no seed answered"):
            Communicator.connect(name, [seed], identity=stranger, timeout=1)
        with Communicator.connect(name, [seed], identity=friend, timeout=LIMIT) as member:
            assert member.world_size == 2


def test_an_address_that_is_none_is_one_clear_line(policy, tmp_path):
    config = parse_config({"weights": {"mode": "average", "listen": "anywhere"}})
    with (
        pytest.raises(UserError, match=r"weights\.listen: 'anywhere' is no address"),
        exchange_weights(config, tmp_path, policy, None),
    ):
        pass


def test_off_means_off(policy, tmp_path):
    with exchange_weights(parse_config({}), tmp_path, policy, None) as weights:
        assert isinstance(weights, OwnWeights)
        weights.begin()
        assert weights.after_round(20) == {}
        weights.write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_group_of_one(policy, tmp_path):
    config = parse_config({"weights": {"mode": "diloco", "every": 1}})
    with exchange_weights(config, tmp_path, policy, None) as weights:
        weights.begin()
        wait_until((tmp_path / ADDRESS_FILE).exists, LIMIT)
        row = wait_until(lambda: weights.after_round(1), LIMIT)
        assert (row["weights/revision"], row["weights/members"]) == (0, 1)
        assert wait_until(lambda: weights.after_round(1), LIMIT)["weights/revision"] == 1
