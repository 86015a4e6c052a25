"""Faster and lighter transformers: the four classic ways round N^2, and what each mixer costs, measured.

    linear attention   phi(q) (phi(k)^T v) / phi(q) sum_j phi(k_j),  phi = elu + 1: the product from the right first
    Linformer          softmax(q (E k)^T / sqrt(d)) F v, E and F learned, m x N: keys are few
    Nystrom            softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v, m landmarks q~, k~ between q and k
    Fourier            Re F x over places and channels: nothing to learn, N log N

Fournier, Caron, Aloise, "A Practical Survey on Faster and Lighter Transformers", 2023, section 4. Katharopoulos et al.,
"Transformers are RNNs", 2020, equation 5; Wang et al., "Linformer", 2020, equation 7; Xiong et al., "Nystromformer",
2021, equations 13 and 14; Lee-Thorp et al., "FNet", 2021, section 3.2.

The survey compares by complexity; `saccade bench --mixers all` measures it for every mixer here. Off its native grid
Linformer's E and F are resampled (bicubic over the places).
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import affinity, attend
from saccade.ops.sizes import smaller
from saccade.parts.attention import Attention, check_heads
from saccade.parts.position import resample
from saccade.parts.tokens import join, split

CARD = Card(
    "A Practical Survey on Faster and Lighter Transformers",
    authors="Fournier, Caron, Aloise",
    year=2023,
    systems=("survey_efficient",),
    arxiv="2103.14636",
    read="paper",
    keywords="linear attention, Linformer, Nystromformer, FNet, efficient transformers, complexity, survey",
    kinds=("mixer",),
    mixers={"linear_attention": "LinearAttention", "linformer": "Linformer", "nystrom": "Nystrom",
            "fourier_mixing": "FourierMixing"},
    tests=("tests/papers/test_survey_efficient.py", "tests/tools/test_lengths.py"),
)


class LinearAttention(Attention):
    """Attention by the kernel phi(q) . phi(k), phi = elu + 1, over all tokens of (B, *grid, C) and the prefix."""

    weights = False
    template = Template("phi(q) phi(k)^T, phi = elu + 1", "divided by its sum", "sum of v")

    def forward(  # type: ignore[override]
        self, x: Tensor, prefix: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = heads_of(self.qkv(join(x, prefix)), self.heads)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        out = q @ (k.mT @ v) / (q @ k.sum(2)[..., None])
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N C d with heads of d channels, and N C for the sums."""
        tokens = prod(grid) + prefix
        return tokens * site.dim * (4 * site.dim + 2 * site.dim // site.heads + 1)


class Linformer(nn.Module):
    """Attention to `few` learned mixtures of the keys and values of (B, *grid, C), those of all heads alike."""

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q (E k)^T / sqrt(d), E learned", "softmax", "sum of F v, F learned")
    undecayed = ("keys", "values")

    def __init__(self, site: Site, few: int = 64, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.grid = site.heads, site.grid
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)
        spread = few**-0.5
        self.keys = nn.Parameter(torch.randn(*site.grid, few) * spread)
        self.values = nn.Parameter(torch.randn(*site.grid, few) * spread)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = heads_of(self.qkv(x.flatten(1, -2)), self.heads)
        few = (resample(part[None], grid)[0].flatten(0, -2).mT.to(k.dtype) for part in (self.keys, self.values))
        k, v = (mix @ part for mix, part in zip(few, (k, v), strict=True))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)  # mixtures are on no grid

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The mixtures of another grid, for this one."""
        return resample(value[None], self.grid)[0]

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N m C for the mixtures, and 2 N m C to attend to them."""
        return prod(grid) * site.dim * (4 * site.dim + 4 * self.keys.shape[-1])


class Nystrom(nn.Module):
    """Attention through `landmarks` means of consecutive tokens of (B, *grid, C).

    The pseudo-inverse is taken by `steps` steps of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4. Fewer tokens than
    landmarks are all landmarks.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k~^T, q~ k~^T, q~ k^T / sqrt(d), by landmarks", "three softmaxes, the middle inverted",
                        "sum of v")

    def __init__(self, site: Site, landmarks: int = 64, steps: int = 6, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        if landmarks < 1 or steps < 1:
            raise SaccadeError(f"landmarks={landmarks}, steps={steps}: give 1 or more of each")
        self.heads, self.landmarks, self.steps = site.heads, landmarks, steps
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.qkv(x.flatten(1, -2)), self.heads)
        count = smaller(self.landmarks, q.shape[2])
        few_q, few_k = (F.adaptive_avg_pool1d(part.flatten(0, 1).mT, count).mT.unflatten(0, part.shape[:2])
                        for part in (q, k))
        inverse = self.inverted(affinity(few_q, few_k))
        out = attend(q, few_k, inverse @ attend(few_q, k, v))
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    def inverted(self, a: Tensor) -> Tensor:
        """The pseudo-inverse of matrices (..., m, m) with rows of sum 1, as far as the steps bring it."""
        dtype, a = a.dtype, a.to(torch.promote_types(a.dtype, torch.float32))
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = a.mT / a.sum(-2).amax(-1)[..., None, None]  # of a matrix alone, not of the whole batch
        for _ in range(self.steps):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        return z.to(dtype)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2, 4 N m C, m^2 2 C, and 4 m^3 a step and head."""
        tokens = prod(grid)
        few = min(self.landmarks, tokens)
        return (tokens * site.dim * (4 * site.dim + 4 * few) + 2 * few**2 * site.dim
                + 4 * self.steps * site.heads * few**3)


class FourierMixing(nn.Module):
    """Re F x, F the Fourier transform over all places and channels: (B, *grid, C) -> (B, *grid, C). No parameters."""

    ranks = (1, 2, 3)
    template = Template("Fourier, over places and channels", "none", "sum of x, its real part")

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.fft.fftn(wide, dim=tuple(range(1, x.ndim))).real.to(x.dtype).contiguous()

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Fourier transforms are not counted as multiply-adds."""
        return 0

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 C) as queries, keys and values (B, heads, N, C / heads)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v
