"""The documents' site in a real browser, from its folder: what `make docs` built, which `make browser` runs first."""

from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(200)]
SITE = Path(__file__).parents[2] / "site"


@pytest.mark.parametrize("page", ["index.html", "tutorials/first-swarm.html"])
def test_words_are_found_without_a_server(browser: Chrome, page: str) -> None:
    browser.get((SITE / page).as_uri())
    browser.execute_script("document.querySelector('label[for=__search]').click()")
    search = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    wait_until(lambda: search.is_displayed() and search.is_enabled(), 90, "the field to search in")
    search.send_keys("graylisted")
    links = "return [...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)"
    found = wait_until(lambda: browser.execute_script(links), 90, "what is found")
    assert any(link.startswith(f"{SITE.as_uri()}/reference/metrics.html") for link in found)
