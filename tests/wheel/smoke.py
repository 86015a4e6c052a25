"""Does an installed saccade work? Its core alone, on any system: `python -I smoke.py GOLDEN`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import saccade
from saccade.core.index import index

GOLDEN = Path(sys.argv[1]).resolve()
SACCADE = shutil.which("saccade", path=str(Path(sys.executable).parent))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert SACCADE is not None, "the wheel installs no command"
    said = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200"}
    return subprocess.run([SACCADE, *arguments], capture_output=True, text=True, encoding="utf-8", env=said)


def prints(*arguments: str, says: str) -> None:
    done = command(*arguments)
    assert done.returncode == 0 and says in done.stdout, (arguments, done.returncode, done.stdout, done.stderr)


def refuses(*arguments: str, says: str) -> None:
    """One line on the error stream and exit code 2."""
    done = command(*arguments)
    assert done.returncode == 2 and says in done.stderr, (arguments, done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


assert GOLDEN.parents[1] not in Path(saccade.__file__).parents, f"{saccade.__file__} is the checkout's"
assert saccade.list_models() == sorted(index()["models"]) and len(saccade.list_models()) > 500
assert saccade.create_model("biformer_nano", num_classes=7).eval()(torch.zeros(2, 3, 33, 40)).shape == (2, 7)
assert saccade.create_mixer("neighborhood", saccade.Site(16, heads=2))(torch.zeros(1, 5, 6, 16)).shape == (1, 5, 6, 16)

prints("list", "biformer*", says="biformer_tiny")
prints("find", "bi-level", "routing", says="bilevel_routing")
prints("info", "swin_nano", says="multiply-adds")
prints("weights", "list", "swin_tiny", says="swin_tiny")
prints("verify", str(GOLDEN), says="pass")
refuses("info", "swin_tinny", says="swin_tiny")
refuses("compare", "nowhere", "--models", "swin_nano", says="pip install")
print(f"saccade {saccade.__version__} works from {Path(saccade.__file__).parent} with torch {torch.__version__}")
