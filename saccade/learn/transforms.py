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
_opened: WeakKeyDictionary[Any, dict[Any, list[Any]]] = WeakKeyDictionary()


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


class Items(Dataset[tuple[Any, int]]):
    """What is learned from, as (item, label); seeds[i] decides how item i is augmented, not who asks, nor when.

    A kind says how item i is opened, and what becomes of a batch of them.
    """

    kept: list[Any] | None = None  # all items, opened, where memory holds them
    augment: Callable[[Any], Any] | None = None

    def __init__(self, count: int) -> None:
        self.count = count
        self.seeds: list[int] = []

    def open(self, i: int) -> Any:
        """Item i as it is before augmentation."""
        raise NotImplementedError

    def label(self, i: int) -> int:
        return 0

    def normalised(self, batch: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
        """A batch of items as a model takes it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Any, int]:
        item = self.open(i) if self.kept is None else self.kept[i]
        if self.augment is not None:
            generator = torch.default_generator  # the only source that torchvision draws from
            state = generator.get_state()
            generator.manual_seed(self.seeds[i])
            item = self.augment(item)
            generator.set_state(state)
        return item, self.label(i)

    def begin(self, epoch: int, seed: int) -> None:
        """Draw every item's seed anew."""
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**62, (len(self),), generator=generator).tolist()

    def keep(self, source: Any, how: Any, size: int) -> None:
        """Open all now, several at a time, where items of `size` bytes fit into CACHE_BYTES.

        Done once a process and `source`, for all who open it in the same way, `how`.
        """
        if len(self) * size > CACHE_BYTES:
            return
        kept = _opened.setdefault(source, {})
        if how not in kept:
            with ThreadPoolExecutor() as pool:  # Pillow decodes and scales outside Python's lock
                kept[how] = list(pool.map(self.open, range(len(self))))
        self.kept = kept[how]

    def loader(self, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        """Batches (items, labels): all in order, or whole ones only in the sampler's order."""
        workers = WORKERS if self.kept is None else 0
        return DataLoader(self, batch_size, sampler=sampler, drop_last=sampler is not None, num_workers=workers)


class Squares(Items):
    """A split as ((3, S, S) uint8, label).

    Squares of a split that fit into CACHE_BYTES are decoded once a process and shared by all runs on that split. Those
    to be augmented have a margin, reflected, for the crop that shifts them; or `augment` gets squares of `side` pixels.
    """

    def __init__(
        self, split: Split, img_size: int, augment: Callable[[Tensor], Tensor] | None = None, side: int | None = None
    ) -> None:
        super().__init__(len(split))
        self.split = split
        margin = img_size // 8 if augment and side is None else 0
        opened = side or img_size
        self.decode = v2.Compose([evaluation_transform(opened), v2.Pad(margin, padding_mode="reflect")])
        self.augment = augment
        self.keep(split, (opened, margin), 3 * (opened + 2 * margin) ** 2)

    def open(self, i: int) -> Tensor:
        pixels: Tensor = self.decode(self.split[i][0])
        return pixels

    def label(self, i: int) -> int:
        return self.split.labels[i]

    def normalised(self, batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        return normalise(batch, mean, std)


def some(split: Split, number: int, img_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, S, S) normalised: at most `number` pictures from all over a split, and so of many classes."""
    squares = Squares(split, img_size)
    places = sorted({i * len(squares) // number for i in range(number)})
    return normalise(torch.stack([squares[i][0] for i in places]), mean, std)
