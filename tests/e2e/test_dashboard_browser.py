"""The dashboard in a real browser: a swarm learns, a node is killed, a peer's words stay words."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
LIMIT = 90.0
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1500"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "install Debian's packages chromium and chromium-driver"
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    browser = Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A swarm of two that learns; its folder and the link to its page."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from node.cli import main; main()", "swarm", "-n", "2", "--rounds", "100000"]
    command += ["--out", str(out), "--no-table", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/)", process.stdout.readline().strip())
            assert found is not None
            yield out, found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=LIMIT)


def cells(browser: Chrome, table: str) -> list[list[str]]:
    """Return the texts of a table's rows, its head apart."""
    rows = "[...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
    return browser.execute_script(f"return {rows}.map(row => [...row.cells].map(cell => cell.textContent))", table)


def test_a_person_sees_a_swarm_learn_and_a_node_die(browser: Chrome, run: tuple[Path, str]) -> None:
    out, link = run
    browser.get(link)
    wait_until(lambda: len(cells(browser, "taught")) == 2 and cells(browser, "taught")[1][-1] != "0", LIMIT, "teaching")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#plots canvas"), LIMIT, "a plot")
    states = {row[0]: row[2] for row in cells(browser, "nodes")}
    assert states == {"n0": "running", "n1": "running"}
    assert len(browser.find_elements(By.CSS_SELECTOR, "#graph circle")) == 2

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


def test_the_page_fits_a_phone(browser: Chrome, run: tuple[Path, str]) -> None:
    browser.set_window_size(500, 900)  # as narrow as the browser goes
    browser.get(run[1])
    wait_until(lambda: len(cells(browser, "nodes")) == 2, LIMIT, "the nodes")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#plots canvas"), LIMIT, "a plot")
    inside, page = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert page <= inside
