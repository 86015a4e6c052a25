"""`saccade verify --port`: other people's models put to goldens, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import GOLDENS, run

# timm's Swin in timm's own file: the merging stands at a stage's start instead of the end before it.
TIMM_SWIN = """
import timm
from saccade.tools.port import Port

def build(golden):
    args = golden["source"]["args"]
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=args["depths"], num_heads=args["num_heads"])
    taps = {"stage1": "layers.1.downsample", "stage2": "layers.2.downsample", "stage3": "layers.3.downsample"}
    return Port(model, taps=taps | {"stage4": "layers.3"})

def wrong(golden):
    model = build(golden).module
    model.layers[2].blocks[3].norm2.eps = 1e-2
    return model
"""
SWIN_NAMES = [[f"layers\\.{stage}\\.downsample\\.(.*)", f"layers.{stage + 1}.downsample.\\1"] for stage in range(3)]
SWIN_NAMES += [["head\\.(.*)", "head.fc.\\1"]]

# VAN's large kernel attention and TokenFormer's Pattention, by hand.
BY_HAND = """
import numpy as np
from torch import nn

class LargeKernel(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.mix(self.far(self.near(x)))

def large_kernel(golden):
    return LargeKernel(golden["source"]["args"]["dim"])

def near_sighted(golden):
    module = large_kernel(golden)
    module.far.dilation, module.far.padding = (1, 1), (3, 3)
    return module

def pattention(golden):
    def run(state, inputs):
        weights = np.exp(inputs["x"] @ state["keys"].T)
        weights *= weights.shape[-1] / weights.sum(-1, keepdims=True)
        return weights @ state["values"]
    return run

def misnamed(golden):
    return lambda state, inputs: {"result": inputs["x"]}

def nothing(golden):
    return None

def broken(golden):
    raise KeyError("depth")
"""
NAMES = {"conv0.weight": "near.weight", "conv0.bias": "near.bias", "conv_spatial.weight": "far.weight",
         "conv_spatial.bias": "far.bias", "conv1.weight": "mix.weight", "conv1.bias": "mix.bias"}
PATTENTION = {"key_param_tokens": "keys", "value_param_tokens": "values"}


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the ports and their key maps, in which we are."""
    (tmp_path / "timm_swin.py").write_text(TIMM_SWIN)
    (tmp_path / "by_hand.py").write_text(BY_HAND)
    for name, names in (("swin", SWIN_NAMES), ("kernel", NAMES), ("tokens", PATTENTION)):
        (tmp_path / f"{name}.json").write_text(json.dumps(names))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verdicts(out: str) -> dict[str, bool]:
    return {row["what"]: row["passed"] for row in json.loads(out)}


def test_timms_swin_is_the_authors(capsys, at):
    code, out, _ = run(capsys, "verify", "--json", "--port", "timm_swin.py:build", "--keymap", "swin.json",
                       GOLDENS / "swin_tiny.json")
    golden = json.loads((GOLDENS / "swin_tiny.json").read_text())
    assert code == 0 and all(verdicts(out).values())
    assert set(verdicts(out)) == {"parameters", *golden["outputs"], *(f"d/d {name}" for name in golden["grads"])}


def test_a_swin_with_one_wrong_norm_is_not(capsys, at):
    """One epsilon in one of twelve blocks: 1e-2 for 1e-5."""
    code, out, _ = run(capsys, "verify", "--json", "--port", "timm_swin.py:wrong", "--keymap", "swin.json",
                       "--only", "out", GOLDENS / "swin_tiny.json")
    assert code == 1 and verdicts(out) == {"parameters": True, "out": False}


def test_a_module_by_hand(capsys, at):
    code, out, _ = run(capsys, "verify", "--json", "--port", "by_hand:large_kernel", "--keymap", "kernel.json",
                       GOLDENS / "op_lka.json")
    assert code == 0 and set(verdicts(out)) == {"parameters", "out", "d/d x", "d/d conv_spatial.weight",
                                                "d/d conv1.weight"}
    code, out, _ = run(capsys, "verify", "--port", "by_hand:near_sighted", "--keymap", "kernel.json",
                       GOLDENS / "op_lka.json")
    assert code == 1 and "FAIL" in out


def test_a_function_of_arrays(capsys, at):
    golden = GOLDENS / "op_pattention_softmax.json"
    code, out, _ = run(capsys, "verify", "--json", "--port", "by_hand:pattention", "--keymap", "tokens.json", golden)
    assert code == 0 and verdicts(out) == {"out": True}  # no gradients of what torch does not see


def test_our_own_ports_run_so_too(capsys):
    port = Path(__file__).parents[1] / "ports" / "swin.py"
    code, out, _ = run(capsys, "verify", "--json", "--port", f"{port}:build", GOLDENS / "op_swin_window_attention.json")
    assert code == 0 and all(verdicts(out).values())


@pytest.mark.parametrize(("port", "names", "message"), [
    ("by_hand", "{}", "give module:function or file.py:function"),
    ("absent:build", "{}", "absent could not be imported: ModuleNotFoundError"),
    ("absent.py:build", "{}", "there is no file absent.py"),
    ("by_hand:absent", "{}", "has no function absent"),
    ("by_hand:broken", "{}", "could not be built: KeyError: 'depth'"),
    ("by_hand:nothing", "{}", "a NoneType, neither a module nor a function nor a Port"),
    ("by_hand:misnamed", "{}", "the port gives result and not out"),
    ("by_hand:large_kernel", "{}", "6 names of the golden are not in the port (conv0.bias, conv0.weight, conv1.bias, "
                                   "...); 6 of the port are not in the golden (far.bias, far.weight, mix.bias, ...)"),
    ("by_hand:large_kernel", json.dumps(NAMES | {"conv1.bias": None}),
     "1 of the port are not in the golden (mix.bias)"),
    ("by_hand:large_kernel", json.dumps(NAMES | {"conv0.weight": "far.weight", "conv_spatial.weight": "near.weight"}),
     "far.weight is (32, 1, 5, 5) in the golden and (32, 1, 7, 7) in the port"),
    ("by_hand:large_kernel", "{", "not JSON"),
    ("by_hand:large_kernel", "3", "give a list of [pattern, name] or an object of names"),
    ("by_hand:large_kernel", '[["conv0"]]', "is no pair of a pattern and a name"),
    ("by_hand:large_kernel", '[["conv(0", "near"]]', "'conv(0' is no regular expression"),
    ("by_hand:large_kernel", '[["conv0.weight", "\\\\1"]]', "the key map fails"),
])
def test_what_does_not_fit_is_one_line(capsys, at, port, names, message):
    (at / "names.json").write_text(names)
    code, out, err = run(capsys, "verify", "--port", port, "--keymap", "names.json", GOLDENS / "op_lka.json")
    assert code == 2 and not out
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(("options", "message"), [
    (("--keymap", "kernel.json"), "give --port module:function too"),
    (("--port", "by_hand:large_kernel", "--keymap", "gone.json"), "gone.json: cannot be read"),
    (("--port", "by_hand:large_kernel", "--only", "stage*"), "op_lka holds out, d/d x"),
])
def test_options_that_do_not_fit(capsys, at, options, message):
    code, _, err = run(capsys, "verify", *options, GOLDENS / "op_lka.json")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
