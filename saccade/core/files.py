"""Files that are there either as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text beside `path`, then put it in place in one step."""
    fill_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def fill_whole(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a file beside `path`, then put it in place in one step; nothing is left of a failure."""
    part = path.with_name(f"{path.name}.part")
    try:
        fill(part)
        with part.open("rb+") as file:  # a disk that is full may say so only now
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fill_folder_whole(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write into a new folder beside `path`, then put it in the place of what is there.

    Nothing is left of a failure, and what was there stays.
    """
    part, old = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file to `path` in one step."""
    fill_whole(path, lambda part: shutil.copyfile(source, part))


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal digits, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
