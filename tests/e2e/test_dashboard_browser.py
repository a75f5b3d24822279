"""The dashboard in a real browser: a swarm learns, a node is killed, a peer's words stay words.

Its pictures in the documents are taken here: `make pictures` writes them anew.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from node.config import ObserveConfig
from node.telemetry.dashboard.app import Site
from node.telemetry.dashboard.server import serve
from tests.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
LIMIT = 90.0
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@contextmanager
def learning(out: Path, nodes: int, *settings: str) -> Iterator[str]:
    """A swarm that learns; the link to its page."""
    command = [sys.executable, "-c", "from node.cli import main; main()", "demo", "-n", f"{nodes}"]
    command += ["--rounds", "100000", "--out", str(out), "--no-table", "--seed", "1"]
    command += [f"--set={setting}" for setting in ("eval.every=0", *settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/)", process.stdout.readline().strip())
            assert found is not None
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=LIMIT)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A swarm of two; its folder and the link to its page."""
    with learning(tmp_path / "run", 2) as link:
        yield tmp_path / "run", link


def photographed(browser: Chrome, width: int, most: int, *, dark: bool) -> Image.Image:
    """Return what the page looks like on a screen of `width`, from its top down to `most` pixels."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": most, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wait_until(lambda: browser.execute_script("return innerWidth") == width, LIMIT, "the page's width")
    plots = "[...document.querySelectorAll('.plot:not([hidden])')]"
    fits = "one => one.querySelector('.uplot')?.clientWidth === Math.max(260, one.clientWidth)"
    drawn = f"return {plots}.length > 0 && {plots}.every({fits})"  # and in the colours, which were set before
    wait_until(lambda: browser.execute_script(drawn), LIMIT, "plots of that width")
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB").quantize(128)


def cells(browser: Chrome, table: str) -> list[list[str]]:
    """Return the texts of a table's rows, its head apart."""
    rows = "[...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
    return browser.execute_script(f"return {rows}.map(row => [...row.cells].map(cell => cell.textContent))", table)


def said(browser: Chrome) -> list[str]:
    """Return who says what of whom on the graph's lines."""
    lines = "[...document.querySelectorAll('#graph line')]"
    texts = browser.execute_script(f"return {lines}.map(line => line.textContent)")
    return [line.split(",")[0].split(" for ")[0] for text in texts for line in text.splitlines()]


def exchanged(row: list[str]) -> bool:
    """Whether a row of the table of peers tells of bytes sent and received."""
    return all(re.fullmatch(r"[1-9][\d.]* [kM]?B", size) for size in row[5:7])


def test_a_person_sees_a_swarm_learn_and_a_node_die(browser: Chrome, run: tuple[Path, str]) -> None:
    out, link = run
    browser.get(link)
    wait_until(lambda: len(cells(browser, "taught")) == 2 and cells(browser, "taught")[1][-1] != "0", LIMIT, "teaching")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#plots canvas"), LIMIT, "a plot")

    # What a node says of itself and its peers is a few seconds old: each part of the page comes when its answer does.
    running = [["n0", "running"], ["n1", "running"]]
    wait_until(lambda: [[row[0], row[2]] for row in cells(browser, "nodes")] == running, LIMIT, "both nodes' word")
    told = ["n0 of n1:", "n1 of n0:"]  # both ends' word on their connection, under the pointer
    wait_until(lambda: sorted(said(browser)) == told, LIMIT, "both ends' word on their connection")
    assert [len(browser.find_elements(By.CSS_SELECTOR, f"#graph {shape}")) for shape in ("line", "circle")] == [
        1,
        2,
    ]
    wait_until(lambda: [*map(exchanged, cells(browser, "peers"))] == [True] * 2, LIMIT, "bytes both ways")
    of, peer, _, state, _, _, _, score = cells(browser, "peers")[0][:8]
    assert (of, state, score) == ("n0", "well", "0") and peer

    explained = browser.execute_script("return fetch('refusals').then(answer => answer.json())")
    assert explained["forged"]["means"] == "a signature that does not hold"

    address = json.loads((out / "nodes" / "n1" / "observe.json").read_text())
    psutil.Process(address["pid"]).kill()
    wait_until(lambda: "restart" in cells(browser, "nodes")[1][2], 5.0, "the page to tell of the node that was killed")

    with (out / "nodes" / "n0" / "rollouts.jsonl").open("a") as file:
        row = {"round": 1, "whose": "mallory", "age": 0, "task": HOSTILE, "question": HOSTILE, "text": HOSTILE}
        file.write(json.dumps({**row, "reward": 1.0, "finished": True}) + "\n")
    search = browser.find_element(By.ID, "search")
    search.send_keys("onerror")
    wait_until(lambda: HOSTILE in browser.find_element(By.ID, "rollouts").text, LIMIT, "the hostile rollout")
    assert browser.title.endswith("gossamer")
    assert browser.find_elements(By.CSS_SELECTOR, "#rollouts img, #rollouts script") == []
    search.send_keys(Keys.TAB)  # what the keyboard reaches next is the next control
    assert browser.switch_to.active_element.get_attribute("id") == "whose"


def test_what_was_not_fit_to_teach_is_told_apart_from_what_was_rejected_and_that_nobody_is_left(
    browser: Chrome, tmp_path: Path
) -> None:
    peer = {"node": "b" * 32, "short_name": "bob", "agent": "g", "endpoint": None, "state": "well", "rtt_s": None}
    traffic = {"age_s": 1.0, "bytes_sent": 5, "bytes_received": 5, "score": 0.0}
    counters = {"live_peers": 1, "bytes_sent": 5, "bytes_received": 5, "items_sent": 3}
    status = {"node": "a" * 32, "short_name": "ann", "agent": "g", "round": 7, "rounds": None, "reward": 0.5}
    status |= {"round_s": 1.0, "weights": {}, "least_score": -20.0, "counters": counters, "peers": [peer | traffic]}
    status |= {"rejected": {"too_surprising": 100, "forged": 2, "over_long": 17}}

    def state() -> dict[str, object]:
        return {"title": "n0", "nodes": [{"name": "n0", "state": "running", "status": status}]}

    def is_shown(one: str) -> bool:
        return browser.find_element(By.ID, one).is_displayed()

    with serve(ObserveConfig(), Site({"n0": tmp_path}, dict, state, None, lambda: True)) as served:
        browser.get(served.link)
        wait_until(lambda: len(cells(browser, "unfit")) == 2, LIMIT, "what was not fit to teach")
        assert [row[:2] for row in cells(browser, "unfit")] == [["too_surprising", "100"], ["over_long", "17"]]
        assert cells(browser, "refused") == [["forged", "2", "a signature that does not hold"]]
        assert cells(browser, "nodes")[0][-2:] == ["117", "2"]
        assert is_shown("links") and is_shown("unfit-note") and not is_shown("refused-none")
        assert not is_shown("peers-none")
        status |= {"peers": [], "rejected": {}}
        wait_until(lambda: not is_shown("links"), LIMIT, "an empty list of peers to go")
        assert is_shown("peers-none") and is_shown("refused-none") and not is_shown("peers-note")
        assert not is_shown("unfit-note")


def test_the_page_fits_a_phone(browser: Chrome, run: tuple[Path, str]) -> None:
    browser.set_window_size(500, 900)  # as narrow as the browser goes
    browser.get(run[1])
    wait_until(lambda: len(cells(browser, "nodes")) == 2, LIMIT, "the nodes")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#plots canvas"), LIMIT, "a plot")
    inside, page = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert page <= inside


@pytest.mark.timeout(1000)
def test_pictures_for_the_documents_are_small_light_and_dark(browser: Chrome, tmp_path: Path) -> None:
    folder, rounds = Path(os.environ.get("PICTURES", tmp_path)), int(os.environ.get("PICTURES_ROUNDS", "1"))
    with learning(tmp_path / "demo", 3, "eval.every=20", "eval.count=8") as link:
        browser.get(link)
        reached = f"document.querySelector('#nodes tbody tr td:nth-child(4)')?.textContent.split(' ')[0] >= {rounds}"
        wait_until(lambda: browser.execute_script(f"return {reached}"), LIMIT + 3 * rounds, f"{rounds} rounds")
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#rollouts li"), LIMIT, "rollouts")
        said = r"3 of 3 nodes up · reward \S+ · held-out accuracy 0\.\d+ at first, 0\.\d+ now · \d+ groups from 3 peers"
        summary = browser.find_element(By.ID, "summary")
        wait_until(lambda: re.fullmatch(said, summary.text), LIMIT, "what the nodes learnt, and from whom")
        corners = []
        for name, width, dark in (("dashboard.png", 1240, False), ("dashboard-phone.png", 390, True)):
            picture = photographed(browser, width, 1480, dark=dark)
            picture.save(folder / name, optimize=True)
            assert picture.size == (width, 1480) and (folder / name).stat().st_size < 200_000
            corners.append(sum(picture.convert("RGB").getpixel((1, 1))))
        assert corners[0] > 600 > 150 > corners[1]
