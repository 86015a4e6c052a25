"""Whether a model is being read by an exporter, for forms that are faster but that ONNX or free sizes do not take."""

from __future__ import annotations

import torch

KNOWN = hasattr(torch.compiler, "is_exporting")  # not in torch 2.6, where what is compiled takes the exported forms too


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`."""
    return torch.compiler.is_exporting() if KNOWN else torch.compiler.is_compiling()
