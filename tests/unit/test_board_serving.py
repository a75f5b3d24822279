"""A board takes what comes: reports count once, what is bad costs its signer, and a damaged file is one clear line."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.board import history, serving
from node.board.serving import open_board
from node.board.standing import standing
from node.cli.app import run as command
from node.errors import UserError
from node.relay import Take
from node.rollouts.group import Group, one_turn
from node.rollouts.group import encode as encode_group
from node.state_folder import HISTORY_FILE
from node.swarm.peering import Network
from node.swarm.reports import REPORTS_TOPIC, NodeReport, encode
from node.tasks import TaskKey
from protocol.credentials.manifest import JoinPolicy, ManifestLimits, ManifestTask, make_manifest
from protocol.credentials.records import Address, Endpoint
from protocol.host import ItemVerdict, Received
from protocol.identity import Identity, NodeId
from protocol.wire.envelope import ItemId

FOUNDER, A, B, LIAR = (Identity(bytes([number]) * 32) for number in range(4))
TASK = ManifestTask("builtin/sums", 2, "0123", "{}")
HOME = Address(Endpoint("127.0.0.1", 4001), A.curve_key)
AWAY = Address(Endpoint("192.0.2.7", 4001), B.curve_key)


class Host:
    """What a board uses of a host."""

    def __init__(self) -> None:
        self.reports: list[tuple[ItemVerdict, str]] = []
        self.revoked: set[str] = set()
        self.known: dict[Address, NodeId] = {}

    def judge(self, _: ItemId, verdict: ItemVerdict, reason: str) -> None:
        self.reports.append((verdict, reason))

    def is_revoked(self, node: str) -> bool:
        return node in self.revoked

    def node_at(self, address: Address) -> NodeId | None:
        return self.known.get(address)

    def peers(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_id=B.node_id)]

    def check(self) -> None:
        pass


def network(host: Host, policy: JoinPolicy = JoinPolicy.OPEN, address: Address | None = AWAY) -> Network:
    limits = ManifestLimits(reports_s=300)
    manifest = make_manifest(FOUNDER, "riddles", 1_700_000_000_000, policy, [TASK], limits=limits)
    return Network(host, A, manifest.swarm, manifest, address)  # type: ignore[arg-type]


def report(signer: Identity, at: float, reward: float = 0.5, **taught_by: int) -> Received:
    of = {
        identity.node_id: taught_by[key] for key, identity in (("a", A), ("b", B), ("liar", LIAR)) if key in taught_by
    }
    body = encode(NodeReport(int(at), "gossamer/0.1.0", "builtin", 7, reward, None, {}, of))
    return Received(ItemId(bytes(32)), signer.node_id, body, at, REPORTS_TOPIC)


@contextmanager
def board(folder: Path, host: Host, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Iterator[tuple[Take, str]]:
    """A board whose views and points are made whenever something is taken."""
    monkeypatch.setattr(history, "standing", partial(standing, walks=500))
    monkeypatch.setattr(serving, "LOOK_S", 0.0)
    monkeypatch.setattr(serving, "TICK_S", 0.0)
    links: list[str] = []
    given = more.pop("network", None) or network(host)
    with open_board(given, folder, ("127.0.0.1", 0), serving=links.append, **more) as take:
        yield take, links[0]


def tree(link: str) -> dict[str, Any]:
    return json.loads(get(link, "/swarm.json"))


def get(link: str, path: str) -> str:
    connection = http.client.HTTPConnection(link.removeprefix("http://").rstrip("/"), timeout=30)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


@pytest.mark.slow
def test_reports_become_nodes_with_standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, now = Host(), time.time()
    with board(tmp_path, host, monkeypatch) as (take, link):
        take([report(FOUNDER, now, a=3), report(A, now, b=1), report(LIAR, now, 9.0, a=5), report(B, now - 7200)])
        found = tree(link)
    standing = {node["id"]: node["standing"] for node in found["nodes"]}
    assert standing[A.node_id] > standing[B.node_id] > 0.2
    assert standing[LIAR.node_id] == 0.0
    assert found["history"][-1]["reward"] == 0.5
    seen = {node["id"]: node["last_report"] for node in found["nodes"]}
    assert seen[B.node_id] == now - 7200  # when it was signed, and not when it came
    assert host.reports == []


@pytest.mark.real
def test_a_report_from_the_future_counts_as_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with board(tmp_path, Host(), monkeypatch) as (take, link):
        take([report(FOUNDER, now + 3600)])
        (node,) = tree(link)["nodes"]
    assert now <= node["last_report"] < now + 600


@pytest.mark.slow
def test_who_has_not_reported_for_four_intervals_is_not_here_though_it_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    with board(tmp_path, Host(), monkeypatch) as (take, link):
        take([report(FOUNDER, now - 1100), report(A, now - 1300), report(B, now - 1300)])  # B is linked
        found, page = tree(link), get(link, "/")
        alone = {identity.node_id: get(link, f"/nodes/{identity.node_id}") for identity in (FOUNDER, A, B)}
    assert {node["id"] for node in found["nodes"] if node["here"]} == {FOUNDER.node_id}
    assert "<b>1</b> node now" in page and "reported in the last 20 minutes" in page
    assert {node for node, text in alone.items() if ", here now." in text} == {FOUNDER.node_id}
    assert {node for node, text in alone.items() if ", not here now." in text} == {A.node_id, B.node_id}


@pytest.mark.slow
def test_rollouts_of_nodes_with_standing_are_shown_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (one_turn("4", True, 1.0), one_turn("5", True, 0.0))
    body = encode_group(Group(TaskKey("builtin/sums", 2, "0123"), 1, "2+2=", made, "builtin", 3))
    items = [Received(ItemId(bytes(32)), identity.node_id, body, time.time(), b"a topic!") for identity in (LIAR, A)]
    with board(tmp_path, Host(), monkeypatch) as (take, link):
        take([report(FOUNDER, time.time(), a=3), report(A, time.time()), *items])
        assert [rollout["node"] for rollout in tree(link)["rollouts"]] == [A.node_id, LIAR.node_id]


@pytest.mark.slow
def test_a_report_counts_once_also_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, now = Host(), time.time()
    for _ in range(2):
        with board(tmp_path, host, monkeypatch) as (take, link):
            take([report(FOUNDER, now, a=3)])
            assert tree(link)["nodes"][0]["taught_by"] == {A.node_id: 3.0}
    assert host.reports == [(ItemVerdict.IGNORE, "early_report")]


@pytest.mark.slow
def test_what_is_no_report_or_praises_its_signer_costs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, now = Host(), time.time()
    with board(tmp_path, host, monkeypatch) as (take, link):
        take([Received(ItemId(bytes(32)), A.node_id, b"noise", now, REPORTS_TOPIC), report(LIAR, now, liar=1)])
        assert tree(link)["nodes"] == []
    assert host.reports == [(ItemVerdict.REJECT, "malformed"), (ItemVerdict.REJECT, "self_praise")]


@pytest.mark.slow
def test_seeds_are_the_founder_the_invites_own_node_and_those_that_a_person_ever_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, now = Host(), time.time()
    host.known = {HOME: A.node_id}
    said = [report(member, now) for member in (FOUNDER, A, B, LIAR)]
    with board(tmp_path, host, monkeypatch, seeds=[HOME, AWAY], trusted=[B.node_id]) as (take, link):
        take(said)
        seeds = {node["id"] for node in tree(link)["nodes"] if node["seed"]}
    assert seeds == {FOUNDER.node_id, A.node_id, B.node_id}
    with board(tmp_path, host, monkeypatch) as (take, link):
        take([])
        assert {node["id"] for node in tree(link)["nodes"] if node["seed"]} == {FOUNDER.node_id, B.node_id}


@pytest.mark.slow
def test_where_no_seed_reports_all_nodes_count_alike_until_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, now = Host(), time.time()
    host.known = {HOME: FOUNDER.node_id}  # a relay
    with board(tmp_path, host, monkeypatch, seeds=[HOME]) as (take, link):
        take([report(A, now, 0.25, b=1), report(B, now, 0.5, a=1), report(LIAR, now, 0.75)])
        found = tree(link)
        assert found["history"][-1]["reward"] == 0.25
        assert [node["standing"] > 0 for node in found["nodes"] if node["id"] in {A.node_id, B.node_id}] == [True] * 2
        assert not any(node["seed"] for node in found["nodes"])
        assert "All nodes count alike" in get(link, "/")
    with board(tmp_path, host, monkeypatch, seeds=[HOME], trusted=[B.node_id]) as (take, link):
        take([])
        assert "All nodes count alike" not in get(link, "/")


@pytest.mark.slow
def test_who_was_revoked_is_shown_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, now = Host(), time.time()
    with board(tmp_path, host, monkeypatch) as (take, link):
        take([report(A, now), report(B, now)])
        host.revoked = {B.node_id}
        take([])
        assert [node["id"] for node in tree(link)["nodes"]] == [A.node_id]


@pytest.mark.slow
def test_groups_are_shown_and_what_is_none_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (one_turn("4", True, 1.0), one_turn("5", True, 0.0))
    group = Group(TaskKey("builtin/sums", 2, "0123"), 1, "2+2=", made, "builtin", 3)
    items = [
        Received(ItemId(bytes(32)), A.node_id, body, time.time(), b"a topic!")
        for body in (encode_group(group), b"no group")
    ]
    host = Host()
    with board(tmp_path, host, monkeypatch) as (take, link):
        take(items)
        (one,) = tree(link)["rollouts"]
    assert (one["node"], one["question"], [answer["text"] for answer in one["answers"]]) == (
        A.node_id,
        "2+2=",
        ["4", "5"],
    )
    assert host.reports == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "address", "shown"),
    [
        (JoinPolicy.OPEN, AWAY, True),
        (JoinPolicy.OPEN, HOME, False),
        (JoinPolicy.OPEN, None, False),
        (JoinPolicy.ALLOWLIST, AWAY, False),
    ],
)
def test_the_page_of_an_open_swarm_tells_how_to_join_at_the_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: JoinPolicy, address: Address | None, shown: bool
) -> None:
    host = Host()
    with board(tmp_path, host, monkeypatch, network=network(host, policy, address)) as (_, link):
        assert ("gossamer join gossamer://riddles/" in get(link, "/")) == shown


def test_a_damaged_history_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / HISTORY_FILE).write_bytes(b"no database" * 1000)
    with (
        pytest.raises(UserError, match=r"board\.sqlite is damaged .*: delete it"),
        board(tmp_path, Host(), monkeypatch),
    ):
        pass


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with board(tmp_path, Host(), monkeypatch) as (_, link):
        port = int(link.rstrip("/").rpartition(":")[2])
        with (
            pytest.raises(UserError, match="choose another --port"),
            open_board(network(Host()), tmp_path, ("127.0.0.1", port)),
        ):
            pass


@pytest.mark.slow
def test_a_folder_of_no_swarm_is_one_clear_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["board", "--state", str(tmp_path / "b")], debug=False) == 2
    assert "b belongs to no swarm: `gossamer board INVITE --state " in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_board_wants_a_swarm_with_a_manifest(tmp_path: Path) -> None:
    alone = network(Host())._replace(manifest=None)
    with pytest.raises(UserError, match="give it an invite"), open_board(alone, tmp_path, ("127.0.0.1", 0)):
        pass
