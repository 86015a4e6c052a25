"""saccade: vision backbones and attention as parts that fit each other, checked against their authors' code."""

from __future__ import annotations

from saccade.attribution.explanation import explain, list_explainers
from saccade.core.apply import apply
from saccade.core.build import create_mixer, create_model, info
from saccade.core.errors import SaccadeError
from saccade.core.index import find, list_mixers, list_models
from saccade.core.load import LoadReport, load
from saccade.core.record import record
from saccade.core.site import Site
from saccade.integrations.slot import swap
from saccade.integrations.timm_registry import register_with_timm

__version__ = "0.1.0"

__all__ = [
    "LoadReport", "SaccadeError", "Site", "apply", "create_mixer", "create_model", "explain", "find", "info",
    "list_explainers", "list_mixers", "list_models", "load", "record", "register_with_timm", "swap",
]
