"""Chromium without a window, and what the pages in it ask other servers for."""

import json
import os
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from selenium import webdriver


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """A browser with 1280 x 900 pixels; elements are waited for up to 20 seconds."""
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--window-size=1280,900")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root has none of
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = shutil.which("chromium")  # named, for else Selenium looks for others in the network
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


def asked_hosts(browser: webdriver.Chrome) -> set[str]:
    """Hosts of all that pages have asked for since the last call; the log is then empty."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [x["params"]["request"]["url"] for x in messages if x["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}
