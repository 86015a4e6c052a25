"""A page in headless Chromium, and whatever it complains of or asks the network for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
CALM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run", "--disable-quic"]

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium")


@dataclass
class Opened:
    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def is_calm_and_offline(self) -> bool:
        assert self.complaints == []
        assert all(request.startswith(("file://", "data:")) for request in self.requests), self.requests
        return True


@contextmanager
def opened(path: Path, width: int = 1280, scheme: str = "light") -> Iterator[Opened]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CALM)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        found = Opened(page)
        page.on("console", lambda message: found.complaints.append(message.text))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(path.as_uri())
        yield found
        browser.close()
