"""The dashboard: what its stream says, and who may read it."""

import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import ObserveConfig
from node.metrics import Display, shown_in
from node.telemetry.dashboard.app import Site
from node.telemetry.dashboard.feed import MAX_POINTS, Feed, thinned
from node.telemetry.dashboard.server import Served, serve
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import MetricsLog
from node.telemetry.names import short_name

TOKEN = "s3cret"


def round_row(number: int, **extra: object) -> dict[str, object]:
    return {"round": number, "reward": number / 10, "swarm/taught_by": {"ann": 2, "bob": 1}, **extra}


def site(folder: Path) -> Site:
    state = {"title": "<script>", "nodes": []}
    return Site({"n0": folder}, lambda: {"round": 7}, lambda: state, lambda: b"gossamer_round 7\n", lambda: True)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(ObserveConfig(), site(tmp_path)) as served:
        yield served


def get(port: int, path: str, **headers: str) -> tuple[int, HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer, answer.read().decode()
    finally:
        connection.close()


def events(port: int, count: int) -> list[tuple[str, object]]:
    """Return the first `count` events of the stream."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/events")
        answer = connection.getresponse()
        found: list[tuple[str, object]] = []
        while len(found) < count:
            line = answer.readline().decode().strip()
            if line.startswith("event: "):
                found.append((line.removeprefix("event: "), json.loads(answer.readline().decode()[6:])))
        return found
    finally:
        connection.close()


# --- the feed ---


def test_a_feed_says_what_there_is_and_then_what_is_new(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(round_row(1), round_row(2))
    feed = Feed({"n0": tmp_path})
    [(kind, first)] = feed.poll()
    assert (kind, first["reset"], [row["round"] for row in first["rows"]]) == ("rows", True, [1, 2])
    assert feed.poll() == []
    log.append(round_row(3))
    [(_, news)] = feed.poll()
    assert (news["reset"], [row["round"] for row in news["rows"]]) == (False, [3])


@pytest.mark.slow
def test_the_page_draws_each_metric_that_is_declared_for_it_and_has_its_values(tmp_path: Path, served: Served) -> None:
    declared = {metric.name: metric for metric in shown_in(Display.DASHBOARD)}
    values = {name: {"ann": 1} if metric.label else 0.5 for name, metric in declared.items()}
    MetricsLog(tmp_path / "metrics.jsonl").append({"round": 1, **values})
    MetricsLog(tmp_path / EVALUATIONS_FILE).append({"round": 1, **{name.removeprefix("eval/"): 0.5 for name in values}})
    curves = json.loads(get(served.port, "/curves")[2])
    assert sorted(key for curve in curves for key in curve["keys"]) == sorted(
        name for name, metric in declared.items() if not metric.label
    )
    assert all(declared[key].caption in curve["title"].lower() for curve in curves for key in curve["keys"])
    assert "Own groups; dashed: external groups" in [curve["title"] for curve in curves]
    (_, rows), (_, scores) = events(served.port, 2)
    for curve in curves:
        (row,) = (scores if curve["scores"] else rows)["rows"]
        assert {key: row[key] for key in curve["keys"]} == dict.fromkeys(curve["keys"], 0.5)


def test_a_node_that_resumed_replaces_what_it_had_said(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(*(round_row(number) for number in range(1, 6)))
    feed = Feed({"n0": tmp_path})
    feed.poll()
    log.rewind(2)
    [(_, again)] = feed.poll()
    assert (again["reset"], [row["round"] for row in again["rows"]]) == (True, [1, 2])


def test_what_a_relay_counts_is_no_round(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "swarm/peers": 3}\n')
    feed = Feed({"relay": tmp_path})
    assert feed.poll() == []


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 20))
def test_thinning_loses_no_group_and_keeps_the_last_round(counts: list[int], points: int) -> None:
    rows = [{"round": number + 1, "reward": 1.0, "swarm/taught_by": {"ann": n}} for number, n in enumerate(counts)]
    thin = list(thinned(rows, points))
    assert len(thin) <= points
    assert sum(row["swarm/taught_by"]["ann"] for row in thin) == sum(counts)
    assert [row["round"] for row in thin][-1:] == [len(counts)] * bool(counts)
    assert all(row["reward"] == 1.0 for row in thin)


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append(*(round_row(number) for number in range(1, 4 * MAX_POINTS)))
    feed = Feed({"n0": tmp_path})
    [(_, first)] = feed.poll()
    assert MAX_POINTS / 2 < len(first["rows"]) <= MAX_POINTS


# --- the server ---


@pytest.mark.slow
def test_the_page_lives_on_a_stream_of_events(served: Served, tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append(round_row(1))
    MetricsLog(tmp_path / "rollouts.jsonl").append({"round": 1, "whose": "own", "text": "<b>42</b>"})
    rows, rollouts, state = events(served.port, 3)
    assert (rows[0], rollouts[0], state[0]) == ("rows", "rollouts", "state")
    assert rollouts[1] == [{"round": 1, "whose": "own", "text": "<b>42</b>", "node": "n0"}]


@pytest.mark.slow
def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script_of_a_peers(served: Served) -> None:
    status, answer, page = get(served.port, "/")
    assert status == 200
    assert "http://" not in page and "https://" not in page and "<script>" not in page
    assert "default-src 'self'" in (answer.getheader("content-security-policy") or "")
    for path in ("page.js", "page.css", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"):
        assert get(served.port, f"/static/{path}")[0] == 200
    script = get(served.port, "/static/page.js")[2]
    assert not any(sink in script for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/", "/status", "/metrics", "/events", "/refusals", "/curves", "/static/page.js", "/healthz"]
)
@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Host": "attacker.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),  # an image, which has no origin
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ],
)
def test_a_page_of_another_site_reads_nothing(served: Served, path: str, headers: dict[str, str], refused: int) -> None:
    assert get(served.port, path, **headers)[0] == refused


@pytest.mark.slow
def test_its_own_names_and_origin_are_welcome(served: Served) -> None:
    for host in ("localhost", f"localhost:{served.port}", f"127.0.0.1:{served.port}", "[::1]:80"):
        assert get(served.port, "/status", Host=host, Origin=f"http://{host}")[0] == 200
    for site in ("same-origin", "none"):
        assert get(served.port, "/status", **{"Sec-Fetch-Site": site})[0] == 200
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}  # a link to the page in a chat
    assert [get(served.port, path, **followed)[0] for path in ("/", "/status", "/events")] == [200, 403, 403]


@pytest.mark.slow
def test_beyond_loopback_nobody_reads_without_the_token(tmp_path: Path) -> None:
    with serve(ObserveConfig(host="0.0.0.0"), site(tmp_path)) as served:  # that is the case
        assert len(served.token) >= 32 and served.link.endswith(f"?token={served.token}")
        for path in (
            "/",
            "/status",
            "/metrics",
            "/events",
            "/refusals",
            "/static/page.js",
            "/?token=wrong",
        ):
            assert get(served.port, path)[0] == 401
        assert get(served.port, "/healthz")[::2] == (200, "ok\n")
        assert get(served.port, "/status", Authorization=f"Bearer {served.token}")[0] == 200
        status, answer, _ = get(served.port, f"/?token={served.token}")
        assert (status, answer.getheader("location")) == (303, "/")
        for path in ("//evil.example/", "/\\evil.example/", "/status"):
            location = get(served.port, f"{path}?token={served.token}")[1].getheader("location") or ""
            assert location.startswith("/") and location[1] not in "/\\"
        cookie = answer.getheader("set-cookie") or ""
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert get(served.port, "/", Cookie=cookie.partition(";")[0])[0] == 200
        assert get(served.port, "/", Cookie="gossamer=wrong; \x01=2")[0] in (400, 401)


@pytest.mark.slow
def test_a_token_may_be_chosen(tmp_path: Path) -> None:
    with serve(ObserveConfig(token=TOKEN), site(tmp_path)) as served:
        assert get(served.port, "/status")[0] == 401
        assert get(served.port, "/status", Authorization=f"Bearer {TOKEN}")[0] == 200


@pytest.mark.slow
def test_those_who_say_nothing_hold_nobody_up(served: Served) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(300)]
    assert [get(served.port, "/status")[0] for _ in range(3)] == [200] * 3
    for metric in idle:
        metric.close()


@pytest.mark.slow
def test_a_node_whose_network_failed_is_not_well(tmp_path: Path) -> None:
    with serve(ObserveConfig(), site(tmp_path)._replace(well=lambda: False)) as served:
        assert get(served.port, "/healthz")[0] == 503


# --- names ---


@given(st.text())
def test_a_name_is_short_and_the_ids_alone(node_id: str) -> None:
    adjective, animal, number = short_name(node_id).split("-")
    assert adjective.isalpha() and animal.isalpha() and len(number) == 2
    assert short_name(node_id) == short_name(node_id)


def test_names_of_a_swarm_seldom_meet() -> None:
    names = {short_name(str(number)) for number in range(100)}
    assert len(names) >= 99


@pytest.mark.slow
def test_the_page_can_ask_what_a_refusal_means(served: Served) -> None:
    status, _, said = get(served.port, "/refusals")
    assert status == 200
    told = json.loads(said)
    assert told["forged"] == {"means": "a signature that does not hold", "blameless": False}
    assert told["too_surprising"]["blameless"] and "nobody's fault" in told["too_surprising"]["means"]


@pytest.mark.slow
def test_a_server_that_does_not_end_keeps_no_node_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Event()
    monkeypatch.setattr("node.telemetry.dashboard.server.STOP_S", 0.01)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: blocked.wait(60))
    with serve(ObserveConfig(), site(tmp_path)):
        began = time.monotonic()
    assert time.monotonic() - began < 30
    blocked.set()
