"""Where the weights that a training begins with come from, and what their licence means for what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saccade.core.files import sha256_of
from saccade.core.weights import identified, permits, published


@dataclass(frozen=True)
class Origin:
    """The source of starting weights, the pictures they were trained on, and their licence.

    `licence` is empty where nobody else's weights are involved, "unknown" where nobody says.
    """

    source: str = "random weights"
    data: str = ""
    licence: str = ""

    @property
    def warning(self) -> str:
        """What to heed before the trained model is used, in one line; empty where the licence is permissive."""
        if not self.licence or permits(self.licence):
            return ""
        if self.licence == "unknown":
            return (f"the starting weights ({self.source}) are of unknown licence: ask who trained them before you use "
                    "or pass on what was trained from them")
        forbids = "forbids commercial use" if "nc" in self.licence.lower().split("-") else "is not a permissive one"
        return (f"the starting weights ({self.source}) are under {self.licence}, which {forbids}: it binds what was "
                "trained from them too")


def of_model(name: str) -> Origin:
    """The published weights of one of our models."""
    weights = published(name)
    return Origin(weights.source, weights.data, weights.licence)


def of_file(file: Path) -> Origin:
    """The weights in a checkpoint file: published ones are known by their hash, all others are of unknown licence."""
    name = identified(sha256_of(file))
    return of_model(name) if name else Origin(file.name, licence="unknown")
