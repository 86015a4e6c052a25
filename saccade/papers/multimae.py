"""MultiMAE: a picture, its depth and its classes guess each other.

Every modality is cut into patches over the same grid, each by its own embedding. Of all of them together a sixth is
shown to one transformer; how much of each modality is drawn anew for every picture,
    (l_1, ..., l_T) ~ Dirichlet(alpha, ..., alpha),   l_t of the visible tokens from modality t,
so that sometimes one alone has to tell the others. For each modality a small decoder asks: its queries are that
modality's own places (a mask token where hidden), which look once at all visible tokens, marked by modality and place.
    loss = sum over modalities of the mean error at their hidden patches: squared for colours, absolute for depth, cross
    entropy for classes.

Bachmann, Mizrahi, Atanov, Zamir, "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022, section 3.

Any grid: the fixed positions of the native one are resampled (bicubic; linear for classes and in the decoders). Quirks
kept: the tokens have no last norm, and a classifier averages all of them, the global one among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, without_first_axis
from saccade.core.site import Site
from saccade.parts.attention import Attention, CrossAttention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.head import Pooling
from saccade.parts.host import gathered
from saccade.parts.mlp import Mlp
from saccade.parts.pixels import check_ratio, image_of, normalised, patches_of, whole_patches
from saccade.parts.plain import DEIT_SIZES, Plain
from saccade.parts.position import resample, sincos
from saccade.parts.stem import PatchEmbed

CARD = Card(
    "MultiMAE: Multi-modal Multi-task Masked Autoencoders",
    authors="Bachmann, Mizrahi, Atanov, Zamir",
    year=2022,
    systems=("multimae",),
    arxiv="2204.01678",
    code="EPFL-VILAB/MultiMAE@66910f5",
    licence="CC-BY-NC-4.0",
    read="paper",
    keywords="self-supervised learning, masked autoencoder, multi-modal, multi-task, depth, semantic segmentation, "
             "Dirichlet sampling, missing modalities",
    kinds=("backbone", "pretraining"),
    methods={"multimae": "MultiMAE"},
    # All three modalities and no head: it loads into `modalities=MODALITIES, num_classes=0`.
    weights={"multivit_base": Weights("https://github.com/EPFL-VILAB/MultiMAE/releases/download/pretrained-weights/"
                                      "multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth",
                                      sha256="afff3f8c", licence="CC-BY-NC-4.0")},
    goldens=("multimae_tiny", "multivit_tiny"),
    tests=("tests/papers/test_multimae.py",),
)

MODALITIES = ("rgb", "depth", "semseg")
CLASSES = 133  # of the semantic maps, COCO's
SHRINK = 4  # semantic maps have a quarter of the picture's sides
Inputs = Mapping[str, Tensor]


class SemanticEmbed(nn.Module):
    """Class numbers (B, H / 4, W / 4) -> tokens (B, h, w, dim): an embedding of `width` a class, then patches."""

    def __init__(self, dim: int, patch: int, classes: int = CLASSES, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.proj = nn.Conv2d(width, dim, patch // SHRINK, stride=patch // SHRINK)

    def forward(self, labels: Tensor) -> Tensor:
        return self.proj(self.embed(labels).movedim(-1, 1)).movedim(1, -1).contiguous()


def positions(native: tuple[int, ...], grid: tuple[int, ...], dim: int, like: Tensor, linear: bool) -> Tensor:
    """Sines and cosines (1, *grid, dim) of the native grid, resampled: rows first."""
    return resample(sincos(native, dim, order=(0, 1), device=like.device)[None], grid, linear).to(like.dtype)


class MultiViT(Plain):
    """A Plain of several modalities: {"rgb": (B, 3, H, W), "depth": (B, 1, H, W), "semseg": (B, H / 4, W / 4)}.

    Any of those it was built for may be missing; a tensor alone is "rgb". Feature maps are those of the first given.
    """

    def __init__(self, *args: Any, modalities: Sequence[str] = ("rgb",), patch: int = 16, **options: Any) -> None:
        if set(modalities) - set(MODALITIES) or not modalities:
            raise SaccadeError(f"modalities={modalities!r}: choose some of {', '.join(MODALITIES)}")
        self.modalities = tuple(modalities)
        super().__init__(*args, patch=patch, global_pool=options.pop("global_pool", "avg"), **options)
        dim, chans = self.num_features, {"rgb": self.in_chans, "depth": 1}
        self.patch = patch
        self.stem: Any = nn.ModuleDict({
            name: SemanticEmbed(dim, patch) if name == "semseg" else PatchEmbed(2, chans[name], dim, stride=patch)
            for name in modalities})
        self.norm = nn.Identity()
        self.register_parameter("position", None)

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        self.global_pool = global_pool or self.global_pool
        if self.global_pool not in ("avg", ""):
            raise SaccadeError(f'global_pool={self.global_pool!r}: the tokens of all modalities are averaged, "avg", '
                               'or given as they are, ""')
        self.num_classes = num_classes
        self.pool = None
        self.head_norm = LAYER_NORM(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        absent = tuple(f"stem.{name}" for name in MODALITIES if name not in self.modalities)
        self.removed = absent if num_classes else ("head", *absent)

    def embedded(self, inputs: Tensor | Inputs) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """The tokens (B, N, C) of each modality that is given, with their positions, and their grid."""
        given = {"rgb": inputs} if isinstance(inputs, Tensor) else inputs
        if not given or set(given) - set(self.modalities):
            raise SaccadeError(f"modalities {sorted(given)} are given: this model was built for "
                               f"{', '.join(self.modalities)}")
        found, grids = {}, {}
        for name, stem in self.stem.items():
            if name in given:
                x = stem(given[name])
                grids[name] = tuple(x.shape[1:-1])
                found[name] = (x + positions(self.grid, grids[name], x.shape[-1], x, name == "semseg")).flatten(1, 2)
        if len(grids) > 1 and len(set(grids.values())) > 1:
            raise SaccadeError(f"modalities of different sizes: their grids of patches are {grids}; a semantic map "
                               "has a quarter of the picture's sides")
        return found, next(iter(grids.values()))

    def tokens(self, image: Tensor | Inputs) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, 1 + T N, C) that enters the first block, and the grid of N."""
        found, grid = self.embedded(image)
        if len(found) > 1 and any(type(block.mixer) is not Attention for block in self.blocks):
            raise SaccadeError("several modalities have no grid in common for another mixer than attention: give one")
        return self.beside_global(torch.cat(list(found.values()), 1)), grid

    def beside_global(self, tokens: Tensor) -> Tensor:
        """The global token before others, (B, 1 + M, C)."""
        assert self.prefix is not None
        return torch.cat([self.prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], 1)

    def features(self, image: Tensor | Inputs) -> list[Tensor]:
        """The map of the first modality after each block, (B, C, *grid)."""
        tokens, grid = self.tokens(image)
        maps = []
        for block in self.blocks:
            tokens = block(tokens, self.prefix_count, grid)
            first = tokens[:, self.prefix_count:self.prefix_count + grid[0] * grid[1]]
            maps.append(first.unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores of the mean of all tokens."""
        return self.head(self.head_norm(tokens.mean(1))) if self.global_pool else tokens


class Answer(nn.Module):
    """What one modality looks like, from all that is visible: `pixels` numbers for each of its N patches.

    x = cross(norm(own places), norm(visible)); x += mlp(norm(x)); blocks; linear. (Bachmann et al., section 3.3.)
    """

    def __init__(
        self, in_dim: int, pixels: int, modalities: Sequence[str], dim: int, depth: int, heads: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.missing = nn.Parameter(torch.randn(dim) * 0.02)
        self.modality = nn.ParameterDict({name: nn.Parameter(torch.randn(dim) * 0.02) for name in modalities})
        self.query_norm, self.context_norm, self.norm = LAYER_NORM(dim), LAYER_NORM(dim), LAYER_NORM(dim)
        self.cross, self.mlp = CrossAttention(dim, heads), Mlp(dim)
        site = Site(dim, heads)
        self.blocks = nn.Sequential(*(Block(site, Attention(site)) for _ in range(depth)))
        self.pixels = nn.Linear(dim, pixels)

    def forward(
        self, name: str, tokens: Tensor, seen: Tensor, given: Sequence[str], native: tuple[int, ...],
        grid: tuple[int, ...],
    ) -> Tensor:
        """(B, N, pixels) of modality `name`, from tokens (B, 1 + M, C), M of those `given` with the numbers `seen`."""
        tokens = self.embed(tokens)
        B, _, dim = tokens.shape
        count = torch.Size(grid).numel()
        place = positions(native, grid, dim, tokens, linear=True).flatten(1, 2)
        marks = torch.cat([place + self.modality[one] for one in given], 1)  # (1, T N, dim)
        index = seen[..., None].expand(-1, -1, dim)
        whole = self.missing.to(tokens.dtype).expand(B, marks.shape[1], -1).scatter(1, index, tokens[:, 1:]) + marks
        context = torch.cat([whole.gather(1, index), tokens[:, :1]], 1)
        if name in given:
            first = list(given).index(name) * count
            own = whole[:, first:first + count]
        else:
            own = (self.missing + self.modality[name] + place).expand(B, -1, -1)
        x = self.cross(self.query_norm(own), self.context_norm(context))
        return self.pixels(self.blocks(x + self.mlp(self.norm(x))))


class MultiMAE(nn.Module):
    """Modalities of the same pictures (a tensor alone is "rgb") -> {"loss", and each modality's}.

    `model` is a MultiViT; the share `ratio` of all patches of all modalities is hidden. Each decoder has `depth` blocks
    of `dim` channels after its look. `alpha` of the Dirichlet distribution: large ones share evenly.
    """

    takes = ("pictures", "scenes")

    def __init__(
        self, model: nn.Module, ratio: float = 5 / 6, dim: int = 256, depth: int = 2, heads: int = 8, alpha: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(model, MultiViT):
            raise SaccadeError("multimae trains a model of several modalities, such as multivit_base, and "
                               f"{type(model).__name__} is none")
        if alpha <= 0:
            raise SaccadeError(f"multimae: alpha={alpha}; give one above 0")
        self.model, self.ratio, self.alpha = model, check_ratio("multimae", ratio), alpha
        sizes = {"rgb": model.in_chans * model.patch**2, "depth": model.patch**2,
                 "semseg": CLASSES * (model.patch // SHRINK) ** 2}
        self.answers = nn.ModuleDict({
            name: Answer(model.num_features, sizes[name], model.modalities, dim, depth, heads)
            for name in model.modalities})

    def draw(self, batch: int, given: int, count: int, device: torch.device) -> Tensor:
        """Numbers (B, M) of the visible tokens among `given` x `count`: Dirichlet shares, at random within each."""
        total = max(1, round((1 - self.ratio) * given * count))
        shares = torch.distributions.Dirichlet(torch.full((given,), self.alpha)).sample((batch,)).to(device)
        rank = torch.rand(batch, given, count, device=device).argsort(-1).argsort(-1)
        wanted = rank < (shares * total).round()[..., None]
        # Rounding, and shares larger than a modality, are made good by others at random.
        order = (~wanted).flatten(1).float() + torch.rand(batch, given * count, device=device)
        return order.argsort(1)[:, :total].sort(1).values

    def guesses(self, inputs: Inputs, seen: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """(B, N, pixels) of every modality of the model, and the visible tokens' numbers (drawn if not given)."""
        tokens, grid = self.model.embedded(inputs)
        given = list(tokens)
        whole = torch.cat(list(tokens.values()), 1)
        if seen is None:
            seen = self.draw(len(whole), len(given), torch.Size(grid).numel(), whole.device)
        x = self.model.beside_global(gathered(whole, seen))
        for block in self.model.blocks:
            x = block(x, 1, ())
        return {name: answer(name, x, seen, given, self.model.grid, grid)
                for name, answer in self.answers.items()}, seen

    def forward(self, inputs: Tensor | Inputs) -> dict[str, Tensor]:
        given = {"rgb": inputs} if isinstance(inputs, Tensor) else inputs
        for name, value in given.items():
            whole_patches("multimae", value[:, None] if name == "semseg" else value, self.side(name))
        guesses, seen = self.guesses(given)
        count = next(iter(guesses.values())).shape[1]
        hidden = torch.ones(len(seen), len(given) * count, dtype=torch.bool, device=seen.device).scatter(1, seen, False)
        losses, names = {}, [name for name in self.model.modalities if name in given]
        for name, part in zip(names, hidden.split(count, 1), strict=True):
            off = self.errors(name, guesses[name], given[name])
            losses[name] = (off * part).sum() / part.sum().clamp(min=1)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def side(self, name: str) -> int:
        """Side of a modality's patch, in its own pixels."""
        return self.model.patch // SHRINK if name == "semseg" else self.model.patch

    def errors(self, name: str, guess: Tensor, truth: Tensor) -> Tensor:
        """The mean error in each patch (B, N)."""
        if name == "semseg":
            labels = patches_of(truth[:, None], self.side(name))
            scores = guess.unflatten(-1, (CLASSES, -1)).movedim(2, 1)
            return F.cross_entropy(scores, labels, reduction="none").mean(-1)
        pixels = patches_of(truth, self.side(name))
        return (guess - pixels).abs().mean(-1) if name == "depth" else (guess - normalised(pixels)).square().mean(-1)

    def pictures(self, guesses: Inputs, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Guesses as pictures (B, C, H, W), classes as scores (B, classes, H / 4, W / 4)."""
        return {name: image_of(guess, self.side(name), grid) for name, guess in guesses.items()}


SIZES: dict[str, dict[str, Any]] = {
    **{f"multivit_{size}": dict(shape) for size, shape in DEIT_SIZES.items()},
    "multivit_nano": dict(dim=64, depth=2, heads=2, patch=8, img_size=32),
}


def multimae(
    dim: int, depth: int, heads: int, patch: int = 16, modalities: Sequence[str] = ("rgb",), mixer: Any = None,
    **common: Any,
) -> MultiViT:
    """A transformer of a size, for some of rgb, depth, semseg."""
    return MultiViT(dim, depth, heads, modalities=modalities, patch=patch, mixer=Attention, replace=mixer, **common)


AUTHORS: KeyMap = (
    (r"global_tokens", "prefix", without_first_axis),
    (r"input_adapters\.semseg\.class_emb\.(.*)", r"stem.semseg.embed.\1"),
    Dropped(r"(?:in|out)put_adapters\.\w+\.pos_emb", "fixed sines and cosines"),
    (r"input_adapters\.(\w+)\.proj\.(.*)", r"stem.\1.proj.\2"),
    (r"output_adapters\.cls\.norm\.(.*)", r"head_norm.\1"),
    (r"output_adapters\.cls\.head\.(.*)", r"head.\1"),
    Dropped(r"output_adapters\.(?!cls\.).*", "decoders of pre-training"),
    (r"encoder\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
    (r"encoder\.(.*)", r"blocks.\1"),
)
# The names of the decoders, for those who go on with pre-training.
DECODERS: KeyMap = (
    (r"output_adapters\.(\w+)\.mask_token", r"answers.\1.missing", torch.flatten),
    (r"output_adapters\.(\w+)\.task_embeddings\.(\w+)", r"answers.\1.modality.\2", torch.flatten),
    (r"output_adapters\.(\w+)\.decoder\.(.*)", r"answers.\1.cross.\2"),
    (r"output_adapters\.(\w+)\.out_norm\.(.*)", r"answers.\1.norm.\2"),
    (r"output_adapters\.(\w+)\.decoder_transformer\.(\d+)\.attn\.(.*)", r"answers.\1.blocks.\2.mixer.\3"),
    (r"output_adapters\.(\w+)\.decoder_transformer\.(.*)", r"answers.\1.blocks.\2"),
    (r"output_adapters\.(\w+)\.out_proj\.(.*)", r"answers.\1.pixels.\2"),
    (r"output_adapters\.(\w+)\.proj_context\.(.*)", r"answers.\1.embed.\2"),
    (r"output_adapters\.(\w+)\.(query_norm|context_norm|mlp)\.(.*)", r"answers.\1.\2.\3"),
)
TAPS = {"cls": "head"}


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """What a golden's caller said that its inputs do not tell."""
    return {"modalities": tuple(golden["source"]["args"]["in_domains"])}
