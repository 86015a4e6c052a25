"""A headless browser (playwright and chromium), to take the pictures of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"


@contextmanager
def browser_page(width: int, scale: float = 1.0) -> Iterator[Page]:
    """An empty page, `width` x 900 pixels of CSS, each drawn as `scale` pixels."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport={"width": width, "height": 900}, device_scale_factor=scale)
        browser.close()
