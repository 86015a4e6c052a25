"""Downloads from a server on this machine that can cut off, redirect, refuse ranges and lie."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from saccade.core import download
from saccade.core.download import fetch
from saccade.core.errors import SaccadeError

CONTENT = bytes(range(256)) * 4000  # more than one block
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/model.pth, /cut/... cut off unless resumed, /plain/... no ranges, /moved/..., /unknown/... no length, /page/...
    what people see, /slow/... in pieces, /stalled/... silent after a while unless resumed; /resolve/... as a hub."""

    asked: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append((self.path, wanted))
        kind, name = self.path.rpartition("/")[0].strip("/"), self.path.rpartition("/")[2]
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/{name}")
            self.end_headers()
            return
        if not name.startswith("model.pth"):
            self.send_error(404)
            return
        if kind == "page":
            self.answer(b"<!DOCTYPE html><html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and kind != "plain" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if kind != "unknown":
            self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        if kind == "slow":
            for place in range(start, len(CONTENT), 200_000):
                self.wfile.write(CONTENT[place : place + 200_000])
                time.sleep(0.05)
            return
        self.wfile.write(CONTENT[start : 600_000 if kind in ("cut", "stalled") and not start else None])
        if kind == "stalled" and not start:
            self.wfile.flush()
            time.sleep(0.6)

    def answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Handler, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def error(url: str, sha256: str | None, folder: Path) -> str:
    with pytest.raises(SaccadeError) as caught:
        fetch(url, sha256, folder=folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(url)
    return str(caught.value)


@pytest.mark.parametrize("path", ["/model.pth", "/moved/model.pth", "/unknown/model.pth", "/model.pth?download=1"])
@pytest.mark.parametrize("sha256", [HASH, HASH.upper(), HASH[:8], None])
def test_downloads_once(server: str, tmp_path: Path, path: str, sha256: str | None) -> None:
    folder = tmp_path / "new" / "folder"
    found = fetch(server + path, sha256, folder=folder)
    assert found == folder / "model.pth" and found.read_bytes() == CONTENT and files(folder) == ["model.pth"]
    asked = len(Handler.asked)
    assert fetch(server + path, sha256, folder=folder) == found
    assert len(Handler.asked) == asked


def test_the_cache_keeps_addresses_apart(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    one, other = fetch(f"{server}/model.pth", HASH), fetch(f"{server}/moved/model.pth", HASH)
    assert one != other and one.name == other.name == "model.pth"
    assert one.parents[1] == other.parents[1] == tmp_path / "cache"
    monkeypatch.delenv("SACCADE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(f"{server}/model.pth", HASH).is_relative_to(tmp_path / ".cache" / "saccade")


@pytest.mark.parametrize("sha256", [HASH, None])
def test_resumes_where_it_was_cut_off(server: str, tmp_path: Path, sha256: str | None) -> None:
    url = f"{server}/cut/model.pth"
    assert f"cut off at 600000 of {len(CONTENT)} bytes" in error(url, sha256, tmp_path)
    assert files(tmp_path) == ["model.pth.part"]
    assert fetch(url, sha256, folder=tmp_path).read_bytes() == CONTENT
    assert files(tmp_path) == ["model.pth"]
    assert Handler.asked == [("/cut/model.pth", None), ("/cut/model.pth", "bytes=600000-")]


@pytest.mark.parametrize("path", ["/plain/model.pth", "/model.pth"])
@pytest.mark.parametrize("left", [b"old" * 100, CONTENT, CONTENT + b"more"])
def test_starts_again_where_it_cannot_resume(server: str, tmp_path: Path, path: str, left: bytes) -> None:
    (tmp_path / "model.pth.part").write_bytes(left)
    if path == "/model.pth" and len(left) < len(CONTENT):  # a server that goes on in a file that is another by now
        assert "its sha256 is" in error(server + path, HASH, tmp_path)
    assert fetch(server + path, HASH, folder=tmp_path).read_bytes() == CONTENT
    assert files(tmp_path) == ["model.pth"]


def test_a_wrong_hash_removes_the_file(server: str, tmp_path: Path) -> None:
    message = error(f"{server}/model.pth", "0" * 64, tmp_path)
    assert HASH in message and "0" * 64 in message and files(tmp_path) == []
    (tmp_path / "model.pth").write_bytes(b"spoiled")
    assert "removed" in error(f"{server}/model.pth", HASH, tmp_path)
    assert fetch(f"{server}/model.pth", HASH, folder=tmp_path).read_bytes() == CONTENT


def test_addresses_that_give_nothing(server: str, tmp_path: Path) -> None:
    assert "the server says 404 Not Found; check the address" in error(f"{server}/absent.pth", None, tmp_path)
    assert "404" in error(f"{server}/moved/absent.pth", None, tmp_path)
    assert "check the connection" in error("http://127.0.0.1:9/model.pth", None, tmp_path)
    assert "No such file" in error((tmp_path / "absent.pth").as_uri(), None, tmp_path)
    for url in (f"{server}/", server, "ftp://127.0.0.1/model.pth", "model.pth", ""):
        assert "not the address of a file" in error(url, None, tmp_path)
    assert files(tmp_path) == []


def test_a_page_is_no_file(server: str, tmp_path: Path) -> None:
    assert "answers with a page, not a file" in error(f"{server}/page/model.pth", None, tmp_path)
    assert files(tmp_path) == []


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    assert fetch(f"{server}/slow/model.pth", HASH, folder=tmp_path / "slow").read_bytes() == CONTENT
    url = f"{server}/stalled/model.pth"
    assert "timed out; check the connection and call again" in error(url, HASH, tmp_path)
    assert files(tmp_path) == ["model.pth.part", "slow"]
    assert fetch(url, HASH, folder=tmp_path).read_bytes() == CONTENT
    assert Handler.asked[-1][1] in ("bytes=600000-", "bytes=524288-")  # what came before it fell silent is kept


def test_file_addresses(tmp_path: Path) -> None:
    source = tmp_path / "my weights.pth"
    source.write_bytes(CONTENT)
    found = fetch(source.as_uri(), HASH, folder=tmp_path / "cache")
    assert found == tmp_path / "cache" / "my weights.pth" and found.read_bytes() == CONTENT
    assert source.read_bytes() == CONTENT
    assert HASH in error(source.as_uri(), "0" * 64, tmp_path / "other") and files(tmp_path / "other") == []


def test_processes_wait_for_one_another(server: str, tmp_path: Path) -> None:
    found: list[bytes] = []
    fetchers = [
        threading.Thread(target=lambda: found.append(fetch(f"{server}/model.pth", HASH, folder=tmp_path).read_bytes()))
        for _ in range(4)
    ]
    for fetcher in fetchers:
        fetcher.start()
    for fetcher in fetchers:
        fetcher.join()
    assert found == [CONTENT] * 4 and len(Handler.asked) == 1


def test_progress_is_shown_only_to_a_person(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(f"{server}/model.pth", HASH, folder=tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that this is a terminal
    fetch(f"{server}/model.pth", HASH, folder=tmp_path / "watched")
    shown = capsys.readouterr()
    assert "model.pth" in shown.err and "MB" in shown.err and shown.out == ""
