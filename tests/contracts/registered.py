"""What the contracts run over: every mixer and backbone that a card declares, narrow, with their exceptions."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import tomllib  # Python >= 3.11; the tests need it, the library does not
import torch
from torch import nn

from saccade import Site, create_mixer, list_mixers, list_models
from saccade.core.index import index, is_backbone, paper_module

_FILE = Path(__file__).parent / "exceptions.toml"
_DECLARED = tomllib.loads(_FILE.read_text(encoding="utf-8"))
EXCEPTIONS, OLDER_TORCH = _DECLARED.get("exception", []), _DECLARED.get("older_torch", [])
MIXERS = list_mixers()
# One narrow registered model of each builder stands for its family; the rest differ by numbers alone.
NARROW = sorted(name for name in list_models() if "_nano" in name and is_backbone(name))
GRIDS = [(7, 7), (8, 12), (5, 11), (1, 13), (16, 16)]


def cases(contract: str, names: Iterable[str], slow: Container[str] = ()) -> list[Any]:
    """The names as test parameters; a declared exception must fail, one of older torch where that is installed."""
    broken = {entry["name"]: entry["reason"] for entry in (*EXCEPTIONS, *OLDER_TORCH)
              if entry["contract"] == contract and torch.__version__ < entry.get("before", "99")}
    marks = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in broken.items()}
    return [pytest.param(name, marks=marks.get(name, []) + [pytest.mark.slow] * (name in slow)) for name in names]


def over(contract: str, names: Iterable[str], slow: Container[str] = ()) -> Any:
    return pytest.mark.parametrize("name", cases(contract, names, slow))


def mixer(name: str, grid: tuple[int, ...] = (8, 8), dim: int = 32, heads: int = 2, index: int = 1) -> nn.Module:
    """A mixer on a narrow site, its parameters drawn so that none is zero."""
    torch.manual_seed(0)
    site = Site(dim, heads, stage=1, index=index, stride=8, grid=grid)
    return randomised(create_mixer(name, site)).eval()


def randomised(module: nn.Module) -> nn.Module:
    """Parameters with spread: what is initialised to zero (biases, tables, layer scale) would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(noise / fan**0.5 if parameter.ndim > 1 else parameter + noise / 5)
    return module


def cost_of(name: str) -> Any:
    paper = index()["mixers"][name]
    return getattr(paper_module(paper), paper_module(paper).CARD.mixers[name])
