"""SiT: a transformer is its own autoencoder, and tells what it looked at by one token.

Groups of neighbouring patches of a picture are spoilt, by noise or by another picture. From the patch tokens a light
head restores the pixels under them; from the class token, one head says how the picture was turned, and another brings
two views of one picture together,
    loss = sum_k exp(-s_k) loss_k + s_k   over restoration, contrast and rotation, s_k learned,
    restoration = mean over spoilt pixels of |guess - pixel|,
    contrast = -log softmax over all other views of cos(z, z') / temperature, at the other view of the same picture.

Atito, Awais, Kittler, "SiT: Self-supervised vIsion Transformer", 2021, section 3; Kendall, Gal, Cipolla, "Multi-Task
Learning Using Uncertainty to Weigh Losses", 2018, equation 7.

The rotation's head reads the class token, as the contrast's does (the paper has a token for each).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within
from saccade.parts.losses import supervised_contrastive
from saccade.parts.masking import Visible, spread
from saccade.parts.pixels import check_ratio, whole_patches
from saccade.parts.plain import DEIT

CARD = Card(
    "SiT: Self-supervised vIsion Transformer",
    authors="Atito, Awais, Kittler",
    year=2021,
    systems=("sit_ssl",),
    arxiv="2104.03602",
    code="Sara-Ahmed/SiT@7f22e9c",
    licence="unknown",
    read="paper",
    keywords="self-supervised learning, group masked model learning, transformer autoencoder, contrastive, rotation",
    kinds=("pretraining",),
    methods={"sit_ssl": "SelfSupervisedTransformer"},
    goldens=("sit_ssl_vit_tiny",),
    tests=("tests/papers/test_sit_ssl.py",),
)

TURNS = 4


def groups(batch: int, grid: tuple[int, int], ratio: float, largest: int, device: torch.device | None = None) -> Tensor:
    """(B, h, w) bool: random rectangles of neighbouring patches, added until the share `ratio` is covered.

    Sides are 1 to `largest` patches. (Atito et al., 2021, section 3.1: group masked model learning.)
    """
    count = 4 * grid[0] * grid[1]  # rectangles drawn; far fewer are needed
    spans = []
    for side in grid:
        length = torch.randint(1, min(largest, side) + 1, (batch, count, 1), device=device)
        first = (torch.rand(batch, count, 1, device=device) * (side - length + 1)).long()
        place = torch.arange(side, device=device)
        spans.append((place >= first) & (place < first + length))
    covered = (spans[0][..., None] & spans[1][..., None, :]).cummax(1).values  # (B, count, h, w): by the first ones
    enough = covered.flatten(2).float().mean(2) >= ratio
    first_enough = enough.float().argmax(1)
    return covered[torch.arange(batch, device=device), first_enough]


class ContrastiveHead(nn.Sequential):
    """Class tokens (B, C) -> (B, D): three linear layers, each with a batch norm, the last without weights."""

    def __init__(self, dim: int, out_dim: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, out_dim), nn.BatchNorm1d(out_dim, affine=False),
        )


class RestorationHead(nn.Module):
    """Patch tokens (B, N, C) on a grid -> a picture (B, chans, H, W): three layers a token, then its pixels."""

    def __init__(self, dim: int, chans: int, patch: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(dim, dim), nn.GELU())))
        self.pixels = nn.ConvTranspose2d(dim, chans, patch, stride=patch)

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.pixels(self.mlp(tokens).transpose(1, 2).unflatten(2, grid))


class SelfSupervisedTransformer(nn.Module):
    """Two views of each picture (B, 2, C, H, W) -> {"loss", and each of its three parts}.

    `model` is a plain transformer with a class token, ours or timm's; `ratio` the share of patches spoilt, in groups of
    at most `group` x `group`, about half by noise and half by the next picture. `tasks` leaves some out.
    """

    views = 2
    TASKS = ("restoration", "contrast", "rotation")

    def __init__(
        self, model: nn.Module, ratio: float = 0.5, group: int = 4, out_dim: int = 256, hidden: int = 4096,
        temperature: float = 0.2, tasks: tuple[str, ...] = TASKS,
    ) -> None:
        super().__init__()
        unknown = set(tasks) - set(self.TASKS)
        if unknown or not tasks:
            raise SaccadeError(f"sit_ssl: tasks={tasks!r}; choose some of {', '.join(self.TASKS)}")
        self.model, self.ratio, self.group = model, check_ratio("sit_ssl", ratio), group
        self.temperature, self.tasks = temperature, tasks
        host = self.host = Visible(model, "sit_ssl")
        if not host.prefix:
            raise SaccadeError("sit_ssl reads the class token, and this host has none: choose a ViT or DeiT with one")
        self.restore = RestorationHead(host.dim, host.in_chans, host.patch)
        self.project = ContrastiveHead(host.dim, out_dim, hidden)
        self.turn = nn.Linear(host.dim, TURNS)
        self.weights = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})  # s_k

    def read(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and the restored picture of images as they are given."""
        grid = whole_patches("sit_ssl", image, self.host.patch)
        tokens = self.model.forward_features(image)  # type: ignore[operator]
        return tokens[:, 0], self.restore(tokens[:, self.host.prefix:], grid)

    def spoil(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images with groups of patches spoilt, and which pixels (B, 1, H, W) those are."""
        grid = whole_patches("sit_ssl", image, self.host.patch)
        size = (image.shape[2], image.shape[3])
        shape = (len(image), (grid[0], grid[1]), self.ratio, self.group)
        spoilt = spread(groups(*shape, device=image.device), size)[:, None]
        noisy = spread(groups(len(image), (grid[0], grid[1]), 0.5, self.group, device=image.device), size)[:, None]
        return torch.where(spoilt, torch.where(noisy, torch.randn_like(image), image.roll(1, 0)), image), spoilt

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.ndim != 5 or images.shape[1] != self.views or images.shape[-1] != images.shape[-2]:
            raise SaccadeError(f"sit_ssl: pictures of the shape {tuple(images.shape)}; give two square views of each, "
                               "(B, 2, C, S, S)")
        flat = images.transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
        turns = torch.randint(TURNS, (len(flat),), device=flat.device)
        if "rotation" in self.tasks:
            flat = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(flat, turns, strict=True)])
        spoilt, where = self.spoil(flat)
        token, restored = self.read(spoilt)
        pictures = torch.arange(len(images), device=flat.device).repeat(2)
        losses: dict[str, Tensor] = {}
        if "restoration" in self.tasks:
            losses["restoration"] = ((restored - flat).abs().mean(1, keepdim=True) * where).sum() / where.sum()
        if "contrast" in self.tasks:
            losses["contrast"] = supervised_contrastive(self.project(token), pictures, self.temperature)
        if "rotation" in self.tasks:
            losses["rotation"] = F.cross_entropy(self.turn(token), turns)
        total = sum((-self.weights[task]).exp() * loss + self.weights[task] for task, loss in losses.items())
        return {"loss": torch.as_tensor(total), **losses}

    def reconstruct(self, image: Tensor) -> Tensor:
        """Images with spoilt groups of patches, those replaced by what is guessed."""
        spoilt, where = self.spoil(image)
        return torch.where(where, self.read(spoilt)[1], image)


AUTHORS: KeyMap = (
    *within(DEIT, r"backbone\.", "model."),
    (r"backbone\.norm\.(.*)", r"model.norm.\1"),
    (r"backbone\.blocks\.(.*)", r"model.blocks.\1"),
    (r"head\.mlp\.(.*)", r"project.\1"),
    (r"head_recons\.mlp\.(.*)", r"restore.mlp.\1"),
    (r"head_recons\.convTrans\.(.*)", r"restore.pixels.\1"),
)
