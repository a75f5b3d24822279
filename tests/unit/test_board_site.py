"""A board's pages: what they say, that no peer's text becomes markup, and how they may be kept."""

import asyncio
import csv
import io
import json
import random
import re
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from html.parser import HTMLParser

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from node.board import svg
from node.board.history import CurvePoint, Remembered
from node.board.site import FRESH_S, PART_BYTES, _cell, in_parts, make_site
from node.board.view import MAX_SIGNERS_SHOWN, BoardView, Rollouts, ShownAnswer, ShownRollout, ago, day, lessons_of
from node.rollouts.group import Episode, Group, one_turn
from node.tasks import TaskKey
from node.telemetry.dashboard import server
from node.telemetry.names import short_name
from tests.fakes.board import NOW, node_of, view
from tests.waiting import wait_until

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>'\"&{{ 7 * 7 }}"
PAGES = ("/", f"/nodes/{node_of(0)}")
DATA = ("/swarm.json", "/nodes.csv", "/history.csv", "/taught.csv", "/rollouts.csv")
OF_NODE = (f"/nodes/{node_of(0)}.json", f"/nodes/{node_of(0)}/history.csv", f"/nodes/{node_of(0)}/badge.svg")


def client(shown: BoardView) -> TestClient:
    return TestClient(make_site(lambda: shown, lambda _: shown.curve, lambda: True))


def hostile() -> BoardView:
    """A swarm in which every text that a peer chooses is hostile."""
    shown = view()
    nodes = [node._replace(model=HOSTILE, agent=HOSTILE, rewards={HOSTILE: 0.5}) for node in shown.nodes]
    answers = [ShownAnswer(HOSTILE, 1.0, True), ShownAnswer("=1+1\x00\x1b[31m\u202e", 0.0, False)]
    rollouts = [ShownRollout(NOW, node_of(0), HOSTILE, HOSTILE, HOSTILE, answers)]
    return shown._replace(nodes=nodes, rollouts=rollouts)


class Tags(HTMLParser):
    """The tags and the attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_the_swarm_its_nodes_who_taught_whom_and_rollouts() -> None:
    text = client(view()).get("/").text
    shown = view()
    assert "<h1>riddles</h1>" in text
    for node in shown.nodes:
        assert short_name(node.id) in text
    assert text.count('class="curve"') == 2
    assert "What is 3 + 7?" in text
    assert 'class="answer right"' in text
    assert 'class="answer wrong"' in text
    assert "gossamer join gossamer://riddles/example" in text
    assert text.index("Nodes now") < text.index(short_name(shown.nodes[0].id)) < text.index("Nodes of the past")


def test_each_number_of_a_page_is_what_it_says() -> None:
    """Of four nodes that are here and one that is not; by standing the second is the median."""
    a, b, c, d, past = (node_of(number) for number in range(5))
    said = [
        Remembered(a, NOW - 90_000, NOW - 60, "v1", "m1", 1000, 0.1, 0.2, {"sums": 0.11}, {b: 3.0}, 0.25),
        Remembered(b, NOW - 90_000, NOW - 130, "v2", "m2", 2000, 0.3, 0.4, {"sums": 0.33}, {a: 1.5, c: 0.5}, 0.5),
        Remembered(c, NOW - 90_000, NOW - 3700, "v3", "m3", 3000, 0.5, 0.6, {"sums": 0.55}, {}, 0.125),
        Remembered(d, NOW - 90_000, NOW - 60, "v4", "m4", 4000, None, None, {}, {a: 9.0}, 0.0),
        Remembered(past, NOW - 900_000, NOW - 90_000, "v5", "m5", 9000, 0.9, 0.9, {"sums": 0.99}, {}, 0.75),
    ]
    swarm = view().swarm._replace(tasks=[("sums", 2), ("days", 1)])
    curve = [CurvePoint(int(NOW) - 60, 60, 4, 0.7, 0.8), CurvePoint(int(NOW), 60, 4, 0.31, 0.41)]
    shown = BoardView(
        swarm, NOW, 5400.0, said, frozenset((a, b, c, d)), frozenset([a]), False, lessons_of(said, [a]), curve, []
    )
    site = client(shown)
    page = site.get("/").text
    tiles = [" ".join(re.sub("<.*?>", " ", entry).split()) for entry in re.findall("<li>(.*?)</li>", page)]
    assert tiles == ["4 nodes now", "0.310 reward", "0.410 held-out accuracy", "2,000 rounds of the median node"]
    assert "reported in the last 90 minutes" in page
    rows = [tuple(re.sub("<.*?>", "", cell).strip() for cell in row) for row in rows_of(page)]
    first = day(NOW - 90_000)
    assert rows == [
        (f"{short_name(a)} (seed)", "25.0 %", first, "1 minute ago", "0.100", "0.200", "1000", "m1", "v1"),
        (short_name(b), "50.0 %", first, "2 minutes ago", "0.300", "0.400", "2000", "m2", "v2"),
        (short_name(c), "12.5 %", first, "1 hour ago", "0.500", "0.600", "3000", "m3", "v3"),
        (short_name(d), "0.0 %", first, "1 minute ago", "–", "–", "4000", "m4", "v4"),
        (short_name(b), short_name(a), "25.0 %", "3.0"),  # a seed's word counts in full
        (short_name(a), short_name(b), "50.0 %", "1.5"),
        (short_name(c), short_name(b), "50.0 %", "0.5"),
        (short_name(a), short_name(d), "0.0 %", "9.0"),
        ("sums", "2", "0.330"),
        ("days", "1", "–"),
        (short_name(past), "75.0 %", day(NOW - 900_000), "1 day ago", "0.900", "0.900", "9000", "m5", "v5"),
    ]
    weights = [float(entry["weight"]) for entry in csv.DictReader(io.StringIO(site.get("/taught.csv").text))]
    assert weights == [1.0, 0.375, 0.125, 0.0]  # the part of a learner's groups, times its standing
    node = site.get(f"/nodes/{a}").text
    tiles = [" ".join(re.sub("<.*?>", " ", entry).split()) for entry in re.findall("<li.*?>(.*?)</li>", node)]
    assert tiles == [
        "25.0 % standing, a seed",
        "0.100 reward, its claim",
        "0.200 held-out accuracy, its claim",
        "1,000 rounds, its claim",
    ]
    assert "<dt>sums</dt><dd>0.110</dd>" in node
    assert [tuple(re.sub("<.*?>", "", cell).strip() for cell in row) for row in rows_of(node)] == [
        (short_name(b), "1.5"),  # whom it taught
        (short_name(d), "9.0"),
        (short_name(b), "3.0"),  # who taught it
    ]


def rows_of(page: str) -> list[list[str]]:
    """Return the cells of all tables' bodies, row by row."""
    bodies = re.findall("<tbody>(.*?)</tbody>", page, re.DOTALL)
    return [
        re.findall("<t[hd].*?>(.*?)</t[hd]>", row)
        for body in bodies
        for row in re.findall("<tr>(.*?)</tr>", body, re.DOTALL)
    ]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole_without_scripts_and_styles_of_its_own(path: str) -> None:
    answer = client(view()).get(path)
    tags = Tags(answer.text)
    assert tags.open == []
    assert not tags.found & {"script", "style", "iframe", "form", "object"}
    assert not {name for name in tags.attributes if name.startswith("on") or name == "style"}
    assert set(re.findall(r'(?:src|href)="([^"]*)"', answer.text)) <= {
        *("/", "/board.css", "#main", *DATA, *OF_NODE, *PAGES),
        *(f"/nodes/{node.id}" for node in view().nodes),
    }


@pytest.mark.parametrize("path", PAGES)
def test_no_text_of_a_peer_becomes_markup(path: str) -> None:
    plain, text = client(view()).get(path).text, client(hostile()).get(path).text
    assert Tags(text).found <= Tags(plain).found
    assert Tags(text).attributes <= Tags(plain).attributes
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_a_node_of_some_standing_cannot_claim_the_swarms_rounds() -> None:
    shown = view()
    liar = shown.nodes[3]._replace(rounds=2**48)
    text = client(shown._replace(nodes=[*shown.nodes[:3], liar, *shown.nodes[4:]])).get("/").text
    tile = re.search(r"<b>([0-9,]+)</b> rounds", text)
    assert tile is not None
    assert int(tile[1].replace(",", "")) in {node.rounds for node in shown.nodes}


def test_what_a_node_says_of_itself_is_marked_as_its_claim() -> None:
    shown = view()
    text = client(hostile()).get("/").text
    cells = re.findall(r"<td([^>]*)>[^<]*&lt;script", text)
    assert len(cells) == 2 * len(shown.nodes)
    assert all("claim" in cell for cell in cells)
    tree = client(shown).get("/swarm.json").json()
    assert {"model", "reward", "rounds"} <= tree["nodes"][0]["says_of_itself"].keys()
    assert not {"model", "reward", "rounds"} & tree["nodes"][0].keys()


@pytest.mark.parametrize("path", [*PAGES, *DATA, *OF_NODE, "/board.css"])
def test_everything_may_be_kept_for_a_while_and_runs_no_script(path: str) -> None:
    answer = client(hostile()).get(path)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == f"public, max-age={FRESH_S}"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; img-src 'self';")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_all_of_it_is_there_as_data() -> None:
    shown = view()
    site = client(shown)
    tree = json.loads(site.get("/swarm.json").text)
    assert [node["id"] for node in tree["nodes"]] == [node.id for node in shown.nodes]
    assert sum(len(entry["taught_by"]) for entry in tree["nodes"]) == len(shown.lessons)
    tables = {path: list(csv.DictReader(io.StringIO(site.get(path).text))) for path in DATA[1:]}
    assert [len(table) for table in tables.values()] == [20, 72, len(shown.lessons), 16]
    assert float(tables["/nodes.csv"][0]["standing"]) == shown.nodes[0].standing
    assert site.get(OF_NODE[0]).json()["id"] == node_of(0)


def test_no_cell_of_a_table_is_a_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(client(hostile()).get("/rollouts.csv").text)))
    assert rows[1]["answer"].startswith("'=1+1")
    assert rows[0]["answer"] == HOSTILE


@pytest.mark.parametrize("text", ["=1+1", " =1+1", "\n=1+1", "\t=2", "＝1+1", "\u00a0@x", "-2"])
def test_a_cell_that_begins_like_a_formula_gets_a_quote(text: str) -> None:
    assert _cell(text) == f"'{text}"
    assert (_cell("1 = 1"), _cell(-2.0), _cell("")) == ("1 = 1", -2.0, "")


def test_an_answer_is_sent_in_parts_and_who_is_too_slow_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def taken(answer: bytes) -> list[bytes]:
        return [part async for part in in_parts(answer)]

    answer = random.Random(1).randbytes(2 * PART_BYTES + 1)
    assert b"".join(parts := asyncio.run(taken(answer))) == answer
    assert [len(part) for part in parts] == [PART_BYTES, PART_BYTES, 1]
    monkeypatch.setattr("node.board.site.ANSWER_S", -1.0)
    assert asyncio.run(taken(answer)) == []


def test_lines_of_liars_are_not_drawn_and_come_last() -> None:
    shown = view()
    no_standing = {node.id for node in shown.nodes if node.standing == 0 and node.id not in shown.seeds}
    assert len(no_standing) >= 5
    weights = [lesson.weight for lesson in shown.lessons]
    assert weights == sorted(weights, reverse=True)
    assert {lesson.weight for lesson in shown.lessons if lesson.learner in no_standing} == {0.0}
    text = client(shown).get("/").text
    ids = {node.id for node in shown.nodes if node.id in shown.here}
    drawn = [lesson for lesson in shown.lessons if lesson.weight > 0 and {lesson.teacher, lesson.learner} <= ids]
    assert text.count('class="edge"') == len(drawn)


def test_a_badge_tells_a_nodes_standing() -> None:
    one = view().nodes[0]
    answer = client(view()).get(f"/nodes/{one.id}/badge.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert f"standing {100 * one.standing:.1f} % in riddles" in answer.text


@pytest.mark.parametrize("path", ["/nodes/nobody", "/nodes/%3Cscript%3E/badge.svg", "/elsewhere"])
def test_there_is_no_other_page(path: str) -> None:
    assert client(view()).get(path).status_code == 404


def test_nothing_is_taken_in() -> None:
    assert client(view()).post("/").status_code == 405


def test_an_answer_is_made_once_for_a_view() -> None:
    shown, asked = view(), []
    site = TestClient(make_site(lambda: shown, lambda node: asked.append(node) or shown.curve, lambda: True))
    first = site.get(PAGES[1]).content
    assert site.get(PAGES[1]).content == first
    assert len(asked) == 1
    shown = view(now=NOW + 3600)
    assert site.get(PAGES[1]).content != first
    assert len(asked) == 2


def test_health_is_the_networks() -> None:
    for well, code in ((True, 200), (False, 503)):
        shown = view()
        site = TestClient(make_site(lambda: shown, lambda _: (), lambda: well))  # noqa: B023
        assert site.get("/healthz").status_code == code


@pytest.mark.slow
def test_connections_that_ask_for_nothing_whole_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    site = make_site(view, lambda _: view().curve, lambda: True)
    with server.serve_app(site, "127.0.0.1", 0, "") as (port, link):
        said = (b"", b"GET / HTTP/1.1\r\nhost:", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET / ")
        idle = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in said]
        for entry, text in zip(idle, said, strict=True):
            entry.sendall(text)
        for entry in idle:
            while entry.recv(4096):
                pass
            entry.close()
        assert urllib.request.urlopen(link, timeout=30).status == 200


@pytest.mark.slow
def test_who_does_not_read_an_answer_keeps_nobody_out_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    large = Starlette(routes=[Route("/", lambda _: Response(bytes(32 << 20))), Route("/small", lambda _: Response())])
    with server.serve_app(large, "127.0.0.1", 0, "") as (port, link), socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")

        def is_served() -> bool:
            with suppress(urllib.error.HTTPError):
                return urllib.request.urlopen(f"{link}small", timeout=30).status == 200
            return False

        assert reader.recv(1)
        wait_until(is_served, 30, "the connection of who reads nothing to be gone")


def test_a_swarm_without_nodes_or_reports_has_a_page() -> None:
    empty = view()._replace(nodes=[], here=frozenset(), lessons=[], curve=[], rollouts=[])
    text = client(empty).get("/").text
    assert "No node has reported yet. Each reports once in 5 minutes." in text
    silent = empty._replace(swarm=empty.swarm._replace(reports_s=0, invite=""))
    assert "founded without <code>--reports</code>" in client(silent).get("/").text


def test_the_newest_rollouts_of_each_signer_are_kept_for_some_minutes() -> None:
    kept = Rollouts()
    task = TaskKey("sums", 1, "aa")
    for number in range(10):
        made = tuple(one_turn(f"{number}" * 700, True, reward) for reward in (0.5, 0.0, 1.0))
        kept.add("a", Group(task, number, "1+1=", made, "model", 0), NOW + number)
    kept.add("b", Group(task, 1, "1+2=", made[:2], "model", 0), NOW - 10)
    found = kept.newest(NOW + 20)
    assert [(entry.node, entry.at) for entry in found] == [
        ("a", NOW + 9),
        ("b", NOW - 10),
        ("a", NOW + 8),
        ("a", NOW + 7),
    ]
    assert [answer.reward for answer in found[0].answers] == [1.0, 0.0]
    assert len(found[0].answers[0].text) == 601
    assert kept.newest(NOW + 3600) == []


def test_an_episode_is_shown_turn_by_turn() -> None:
    kept = Rollouts()
    won = Episode(("10", "too low", "13"), True, 1.0)
    long = Episode(("1" * 700, "2" * 700, "3" * 700), True, 0.0)
    kept.add("a", Group(TaskKey("builtin/guess", 1, ""), 1, "#7: 10-16=", (won, long), "model", 0), NOW)
    found = kept.newest(NOW)
    assert [len(text) for text in found[0].answers[1].texts] == [201] * 3
    site = client(view()._replace(rollouts=found))
    assert "</b> 10 <i>too low</i> 13</pre>" in site.get("/").text
    (row, _) = csv.DictReader(io.StringIO(site.get("/rollouts.csv").text))
    assert (row["before"], row["answer"]) == ("10\ntoo low", "13")
    assert site.get("/swarm.json").json()["rollouts"][0]["answers"][0]["before"] == ["10", "too low"]


def test_rollouts_of_made_up_identities_push_out_none_of_a_node_with_standing() -> None:
    kept = Rollouts()
    kept.trusted = frozenset({"honest"})
    made = Group(TaskKey("builtin/sums", 2, ""), 1, "1+1=", (one_turn("2", True, 1.0),) * 2, "model", 0)
    for number, node in enumerate(["honest", *(f"liar{n}" for n in range(2 * MAX_SIGNERS_SHOWN))]):
        kept.add(node, made, NOW + number / 10)
    assert [entry.node for entry in kept.newest(NOW + 60)][:2] == ["honest", f"liar{2 * MAX_SIGNERS_SHOWN - 1}"]


@pytest.mark.parametrize(("value", "top"), [(0.03, 0.04), (1.0, 1.0), (1.01, 2.0), (0.62, 0.8), (900.0, 1000.0)])
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    assert svg.nice(value) == pytest.approx(top)


def test_a_curve_of_one_point_or_of_nothing_but_zeros_is_drawn() -> None:
    for points in ([(NOW, 0.5)], [(NOW, 0.0), (NOW + 60, 0.0)], [(NOW, -5.0), (NOW + 1e6, -4.0)]):
        assert "nan" not in svg.plot(points, "Reward")


def test_what_is_drawn_is_escaped() -> None:
    for drawing in (
        svg.plot([(NOW, 1.0)], HOSTILE),
        svg.graph([("a", HOSTILE, 0.5), ("b", "b", 0.0)], [("a", "b", 1.0)]),
        svg.badge(HOSTILE, HOSTILE),
    ):
        assert "<script" not in drawing
        assert "<img" not in drawing


def test_how_long_ago() -> None:
    assert [ago(seconds) for seconds in (5, 60, 7300, 90000, 5e5)] == [
        "just now",
        "1 minute ago",
        "2 hours ago",
        "1 day ago",
        "5 days ago",
    ]
