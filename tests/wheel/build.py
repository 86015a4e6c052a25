"""Builds the wheel, looks into it, installs it into an empty environment and runs smoke.py there.

    python tests/wheel/build.py [--borrow-torch]

`--borrow-torch` lends the new environment the torch (and CUDA libraries) of this one by symbolic links, gigabytes that
need not come again; everything else is installed as a user gets it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "inceptionnext_atto.json"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def copy_sources(folder: Path) -> Path:
    """What a wheel is made of, apart from the checkout: a `build/` left there would go into the wheel."""
    shutil.copytree(ROOT / "saccade", folder / "saccade", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def look_into(wheel: Path) -> None:
    """Everything that the package has is in the wheel, the licence too, and nothing else."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    held = {path.relative_to(ROOT).as_posix() for path in (ROOT / "saccade").rglob("*")
            if path.suffix in (".py", ".json", ".jinja", ".typed")}
    if packed != held:
        sys.exit(f"the wheel lacks {sorted(held - packed)} and has {sorted(packed - held)} besides")
    licences = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/licenses/" in name}
    wanted = {name for name in ("LICENSE", "NOTICE") if (ROOT / name).exists()}
    if not wanted <= licences:
        sys.exit(f"the wheel lacks {sorted(wanted - licences)}")


def borrow_torch(site_packages: Path) -> None:
    """Links to torch and to what it brings of CUDA and compilers."""
    wanted, seen = ["torch"], set()
    while wanted:
        name = wanted.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        seen.add(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
        required = {re.split(r"[^\w.-]", line)[0] for line in distribution.requires or ()}
        wanted += [each for each in required - seen if each.startswith(("nvidia", "cuda", "triton"))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--borrow-torch", action="store_true")
    borrows = parser.parse_args().borrow_torch
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = copy_sources(folder / "sources")
        run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, sources, cwd=folder)
        wheel, = folder.glob("saccade-*.whl")
        look_into(wheel)
        venv.create(folder / "empty", with_pip=True)
        binaries = folder / "empty" / ("Scripts" if os.name == "nt" else "bin")
        python = binaries / ("python.exe" if os.name == "nt" else "python")
        if borrows:
            site_packages, = (folder / "empty" / "lib").glob("python*/site-packages")
            borrow_torch(site_packages)
        run(python, *PIP, "install", wheel, cwd=folder)
        run(python, "-I", ROOT / "tests" / "wheel" / "smoke.py", GOLDEN, cwd=folder)


if __name__ == "__main__":
    main()
