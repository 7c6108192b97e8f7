"""Chromium without a window, and what the pages in it ask other servers for."""

import json
import os
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from selenium import webdriver


def need_programs(*names: str) -> list[str]:
    """Their paths. Whoever has not installed them does without the tests of pages; CI does not."""
    paths = [shutil.which(name) for name in names]
    if not all(paths):
        message = "Tests of pages need Chromium and npm: apt-get install chromium chromium-driver npm"
        (pytest.fail if "CI" in os.environ else pytest.skip)(message)
    return [path for path in paths if path]


def start_browser() -> webdriver.Chrome:
    """Without a window, of 1280 x 900 pixels."""
    programs = need_programs("chromium", "chromedriver")  # named, for else Selenium looks for others in the network
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--window-size=1280,900")
    options.add_argument("--disable-dev-shm-usage")
    for name in ("background-networking", "component-update", "sync"):  # it would ask its maker's servers
        options.add_argument(f"--disable-{name}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root has none of
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = programs[0]
    return webdriver.Chrome(options, webdriver.ChromeService(programs[1]))


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """A browser whose elements are waited for up to 20 seconds."""
    driver = start_browser()
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


def asked_hosts(browser: webdriver.Chrome) -> set[str]:
    """Hosts of all that pages have asked for since the last call; the log is then empty."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [x["params"]["request"]["url"] for x in messages if x["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}
