"""Two processes that share each batch do what one process does with the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from saccade.learn.loop import Machines
from tests.learn.processes import STRATEGIES, all_kinds


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "tests.learn.processes", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    all_kinds(tmp_path / "one", Machines())
    for what in ("train", "pretrain", "restoration"):
        whole = json.loads((tmp_path / "one" / what / "curves.json").read_text())["curves"]
        weights = load_file(tmp_path / "one" / what / "weights.safetensors")
        for strategy in STRATEGIES:
            folder = tmp_path / strategy / what
            curves = json.loads((folder / "curves.json").read_text())["curves"]
            assert curves.keys() == whole.keys() and not (folder / "last.ckpt").exists()
            assert curves["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5), (what, strategy)
            shared = load_file(folder / "weights.safetensors")
            assert shared.keys() == weights.keys()
            far = max(float((shared[name] - weights[name]).abs().max()) for name in weights)
            assert far < 1e-3 and all(torch.isfinite(value).all() for value in shared.values()), (what, strategy, far)
