"""PSNR and SSIM as papers on restoration compute them: on whole levels, of brightness or colours, less the border."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.ops.blur import gaussian_blur

RED, GREEN, BLUE = 65.481, 128.553, 24.966  # ITU-R BT.601, as MATLAB's rgb2ycbcr: black is 16, white 235


def levels(image: Tensor) -> Tensor:
    """Numbers in [0, 1] as whole levels of 8 bits in [0, 255], in float64."""
    return (image.double().clamp(0, 1) * 255).round()


def brightness(image: Tensor) -> Tensor:
    """Y, not rounded, of whole levels: (B, 3, H, W) in [0, 255] -> (B, 1, H, W) in [16, 235]; of gray itself."""
    if image.shape[1] == 1:
        return image
    red, green, blue = image.split(1, 1)
    return 16 + (RED * red + GREEN * green + BLUE * blue) / 255


def quality(made: Tensor, truth: Tensor, border: int = 0) -> dict[str, float]:
    """`{"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}` of pictures (B, C, H, W) in [0, 1]; means over the pictures.

        PSNR = 10 log10(255^2 / mean of squared differences)
        SSIM = mean of (2 m m' + c1) (2 s + c2) / ((m^2 + m'^2 + c1) (v + v' + c2))

    with means m, variances v and covariance s under a Gaussian of 11 x 11 pixels and deviation 1.5 that stays inside
    the picture, c1 = (0.01 * 255)^2, c2 = (0.03 * 255)^2 (Wang et al., "Image Quality Assessment: From Error Visibility
    to Structural Similarity", 2004). `border` pixels are cut from each side first: the scale, in super-resolution.
    Raises SaccadeError for pictures of two sizes, or too small for the Gaussian.
    """
    if made.shape != truth.shape:
        raise SaccadeError(f"pictures of {tuple(made.shape)} and {tuple(truth.shape)} cannot be compared: crop the "
                           "truth to the scale's multiple before it is degraded")
    if min(made.shape[2:]) - 2 * border < 11:
        raise SaccadeError(f"pictures of {made.shape[3]}x{made.shape[2]} pixels less a border of {border} are too "
                           "small: SSIM needs 11x11")
    inside = (..., slice(border, made.shape[2] - border), slice(border, made.shape[3] - border))
    colours = levels(made)[inside], levels(truth)[inside]
    found = {}
    for name, (ours, theirs) in (("y", (brightness(colours[0]), brightness(colours[1]))), ("rgb", colours)):
        errors = (ours - theirs).square().mean((1, 2, 3))
        found[f"psnr_{name}"] = float((10 * (255**2 / errors).log10()).mean())
        found[f"ssim_{name}"] = float(similarity(ours, theirs))
    return found


def similarity(ours: Tensor, theirs: Tensor) -> Tensor:
    """SSIM of levels (B, C, H, W) in [0, 255], the mean over all channels."""
    around = partial(gaussian_blur, deviation=1.5, radius=5)
    mean, other, c1, c2 = around(ours), around(theirs), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    spread = around(ours.square()) - mean.square() + around(theirs.square()) - other.square()
    joint = around(ours * theirs) - mean * other
    return ((2 * mean * other + c1) * (2 * joint + c2) / ((mean.square() + other.square() + c1) * (spread + c2))).mean()
