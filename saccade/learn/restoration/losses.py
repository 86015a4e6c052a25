"""How far a restored picture is from the true one, as training sees it; each (made, truth) -> a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.errors import SaccadeError


def charbonnier(made: Tensor, truth: Tensor, smooth: float = 1e-3) -> Tensor:
    """mean of sqrt((made - truth)^2 + smooth^2): L1 with a round tip (Lai et al., LapSRN, 2017)."""
    return ((made - truth).square() + smooth**2).sqrt().mean()


def frequency(made: Tensor, truth: Tensor) -> Tensor:
    """mean of |FFT(made) - FFT(truth)| over real and imaginary parts (Cho et al., MIMO-UNet, 2021), orthonormal."""
    difference = torch.fft.rfft2((made - truth).float(), norm="ortho")
    return torch.view_as_real(difference).abs().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss, "charbonnier": charbonnier, "fft": frequency,
}


def weighted(weights: Mapping[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of losses by name, each times its weight; raises SaccadeError for an unknown name or none."""
    unknown = sorted(set(weights) - set(LOSSES))
    if unknown or not weights:
        raise SaccadeError(f"loss {unknown[0] if unknown else 'of no name'}: choose of {', '.join(LOSSES)}")

    def loss(made: Tensor, truth: Tensor) -> Tensor:
        parts = [weight * LOSSES[name](made, truth) for name, weight in weights.items()]
        return torch.stack(parts).sum()

    return loss
