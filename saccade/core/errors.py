"""The one exception that a user's input can cause."""

from __future__ import annotations


class SaccadeError(ValueError):
    """Input that cannot be used: one line that names the thing, the value and the remedy."""
