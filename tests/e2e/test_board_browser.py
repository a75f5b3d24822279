"""A board's pages in a real browser: wide and on a phone, light and dark, by keyboard; a peer's words stay words.

The picture in the documents is taken here: `make pictures` writes it anew.
"""

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from node.board.site import make_site
from node.board.view import BoardView
from node.telemetry.dashboard.server import serve_app
from tests.fakes.board import node_of, view

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@contextmanager
def board(shown: BoardView) -> Iterator[str]:
    app = make_site(lambda: shown, lambda _: shown.curve, lambda: True)
    with serve_app(app, "127.0.0.1", 0, "") as (_, link):
        yield link


def photographed(browser: Chrome, width: int, height: int, *, dark: bool) -> Image.Image:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


@pytest.mark.parametrize("path", ["", f"nodes/{node_of(0)}"])
@pytest.mark.parametrize("width", [390, 1240])
def test_a_page_fits_its_screen_light_and_dark(browser: Chrome, path: str, width: int) -> None:
    with board(view()) as link:
        browser.get(link + path)
        corners = [sum(photographed(browser, width, 800, dark=dark).getpixel((1, 1))) for dark in (False, True)]
        assert corners[0] > 600 > 150 > corners[1]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_reaches_the_content_tables_and_nodes(browser: Chrome) -> None:
    with board(view()) as link:
        nodes = [f"{link}nodes/{node.id}" for node in view().nodes if node.id in view().here]
        browser.get(link)
        reached = []
        for _ in range(4):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            active = browser.switch_to.active_element
            reached.append(active.get_attribute("href") or active.get_attribute("aria-label"))
    assert reached == [f"{link}#main", "Nodes now", *nodes[:2]]


def test_a_peers_words_stay_words(browser: Chrome) -> None:
    shown = view()
    nodes = [node._replace(model=HOSTILE, agent=HOSTILE, rewards={HOSTILE: 1.0}) for node in shown.nodes]
    rollouts = [
        rollout._replace(task=HOSTILE, question=HOSTILE, answers=[rollout.answers[0]._replace(text=HOSTILE)])
        for rollout in shown.rollouts
    ]
    with board(shown._replace(nodes=nodes, rollouts=rollouts)) as link:
        for path in ("", f"nodes/{nodes[0].id}"):
            browser.get(link + path)
            assert HOSTILE in browser.find_element(By.TAG_NAME, "main").text
            assert "riddles" in browser.title
            assert browser.find_elements(By.CSS_SELECTOR, "script, img:not([src$='badge.svg'])") == []


def test_a_long_name_of_a_task_leaves_room_for_what_it_names(browser: Chrome) -> None:
    shown = view()
    nodes = [node._replace(rewards={"x" * 128: 1.0}) for node in shown.nodes]
    with board(shown._replace(nodes=nodes)) as link:
        browser.get(f"{link}nodes/{nodes[0].id}")
        model = browser.find_element(By.CSS_SELECTOR, "dl dd")
        assert model.size["width"] > browser.execute_script("return innerWidth") / 3


def test_pictures_for_the_documents_are_small(browser: Chrome, tmp_path: Path) -> None:
    path = Path(os.environ.get("PICTURES", tmp_path)) / "board.png"
    with board(view()) as link:
        browser.get(link)
        photographed(browser, 1100, 1330, dark=False).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < 200_000
