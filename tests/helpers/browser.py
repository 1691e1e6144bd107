"""A real browser for the tests of the report page: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

READY = "html[data-explorer=ready]"


def find_chromium() -> str:
    """CIFAR_CHROMIUM, or Chromium on the PATH, or ""."""
    return os.environ.get("CIFAR_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A Chromium without a window. Skips the test where there is none, and says so."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="PLAYWRIGHT IS NOT INSTALLED: the page is not tried")
    if not (chromium := find_chromium()):
        pytest.skip("NO CHROMIUM: the page is not tried in a browser; install it, or name it by CIFAR_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class OpenPage:
    """A page that is open: `page` is Playwright's; `messages` and `requests` are what it said and asked for."""

    def __init__(self, browser: Any, url: str, *, width: int = 1400, height: int = 900, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector(READY, timeout=20_000)
            self.settle()

    def settle(self) -> None:
        """Wait until what was changed is drawn, and the address is written."""
        self.page.evaluate("new Promise((r) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(r)), 130))")

    def run(self, script: str, argument: Any = None) -> Any:
        """Run JavaScript in the page; `view` is the explorer's."""
        found = self.page.evaluate(f"async (argument) => {{ const view = globalThis.explorer.view; {script} }}", argument)
        self.settle()
        return found

    def close(self) -> None:
        self.context.close()


def page_url(path: Path) -> str:
    return path.resolve().as_uri()
