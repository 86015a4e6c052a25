"""Pictures become tensors: S x S squares of bytes, decoded once, augmented one by one, normalised by the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from saccade.core.optional import optional

if TYPE_CHECKING:
    from saccade.learn.data import Split
    from saccade.learn.train import Recipe

v2 = optional("torchvision.transforms.v2", extra="train")

CACHE_BYTES = 512 * 2**20  # a split whose squares take less is decoded once and kept
WORKERS = 2  # processes that decode a split which is not kept
_decoded: WeakKeyDictionary[Split, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


def evaluation_transform(img_size: int) -> Any:
    """PIL image -> (3, S, S) uint8: the shorter side scaled to S, then the central square. `normalise` comes after."""
    return v2.Compose([v2.Resize(img_size), v2.CenterCrop(img_size), v2.PILToTensor()])


def training_transform(img_size: int, recipe: Recipe) -> Any | None:
    """What training adds, (3, S + 2m, S + 2m) uint8 -> (3, S, S) uint8: a shift by up to m = S // 8, a mirror image."""
    if not recipe.augment:
        return None
    crop = v2.RandomCrop(img_size)  # takes less than half the time of RandomResizedCrop
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if recipe.flip else crop


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) uint8 -> float32: (pixels / 255 - mean) / std."""
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    normalised: Tensor = v2.functional.normalize(scaled, list(mean), list(std))
    return normalised


class Squares(Dataset[tuple[Tensor, int]]):
    """A split as ((3, S, S) uint8, label); seeds[i] decides how picture i is augmented, not who asks, nor when.

    Squares of a split that fit into CACHE_BYTES are decoded once a process and shared by all runs on that split. Those
    to be augmented have a margin, reflected, for the crop that shifts them; or `augment` gets squares of `side` pixels.
    """

    def __init__(
        self, split: Split, img_size: int, augment: Callable[[Tensor], Tensor] | None = None, side: int | None = None
    ) -> None:
        self.split = split
        margin = img_size // 8 if augment and side is None else 0
        opened = side or img_size
        self.decode = v2.Compose([evaluation_transform(opened), v2.Pad(margin, padding_mode="reflect")])
        self.augment = augment
        self.seeds: list[int] = []
        self.kept: Tensor | None = None
        if len(split) * 3 * (opened + 2 * margin) ** 2 <= CACHE_BYTES:
            kept = _decoded.setdefault(split, {})
            if (opened, margin) not in kept:
                with ThreadPoolExecutor() as pool:  # Pillow decodes and scales outside Python's lock
                    kept[opened, margin] = torch.stack(list(pool.map(self._open, range(len(split)))))
            self.kept = kept[opened, margin]

    def _open(self, i: int) -> Tensor:
        pixels: Tensor = self.decode(self.split[i][0])
        return pixels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = self._open(i) if self.kept is None else self.kept[i]
        if self.augment is not None:
            generator = torch.default_generator  # the only source that torchvision draws from
            state = generator.get_state()
            generator.manual_seed(self.seeds[i])
            pixels = self.augment(pixels)
            generator.set_state(state)
        return pixels, self.split.labels[i]

    def begin(self, epoch: int, seed: int) -> None:
        """Draw every picture's seed anew."""
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**62, (len(self),), generator=generator).tolist()

    def loader(self, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        """Batches ((B, 3, S, S) uint8, (B,)): all in order, or whole ones only in the sampler's order."""
        workers = WORKERS if self.kept is None else 0
        return DataLoader(self, batch_size, sampler=sampler, drop_last=sampler is not None, num_workers=workers)


def some(split: Split, number: int, img_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, S, S) normalised: at most `number` pictures from all over a split, and so of many classes."""
    squares = Squares(split, img_size)
    places = sorted({i * len(squares) // number for i in range(number)})
    return normalise(torch.stack([squares[i][0] for i in places]), mean, std)
