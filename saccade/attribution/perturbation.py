"""Maps from what the score does when parts of the picture go: occlusion, RISE, LIME, meaningful perturbation.

Each takes (model, image (B, C, H, W), target (B,)) and returns (B, H, W). The model is in evaluation mode already; only
meaningful perturbation needs its slopes. `progress(done, of)` is called after each batch of `batch_size` pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.parts.scores import chosen, scores

Progress = Callable[[int, int], None]


def occlusion(
    model: nn.Module, image: Tensor, target: Tensor, patch: int | None = None, stride: int | None = None,
    fill: float = 0.0, batch_size: int = 64, progress: Progress | None = None,
) -> Tensor:
    """The mean fall of the score over all patches that hide a pixel; every pixel is hidden at least once.

    `patch` defaults to an eighth of the shorter side, `stride` to half of it. `fill` is what stands in the patch (0:
    the mean colour of a normalised picture). Zeiler, Fergus, Visualizing and Understanding Convolutional
    Networks, 2014.
    """
    height, width = image.shape[2:]
    patch = max(1, min(height, width) // 8) if patch is None else patch
    stride = max(1, patch // 2) if stride is None else stride
    if not 1 <= patch <= min(height, width) or not 1 <= stride <= patch:
        raise SaccadeError(f"patch={patch}, stride={stride}: give 1 <= stride <= patch <= {min(height, width)}")
    rows = sorted({*range(0, height - patch + 1, stride), height - patch})
    columns = sorted({*range(0, width - patch + 1, stride), width - patch})
    places = [(row, column) for row in rows for column in columns]

    def shown(start: int, end: int) -> Tensor:
        keep = image.new_ones(end - start, height, width)
        for mask, (row, column) in zip(keep, places[start:end], strict=True):
            mask[row : row + patch, column : column + patch] = 0
        return keep

    with torch.no_grad():
        whole = chosen(model, image, target)
    fall, count = torch.zeros_like(image[:, 0]), torch.zeros_like(image[0, 0])
    for keep, left in _masked(model, image, target, len(places), shown, batch_size, progress, fill):
        fall += torch.einsum("bm,mhw->bhw", whole[:, None] - left, 1 - keep)
        count += (1 - keep).sum(0)
    return fall / count


def rise(
    model: nn.Module, image: Tensor, target: Tensor, masks: int = 1000, cells: int = 7, kept: float = 0.5,
    seed: int = 0, batch_size: int = 64, progress: Progress | None = None,
) -> Tensor:
    """sum over masks of p(target | x m) m / sum of m, m: coarse random masks, enlarged and shifted at random.

    A cell of cells x cells is kept with probability `kept`. Petsiuk, Das, Saenko, RISE: Randomized Input Sampling for
    Explanation of Black-box Models, 2018, section 3; divided by what each pixel was really shown, not by its
    expectation (masks x kept), under which a model that answers everything alike would get the sampled masks for a map.
    """
    if masks < 1 or cells < 1 or not 0 < kept < 1:
        raise SaccadeError(f"masks={masks}, cells={cells}, kept={kept}: give masks, cells >= 1 and 0 < kept < 1")
    shown = _coarse_masks(masks, cells, kept, (image.shape[2], image.shape[3]), seed)
    total, often = torch.zeros_like(image[:, 0]), torch.zeros_like(image[0, 0])
    for mask, probability in _masked(model, image, target, masks, shown, batch_size, progress, probability=True):
        total += torch.einsum("bm,mhw->bhw", probability, mask)
        often += mask.sum(0)
    return total / often.clamp_min(1e-6)


def lime(
    model: nn.Module, image: Tensor, target: Tensor, samples: int = 500, cells: int = 8, width: float = 0.25,
    seed: int = 0, batch_size: int = 64, progress: Progress | None = None,
) -> Tensor:
    """Coefficients of the weighted ridge regression of the score on which of cells x cells squares are shown.

    Squares that are not shown are 0; a sample with the share s of squares weighs exp(-(1 - sqrt(s))^2 / width^2)
    (the cosine distance to the whole). Ribeiro, Singh, Guestrin, "Why Should I Trust You?", 2016, with squares for
    superpixels, so that no segmentation stands between the model and its map.
    """
    if samples < 2 or cells < 1:
        raise SaccadeError(f"samples={samples}, cells={cells}: give samples >= 2 and cells >= 1")
    size = (image.shape[2], image.shape[3])
    shown = torch.rand(samples, cells * cells, generator=torch.Generator().manual_seed(seed)).to(image) < 0.5
    shown[0] = True
    squares = shown.to(image).view(samples, 1, cells, cells)

    def some(start: int, end: int) -> Tensor:
        return F.interpolate(squares[start:end], size, mode="nearest")[:, 0]

    asked = _masked(model, image, target, samples, some, batch_size, progress)
    answers = torch.cat([answer for _, answer in asked], 1).double()
    features = torch.cat([shown, torch.ones_like(shown[:, :1])], 1).double()
    weight = torch.exp(-((1 - shown.double().mean(1).sqrt()) ** 2) / width**2)
    ridge = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    ridge[-1, -1] = 0  # the intercept is free
    left = features.T @ (weight[:, None] * features) + ridge
    coefficients = torch.linalg.solve(left, features.T @ (weight[:, None] * answers.T))[:-1]
    maps = coefficients.T.reshape(len(image), 1, cells, cells).to(image)
    return F.interpolate(maps, size, mode="nearest")[:, 0]


def meaningful_perturbation(
    model: nn.Module, image: Tensor, target: Tensor, steps: int = 150, cells: int = 28, area: float = 1e-4,
    smooth: float = 1e-2, rate: float = 0.1,
) -> Tensor:
    """1 - m, the smallest smooth part whose blurring takes the class away: m minimises

        p(target | m x + (1 - m) blur(x)) + area sum (1 - m) + smooth sum |grad m|^3,   m in [0, 1], cells x cells.

    Fong, Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation, 2017, section 4 (a mask of at
    most the picture's size; sums over cells, scaled to 28 x 28).
    """
    height, width = image.shape[2:]
    side = min(cells, height, width)
    blurred = F.interpolate(F.adaptive_avg_pool2d(image, max(1, min(height, width) // 16)), (height, width),
                            mode="bilinear", align_corners=False)
    mask = torch.full((len(image), 1, side, side), 0.5, device=image.device, dtype=image.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=rate)
    scale = (28 / side) ** 2
    for _ in range(steps):
        large = F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
        answer = scores(model, large * image + (1 - large) * blurred).softmax(1).gather(1, target[:, None])
        rough = mask.diff(dim=2).abs().pow(3).sum() + mask.diff(dim=3).abs().pow(3).sum()
        loss = answer.sum() + scale * (area * (1 - mask).abs().sum() + smooth * rough)
        (mask.grad,) = torch.autograd.grad(loss, [mask])
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    return F.interpolate(1 - mask.detach(), (height, width), mode="bilinear", align_corners=False)[:, 0]


def _masked(
    model: nn.Module, image: Tensor, target: Tensor, count: int, masks: Callable[[int, int], Tensor],
    batch_size: int, progress: Progress | None, fill: float = 0.0, probability: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of masks (n, H, W), and the target's score (or probability) of each picture under them, (B, n).

    masks(start, end) makes a batch: 1 shows a pixel, 0 puts `fill` there. Only one is held at a time (all of a
    thousand at 224 pixels would be 200 MB), and it is made once for all pictures.
    """
    if batch_size < 1:
        raise SaccadeError(f"batch_size is {batch_size}: give 1 or more")
    for start in range(0, count, batch_size):
        found = []
        with torch.no_grad():
            mask = masks(start, min(start + batch_size, count)).to(image)
            for number, one in enumerate(image):
                covered = one * mask[:, None] if fill == 0 else torch.where(mask[:, None] > 0, one, fill)
                answer = scores(model, covered)
                found.append((answer.softmax(1) if probability else answer)[:, target[number]])
                if progress is not None:
                    progress(start * len(image) + (number + 1) * len(mask), count * len(image))
        yield mask, torch.stack(found)


def _coarse_masks(
    masks: int, cells: int, kept: float, size: tuple[int, int], seed: int
) -> Callable[[int, int], Tensor]:
    """Masks (n, H, W) of RISE by their numbers: drawn at once, enlarged when they are asked for."""
    generator = torch.Generator().manual_seed(seed)
    cell = tuple(-(-side // cells) for side in size)
    coarse = (torch.rand(masks, 1, cells, cells, generator=generator) < kept).float()
    rows = torch.randint(cell[0], (masks,), generator=generator).tolist()
    columns = torch.randint(cell[1], (masks,), generator=generator).tolist()
    whole = ((cells + 1) * cell[0], (cells + 1) * cell[1])

    def shown(start: int, end: int) -> Tensor:
        large = F.interpolate(coarse[start:end], whole, mode="bilinear", align_corners=False)
        return torch.stack([one[0, row : row + size[0], column : column + size[1]] for one, row, column in
                            zip(large, rows[start:end], columns[start:end], strict=True)])

    return shown
