"""A page in headless Chromium that reaches this machine alone, for tests marked `browser`."""

import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Watched:
    """A page, and the addresses outside this machine that it asked for: all were refused."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.refused: list[str] = []
        self.failed: list[str] = []
        page.route("**/*", self._route)
        page.on("requestfailed", lambda request: self.failed.append(request.url))

    def _route(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob") or address.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            self.refused.append(route.request.url)
            route.abort()


@pytest.fixture
def browser_page() -> Iterator[Watched]:
    """A new page of 1,600 x 1,000 pixels."""
    from playwright.sync_api import sync_playwright  # GPU machines, which read conftest.py, have none

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        try:
            yield Watched(browser.new_page(viewport={"width": 1600, "height": 1000}))
        finally:
            browser.close()
