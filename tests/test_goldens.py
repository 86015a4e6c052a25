"""Every golden of the project: whole models through a user's path, operators through their ports."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from saccade import Site
from saccade.core.apply import KIND
from saccade.core.index import index
from saccade.golden import make_inputs, make_state, read_golden
from saccade.tools.measure import declared_macs
from saccade.tools.verify import settings, verify
from tests.contracts.registered import EXCEPTIONS
from tests.ports.port import errors

FOLDER = Path(__file__).parent / "goldens"
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
# Numbers of a golden that are themselves wrong, with the reason in contracts/exceptions.toml: these must not be met.
WRONG = {(entry["name"], entry["contract"]) for entry in EXCEPTIONS}
CLAIMED = {golden: paper for paper, card in index()["papers"].items() for golden in card["goldens"]}
# Whole models that `create_model` knows; modules, and networks that take no image, have their ports alone.
MODELS = [name for name in PATHS if name in index()["models"] or name in index()["aliases"]]


def test_every_golden_is_claimed_and_every_claim_is_here():
    assert set(PATHS) == set(CLAIMED)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    failed = [verdict for verdict in verify(PATHS[name]) if not verdict.passed]
    assert {verdict.what for verdict in failed} == wrong_in(name), failed


@pytest.mark.parametrize("name", PATHS)
def test_port(name):
    golden = read_golden(PATHS[name])
    port = import_module(f"tests.ports.{CLAIMED[name]}").build(golden)
    if golden["params"] is not None:
        ours = sum(parameter.numel() for parameter in port.module.parameters())
        assert ours + port.unused == golden["params"]
    wrong = {what: error for what, error in errors(port, golden).items() if not error <= golden["tolerance"]}
    assert set(wrong) == wrong_in(name), wrong


def wrong_in(golden):
    return {what for name, what in WRONG if name == golden and not what.startswith("test_")}


# Where none are counted (elementwise, or by broadcasting) there is nothing to compare.
@pytest.mark.parametrize("name", [name for name, path in PATHS.items() if read_golden(path)["macs"]])
def test_declared_multiply_adds(name):
    """Declared (mathematical) multiply-adds within 1 % of what was counted on the authors' code.

    Methods that let tokens go may save more than their authors' code, which multiplies some by zero.
    """
    golden = read_golden(PATHS[name])
    port = import_module(f"tests.ports.{CLAIMED[name]}").build(golden)
    arguments = port.inputs(make_inputs(golden))
    reduces = KIND in index()["papers"][CLAIMED[name]]["kinds"]
    if reduces:  # as many as the weights decide
        port.module.load_state_dict(port.rename(make_state(golden)), strict=False)
    if hasattr(port.module, "cost"):
        x = arguments[0]
        site = Site(x.shape[-1], getattr(port.module, "heads", 1), grid=tuple(x.shape[1:-1]))
        beside = {"prefix": arguments[1].shape[1]} if getattr(port.module, "prefix", False) and arguments[1:] else {}
        declared = x.shape[0] * port.module.cost(site, site.grid, **beside)
        declared += port.module.shared_cost(site, site.grid) if hasattr(port.module, "shared_cost") else 0
    else:
        declared = declared_macs(port.module, arguments)
    if reduces:
        assert declared <= 1.01 * golden["macs"]
    else:
        assert declared == pytest.approx(golden["macs"], rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_authors_pth_file(name, tmp_path):
    """The same checkpoint as the authors' .pth, wrapped, beside settings that only their code could unpickle."""
    import argparse

    from saccade import create_model

    golden = read_golden(PATHS[name])
    image = next(iter(make_inputs(golden).values()))
    file = tmp_path / "authors.pth"
    torch.save({"model": make_state(golden), "args": argparse.Namespace(epochs=300)}, file)
    model = create_model(name, checkpoint_path=file, **settings(golden, name, image))
    report = model.load_report
    assert report.format == "authors" and not report.left
    buffers = sum(key.endswith("num_batches_tracked") for key in model.state_dict())
    assert report.loaded + buffers >= report.of
