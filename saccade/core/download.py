"""Files from the network: into a cache, resumed where they were cut off, checked before anything reads them."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from saccade.core.errors import SaccadeError
from saccade.core.files import sha256_of

CHUNK = 1 << 18
TIMEOUT = 60.0  # seconds without a byte


class Unreachable(SaccadeError):
    """An address that gives no file, or not all of it."""


class WrongHash(SaccadeError):
    """A file that is not the one it should be."""


def cache_folder() -> Path:
    """SACCADE_CACHE or ~/.cache/saccade."""
    return Path(os.environ.get("SACCADE_CACHE") or Path.home() / ".cache" / "saccade")


def place(url: str) -> Path:
    """Where the file of an address lies in the cache, in a folder of its own: many a file is called model.pth."""
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    return cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def fetch(url: str, sha256: str | None, *, folder: Path | None = None) -> Path:
    """The file at an http, https or file address, downloaded into `folder` unless it is there already.

    The default folder is the address's own in the cache, SACCADE_CACHE or ~/.cache/saccade. A file stands under its
    name only when it is whole and has the hash `sha256` (or such first digits), if one is given; until then it is
    `<name>.part`, and the next call goes on from there. Processes that want the same file wait for one of them.

    Raises Unreachable for an address that does not answer or answers with a page, and for a download cut off; WrongHash
    for a wrong hash: that file is removed. Both are SaccadeErrors.
    """
    address = urlsplit(url)
    name = Path(unquote(address.path)).name
    if address.scheme not in ("http", "https", "file") or not name:
        raise SaccadeError(f"{url}: not the address of a file; give http://, https:// or file://")
    folder = folder or place(url).parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with FileLock(folder / f".{name}.lock"):
        whole = path if path.is_file() else _download(url, folder / f"{name}.part")
        if sha256 is not None and not (found := sha256_of(whole)).startswith(sha256.lower()):
            whole.unlink()
            raise WrongHash(f"{url}: its sha256 is {found}, not {sha256}; removed, check where it comes from")
        os.replace(whole, path)
    return path


def _download(url: str, part: Path) -> Path:
    """Completes `part`, and shows how far it is when a person watches."""
    start = part.stat().st_size if part.is_file() else 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        request = Request(url, headers={"User-Agent": "saccade"} | ({"Range": f"bytes={start}-"} if start else {}))
        with urlopen(request, timeout=TIMEOUT) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise Unreachable(f"{url}: answers with a page, not a file; open it in a browser, then "
                                  "`saccade weights import FILE`")
            if answer.status != 206:  # the whole file, from its beginning
                start = 0
            length = answer.headers["Content-Length"]
            total = start + int(length) if length else None
            progress = Progress(*columns, TimeRemainingColumn(), console=console)
            shown = progress if console.is_terminal else nullcontext()  # a disabled one of rich 13 ends in a blank line
            with shown, part.open("ab" if start else "wb") as file:
                bar = progress.add_task(part.stem, total=total, completed=start)
                while block := answer.read(CHUNK):
                    file.write(block)
                    progress.advance(bar, len(block))
                file.flush()
                os.fsync(file.fileno())
    except SaccadeError:
        raise
    except HTTPError as problem:
        problem.close()
        if problem.code == 416 and start:  # nothing comes after `start`: what is there is of another file
            part.unlink()
            return _download(url, part)
        raise Unreachable(f"{url}: the server says {problem.code} {problem.reason}; check the address") from None
    except (OSError, HTTPException) as problem:
        raise Unreachable(f"{url}: {problem}; check the connection and call again, it goes on from there") from problem
    if total is not None and part.stat().st_size != total:
        size = part.stat().st_size
        raise Unreachable(f"{url}: cut off at {size} of {total} bytes; call again, it goes on from there")
    return part
