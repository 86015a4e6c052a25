"""Arithmetic that half precision would spoil."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Within, autocast does not touch what is computed on the device of x."""
    device = x.device.type
    # meta tensors know no autocast; older torch cannot compile the question whether a device does
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
