"""What a node says over HTTP, and what `gossamer status` makes of it."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from node.cli.app import run
from node.cli.status import render
from node.config import ObserveConfig
from node.errors import UserError
from node.metrics import METRICS
from node.operations.diagnosis import examine_node
from node.state_folder import exclusive
from node.swarm.peering import Network, agent
from node.telemetry.status_server import ask, describe, observe
from protocol.credentials.records import Address
from protocol.host import Counters, PeerInfo
from protocol.identity import Identity, NodeId
from protocol.membership.reachability import Standing
from website.grafana import board

IDENTITY = Identity(bytes(32))
HOSTILE = PeerInfo(
    NodeId("a" * 32), "tcp://192.0.2.1:4001", "[red]\x1b[2J\r\nagent", "alive", 0.0123, 754.0, 1_240_000, 310_000, -4.2
)
COUNTERS = Counters(1000, 2000, 3, 4, 5, 1, 9, {"forged": 2, "stale": 1}, 1)
SEEN = Standing("198.41.0.4", False, 2)
HOST = SimpleNamespace(
    counters=lambda: COUNTERS,
    peers=lambda: [HOSTILE],
    refusal="",
    twin="",
    standing=SEEN,
    addresses=(),
    check=lambda: None,
)
ADDRESS = Address.parse(f"tcp://127.0.0.1:4001?key={'ab' * 32}")
NETWORK = Network(HOST, IDENTITY, bytes(16), None, ADDRESS)  # type: ignore[arg-type]


EACH = {metric.name: 1.0 for metric in METRICS.values() if metric.exported and not metric.label}
ROWS = [
    {"round": 6, "reward": 0.0, "time/round": 1.0},
    EACH | {"round": 7, "reward": 0.5, "time/round": 2.0, "swarm/buffer": 11, "rewards/builtin/sums/mean": 0.75},
]


def state(rounds: int | None = 10, trains: bool = True) -> dict:
    return describe(NETWORK, ROWS if trains else [], rounds, trains=trains)


@pytest.mark.slow
def test_status_and_doctor_say_which_peers_share_nothing_with_this_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200, file=StringIO())
    told = "1 of 2 peers has another form of groups: nothing is shared with them"
    console.print(*render(state() | {"other_form": told}, 200), sep="\n")
    assert f"{told}: update whoever is behind" in console.export_text()
    (tmp_path / "config.json").write_text("{}")
    with observe(ObserveConfig(), tmp_path, lambda: state() | {"other_form": told}):
        checks = {check.name: check for check in examine_node(tmp_path)}
    assert (checks["groups"].ok, checks["groups"].text) == (False, told)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with observe(ObserveConfig(), tmp_path, state):
        yield tmp_path


def get(folder: Path, path: str, method: str = "GET") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", json.loads((folder / "observe.json").read_text())["port"], timeout=5)
    with closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.mark.real
def test_status_holds_progress_peers_and_every_counter(folder: Path) -> None:
    tree = ask(folder)
    assert (tree["node"], tree["round"], tree["rounds"], tree["reward"]) == (IDENTITY.node_id, 7, 10, 0.25)
    assert tree["counters"] == {
        "live_peers": 1,
        "known_peers": 9,
        "dialable_members": 1,
        "bytes_sent": 1000,
        "bytes_received": 2000,
        "items_sent": 3,
        "items_received": 4,
        "duplicates": 5,
    }
    assert tree["rejected"] == {"forged": 2, "stale": 1}
    (peer,) = tree["peers"]
    assert (peer["rtt_s"], peer["age_s"], peer["score"]) == (0.0123, 754.0, -4.2)
    assert (peer["bytes_sent"], peer["bytes_received"], tree["least_score"]) == (1_240_000, 310_000, -20.0)


@pytest.mark.slow
def test_prometheus_reads_the_same_numbers(folder: Path) -> None:
    status, text = get(folder, "/metrics")
    samples = {
        (sample.name, sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert status == 200
    assert samples["gossamer_rejected_total", "forged"] == 2
    assert samples["gossamer_bytes_sent_total", None] == 1000
    assert samples["gossamer_duplicates_total", None] == 5
    assert (samples["gossamer_peers", None], samples["gossamer_known_peers", None]) == (1, 9)
    assert (samples["gossamer_round", None], samples["gossamer_reward", None]) == (7, 0.25)
    assert (samples["gossamer_round_seconds", None], samples["gossamer_buffer_groups", None]) == (1.5, 11)
    assert samples["gossamer_resident_memory_bytes", None] > 1e6
    assert samples["gossamer_uptime_seconds", None] > 0


@pytest.mark.slow
def test_each_metric_that_is_declared_for_prometheus_is_exported_and_on_grafanas_board(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "examples" / "grafana.json").read_text()
    assert json.loads(text) == board()
    shown = [target["expr"] for panel in board()["panels"] for target in panel["targets"]]
    declared = {f"gossamer_{metric.exported}" for metric in METRICS.values() if metric.exported} | {
        "gossamer_node_info"
    }
    exported = set(re.findall(r"^(gossamer_[a-z_]+)[{ ]", get(folder, "/metrics")[1], flags=re.MULTILINE))
    named = set(re.findall(r"gossamer_[a-z_]+", " ".join(shown)))
    assert named == exported
    assert {name.removesuffix("_total") for name in exported} == declared


def test_a_round_without_a_figure_counts_for_nothing_in_its_mean() -> None:
    tree = describe(NETWORK, [{"round": 5, "reward": None}, {"round": 6}, *ROWS], 10)
    assert (tree["reward"], tree["round_s"]) == (0.25, 1.5)
    assert describe(NETWORK, [{"round": 5}], 10)["reward"] is None


@pytest.mark.slow
def test_a_relay_has_no_round(tmp_path: Path) -> None:
    with observe(ObserveConfig(), tmp_path, lambda: state(None, trains=False)):
        assert "gossamer_round" not in get(tmp_path, "/metrics")[1]
        assert ask(tmp_path)["round"] is None


@pytest.mark.slow
def test_nothing_else_is_answered_and_nothing_is_taken_in(folder: Path) -> None:
    assert get(folder, "/nothing")[0] == get(folder, "/static/../app.py")[0] == 404
    assert get(folder, "/status", "POST")[0] == get(folder, "/metrics", "DELETE")[0] == 405


@pytest.mark.slow
def test_a_client_that_says_nothing_or_nonsense_does_not_stop_it(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = json.loads((folder / "observe.json").read_text())["port"]
    for data in (b"", b"\x00" * 100_000, b"GET /status HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(data)
    assert ask(folder)["round"] == 7
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_file_goes_with_the_server_and_the_port_is_free_again(tmp_path: Path) -> None:
    with observe(ObserveConfig(), tmp_path, state):
        place = json.loads((tmp_path / "observe.json").read_text())
        with (
            pytest.raises(UserError, match="set observe"),
            observe(ObserveConfig(port=place["port"]), tmp_path, state),
        ):
            raise AssertionError("two servers on one port")
    assert not (tmp_path / "observe.json").exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", place["port"]))


def test_it_can_be_left_out(tmp_path: Path) -> None:
    with observe(ObserveConfig(enabled=False), tmp_path, state), pytest.raises(UserError, match="no node is running"):
        ask(tmp_path)


def test_a_node_that_starts_is_not_said_to_be_down(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(UserError, match="is starting: ask again"):
        ask(tmp_path)


@pytest.mark.slow
def test_a_node_that_was_killed_is_not_running(folder: Path, tmp_path: Path) -> None:
    place = json.loads((folder / "observe.json").read_text())
    (folder / "observe.json").write_text(json.dumps(place | {"pid": place["pid"] + 1}))
    with pytest.raises(UserError, match="no node is running"):
        ask(folder)  # its port is another node's by now
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    (folder / "observe.json").write_text(json.dumps(place | {"port": free}))
    with pytest.raises(UserError, match="no node is running"):
        ask(folder)
    with exclusive(folder), pytest.raises(UserError, match=r"a node runs in .* cannot be reached from here"):
        ask(folder)
    (folder / "observe.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        ask(folder)


def test_what_a_peer_calls_itself_does_not_reach_the_terminal_raw() -> None:
    console = Console(record=True, width=200, file=StringIO())
    console.print(*render(state(), 200), sep="\n")
    text = console.export_text()
    assert "[red]\\x1b[2J\\r\\nagent" in text
    assert "7 of 10" in text and "12.3 ms" in text
    assert re.search(r"forged +2 +a signature that does not hold", text)
    assert "\x1b" not in text


def test_peers_can_be_read_on_eighty_columns() -> None:
    console = Console(record=True, width=80, file=StringIO())
    peer = {**state()["peers"][0], "agent": agent(), "endpoint": "tcp://203.0.113.254:40001", "state": "suspect"}
    peer["score"] = -0.01
    console.print(*render(state() | {"peers": [peer]}, 80), sep="\n")
    words = [peer["short_name"], "a" * 12, "tcp://203.0.113.254:40001", "suspect", "12.3", "ms"]
    assert any(line.split() == words for line in console.export_text().splitlines())


@pytest.mark.slow
def test_no_cell_is_left_empty_and_no_line_ends_in_blanks(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(record=True, width=109, file=StringIO())
    console.print(*render(state() | {"peers": [{**state()["peers"][0], "rtt_s": None}]}, 109), sep="\n")
    assert re.search(r"alive +- +-4\.2", console.export_text())
    assert run(["status", str(folder)], debug=False) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "got twice  5 groups" in lines
    assert any(line.startswith("forged ") for line in lines) and lines == [line.rstrip() for line in lines]


def test_how_long_a_peer_is_there_its_traffic_and_its_score_are_shown_where_there_is_room() -> None:
    console = Console(record=True, width=110, file=StringIO())
    console.print(*render(state(), 110), sep="\n")
    text = console.export_text()
    assert re.search(r"round trip +for +sent +got +score", text)
    assert re.search(r"12\.3 ms +12:34 +1\.2 MB +310 kB +-4\.2", text)
    assert "below -20 a peer is refused" in text


@pytest.mark.parametrize(
    ("tree", "says"),
    [(state(10), "7 of 10"), (state(None), "7"), (state(None, trains=False), "relays only")],
    ids=["to an end", "until it is stopped", "a relay"],
)
def test_progress_is_told_as_far_as_there_is_any(tree: dict, says: str) -> None:
    console = Console(record=True, width=200, file=StringIO())
    console.print(*render(tree, 200), sep="\n")
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("round ")]
    assert line.removeprefix("round").strip() == says


def test_until_when_a_grant_admits_is_shown_and_that_it_does_no_longer() -> None:
    shown = []
    for expires in (None, state()["time"] + 1000, state()["time"] - 1000):
        console = Console(record=True, width=200, file=StringIO())
        console.print(*render(state() | {"grant_expires": expires}, 200), sep="\n")
        shown.append(console.export_text())
    assert "admitted" not in shown[0]
    assert "until 20" in shown[1] and "expired" not in shown[1]
    assert "no longer, its grant expired 20" in shown[2] and "newer invite" in shown[2]


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (
            {},
            "you cannot be reached because the 2 networks asked cannot dial port 4001 at 198.41.0.4: a router or "
            "firewall is between; you learn and teach through one relay",
        ),
        (
            {"dialable_asked": 1, "router": "no router of this network answers UPnP"},
            "you cannot be reached because the one network asked cannot dial port 4001 at 198.41.0.4: no router of "
            "this network answers UPnP; you learn and teach through one relay",
        ),
        ({"dialable": True}, "by everybody, at 198.41.0.4"),
        (
            {"dialable": True, "unreached": [{"endpoint": "tcp://[2003::5]:4001", "tried_from": "2a00::1"}]},
            "by everybody, at 198.41.0.4; tcp://[2003::5]:4001 could not be dialled from 2a00::1",
        ),
        ({"dialable_asked": 1, "dialable": True}, "by everybody, at 198.41.0.4, says one peer"),
        ({"seen_at": "192.168.0.7", "dialable": True}, "by nodes of its own network, at 192.168.0.7"),
        ({"seen_at": None, "dialable": None}, "by nodes of this machine"),
        (
            {"seen_at": None, "dialable": None, "address": f"tcp://192.168.0.7:4001?key={'ab' * 32}"},
            "nobody on another machine has tried yet",
        ),
        (
            {"address": None, "peers": []},
            "you cannot be reached because you do not listen; you learn and teach through 0 relays",
        ),
    ],
)
def test_by_whom_a_node_can_be_dialled_or_why_by_nobody_is_shown_in_one_line(known: dict, says: str) -> None:
    assert shown(state() | known, "reached") == says


@pytest.mark.slow
def test_status_and_doctor_say_how_many_members_can_be_dialled_and_that_one_is_not_enough(folder: Path) -> None:
    assert shown(state(), "members") == "1 can be dialled: the swarm needs a second that listens, to outlive the first"
    enough = state() | {"counters": state()["counters"] | {"dialable_members": 2}}
    assert shown(enough, "members") == "2 can be dialled"
    (folder / "config.json").write_text("{}")
    checks = {check.name: check for check in examine_node(folder)}
    assert not checks["members"].ok and not checks["members"].needed and "--listen" in checks["members"].do


def test_a_person_is_told_how_many_groups_came_from_peers_and_not_what_nobody_knows() -> None:
    rows = [{"round": at, "groups_local": 2, "groups_external": 6} for at in (1, 2)]
    assert describe(NETWORK, rows, 10)["groups"] == {"local": 4, "external": 12}
    told = "12 of the last 16 groups came from peers; what they did for the reward is not known"
    assert shown(state() | {"groups": {"local": 4, "external": 12}}, "taught by") == told
    assert (
        shown(state() | {"groups": {"local": 4, "external": 0}}, "taught by")
        == "0 of the last 4 groups came from peers"
    )


def test_a_person_is_told_the_first_and_the_last_score_on_held_out_questions() -> None:
    rows = [
        {"round": at, "questions": 32, "accuracy": at / 10, "accuracy_low": 0.0, "accuracy_high": 1.0}
        for at in range(4)
    ]
    tree = state() | {"held_out": describe(NETWORK, (), 10, evaluations=rows)["held_out"]}
    told = "0.000 (0.000 to 1.000) after round 0, 0.300 (0.000 to 1.000) after round 3, of 32 questions"
    assert shown(tree, "held out") == told
    assert describe(NETWORK, (), 10, evaluations=rows[:1])["held_out"] == rows[:1]
    assert describe(NETWORK, (), 10)["held_out"] == []


def shown(tree: dict, name: str) -> str:
    console = Console(record=True, width=200, file=StringIO())
    console.print(*render(tree, 200), sep="\n")
    (line,) = [line for line in console.export_text().splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


@pytest.mark.slow
def test_the_doctor_asks_the_node_that_runs_there(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{}")
    checks = {check.name: check for check in examine_node(folder)}
    seen = checks["reached"]
    assert not seen.ok and not seen.needed and "cannot be reached" in seen.text and "forward that port" in seen.do
    assert checks["peers"].ok
    assert checks["versions"].text == f"peers run [red]\\x1b[2J\\r\\nagent at 1; this is {agent()}"  # nothing that acts
    assert list(examine_node(tmp_path / "elsewhere")) == []


def test_a_node_that_nobody_admits_says_why() -> None:
    console = Console(record=True, width=200, file=StringIO())
    console.print(*render(state() | {"peers": [], "refusal": "invite_expired"}, 200), sep="\n")
    assert "do not admit this node: invite_expired" in console.export_text()


def test_a_person_is_told_of_another_process_with_the_same_key() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(*render(state() | {"twin": "tcp://192.0.2.7:4001"}, 200), sep="\n")
    assert isinstance(console.file, StringIO)
    assert "another process runs with this node's key, at tcp://192.0.2.7:4001" in console.file.getvalue()
