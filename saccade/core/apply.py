"""Methods that make a trained model compute less, by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.core.index import method
from saccade.core.names import closest
from saccade.core.swap import Handle

KIND = "token reduction"


def apply(model: nn.Module, name: str, **options: Any) -> Handle:
    """Turn a model, ours or timm's, into one that computes less: `handle = apply(model, "evit", keep=0.7)`.

    The model is changed in place and keeps the names of its parameters (a method may add its own); `handle.undo()` puts
    the very same modules back. Raises SaccadeError for an unknown method or option, and for a host that the method
    does not understand.
    """
    function = method(name, KIND)
    known = [key for key in inspect.signature(function).parameters if key != "model"]
    for key in options:
        if key not in known:
            raise SaccadeError(f"method {name!r} has no option {key!r}{closest(key, known) or f'; it has {known}'}")
    return function(model, **options)
