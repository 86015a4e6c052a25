"""Folders, CSV files and built-in sets: what is found, how it is split, and what a user is told."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from saccade.core.errors import SaccadeError
from saccade.learn import builtin
from saccade.learn.builtin import CELL, MARGIN, PHOTOGRAPHS, cell_split, planted_box
from saccade.learn.data import ImageSet, open_images
from saccade.learn.splits import draw_splits


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth random picture: its thumb differs from every other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def fill(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
    for number, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            picture(start + 1000 * number + index).save(folder / label / f"{index:02d}.png")
    return folder


def counts(images: ImageSet) -> dict[str, list[int]]:
    parts = {"train": images.train, "val": images.val, "test": images.test}
    return {split: [Counter(part.labels)[label] for label in range(len(images.classes))]
            for split, part in parts.items()}


def message(source: str | Path, **options: bool) -> str:
    with pytest.raises(SaccadeError) as caught:
        open_images(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# built-in sets


@pytest.fixture(scope="module")
def tiles() -> ImageSet:
    return open_images("tiles")


def test_tiles_counts(tiles: ImageSet) -> None:
    assert tiles.name == "tiles" and tiles.classes == sorted(PHOTOGRAPHS) and len(tiles.classes) == 16
    assert counts(tiles) == {"train": [200] * 16, "val": [40] * 16, "test": [80] * 16}
    image, label = tiles.train[0]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), 0)
    assert tiles.notes == []


def test_tiles_of_different_splits_share_no_pixel(tiles: ImageSet) -> None:
    squares: dict[str, list[tuple[str, int, int, int]]] = {name: [] for name in PHOTOGRAPHS}
    for split, part in (("train", tiles.train), ("val", tiles.val), ("test", tiles.test)):
        for path in part.paths:
            photograph, place = path.split("/")
            x, y, side = map(int, place.split("-"))
            assert 32 <= side <= CELL - MARGIN and cell_split(x // CELL, y // CELL) == split
            squares[photograph].append((split, x, y, side))
    for listed in squares.values():
        assert len(set(listed)) == 320
        splits, *places = zip(*listed)
        x, y, side = (np.array(place) for place in places)
        far = (x[:, None] >= (x + side)[None] + MARGIN) | (y[:, None] >= (y + side)[None] + MARGIN)
        other = np.array(splits)[:, None] != np.array(splits)[None]
        assert (far | far.T)[other].all()


def test_tiles_tell_nothing_by_brightness_or_pixel_neighbours(tiles: ImageSet) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, test = (np.stack(part.sources).reshape(len(part), -1).astype(np.float32)
                   for part in (tiles.train, tiles.test))
    assert np.abs(train.mean(1) - 128).max() < 25
    score = neighbors.KNeighborsClassifier(1).fit(train, tiles.train.labels).score(test, tiles.test.labels)
    assert 0.15 < score < 0.25


def test_upright_tiles_are_the_same_squares_as_they_lie(tiles: ImageSet) -> None:
    lying = builtin.tiles(upright=True)
    turned = {name: pixels for part in (tiles.train, tiles.val, tiles.test)
              for name, pixels in zip(part.paths, part.sources, strict=True)}
    assert lying.names == builtin.tiles().names and len(turned) == len(lying.names)
    kept = 0
    for name, pixels in zip(lying.names, lying.images, strict=True):
        ways = [np.rot90(side, turn) for turn in range(4) for side in (pixels, np.rot90(pixels)[:, ::-1])]
        assert any(np.array_equal(turned[name], way) for way in ways)
        kept += np.array_equal(turned[name], pixels)
    assert 0.1 < kept / len(lying.names) < 0.15  # an eighth is neither turned nor mirrored
    photograph = np.asarray(builtin._gray(builtin.skimage_data.brick()), np.float64)
    number = next(n for n, name in enumerate(lying.names) if name.startswith("brick") and name.endswith("-32"))
    x, y = map(int, lying.names[number].split("/")[1].split("-")[:2])
    square = photograph[y : y + 32, x : x + 32]
    expected = np.clip(128 + 48 * (square - square.mean()) / square.std(), 0, 255).round()
    np.testing.assert_array_equal(lying.images[number], expected)


def test_built_in_sets_are_the_same_each_time(tiles: ImageSet) -> None:
    again = open_images("tiles")
    assert tiles.fingerprint == again.fingerprint and tiles.train.paths == again.train.paths
    np.testing.assert_array_equal(np.stack(tiles.test.sources), np.stack(again.test.sources))
    digits = [open_images("digits", seed=seed).fingerprint for seed in (0, 0, 1)]
    assert digits[0] == digits[1] != digits[2]


def test_digits() -> None:
    images = open_images("digits")
    assert images.classes == [str(digit) for digit in range(10)]
    assert (len(images.train), len(images.val), len(images.test)) == (1079, 359, 359)
    totals = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert counts(images)["test"] == [round(total / 5) for total in totals]
    assert len({*images.train.paths, *images.val.paths, *images.test.paths}) == 1797
    image, _ = images.train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert max(np.asarray(images.train[index][0]).max() for index in range(20)) == 255


def test_one_square_decides_a_planted_picture(tiles: ImageSet) -> None:
    images = open_images("planted")
    assert images.classes == ["checks", "lying", "standing"]
    assert [len(part) for part in (images.train, images.val, images.test)] == [1600, 320, 640]
    kinds = {kind: set() for kind in images.classes}
    for pixels, label, name in zip(images.test.sources, images.test.labels, images.test.paths, strict=True):
        left, top, right, bottom = planted_box(name)
        assert (right - left, bottom - top) == (8, 8) and 0 <= left and right <= 32
        kinds[images.classes[label]].add(pixels[top:bottom, left:right].tobytes())
    assert all(len(squares) == 1 for squares in kinds.values()) and len(set.union(*kinds.values())) == 3
    whole = np.stack(tiles.test.sources)[::2] // 2 + 64
    assert ((np.stack(images.test.sources) != whole).sum((1, 2)) <= 64).all()


# folders


def test_folder_is_split_by_class(tmp_path: Path) -> None:
    images = open_images(fill(tmp_path / "photos", {"zebra": 10, "ant": 20, "bee": 3}))
    assert (images.name, images.classes, images.notes) == ("photos", ["ant", "bee", "zebra"], [])
    assert counts(images) == {"train": [12, 1, 6], "val": [4, 1, 2], "test": [4, 1, 2]}
    assert len({*images.train.paths, *images.val.paths, *images.test.paths}) == 33
    path, label = images.test.paths[0], images.test.labels[0]
    assert path.split("/")[0] == images.classes[label]
    np.testing.assert_array_equal(np.asarray(images.test[0][0]), np.asarray(Image.open(tmp_path / "photos" / path)))


def test_seed_decides_the_split_and_dates_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", {"ant": 10, "bee": 10})
    first, other = open_images(root), open_images(root, seed=1)
    assert first.test.paths != other.test.paths and first.fingerprint != other.fingerprint
    os.utime(root / "ant" / "00.png", (1, 1))
    assert open_images(root).fingerprint == first.fingerprint
    picture(77).save(root / "ant" / "00.png")
    assert open_images(root).fingerprint != first.fingerprint


def test_given_splits_nested_files_and_unicode_names(tmp_path: Path) -> None:
    root = tmp_path / "set"
    fill(root / "Train", {"caf\u00e9": 4, "\u732b": 3}, 0)
    fill(root / "validation", {"caf\u00e9": 2, "\u732b": 1}, 5000)
    fill(root / "test", {"cafe\u0301": 1, "\u732b": 2}, 9000)  # the same name as macOS writes it
    nested = root / "Train" / "\u732b" / "b" / "c"
    nested.mkdir(parents=True)
    picture(42).save(nested / "\u00fc x.JPG")
    (root / "Train" / ".DS_Store").write_text("hidden")
    images = open_images(root)
    assert images.classes == ["caf\u00e9", "\u732b"] and images.notes == []
    assert counts(images) == {"train": [4, 4], "val": [2, 1], "test": [1, 2]}
    assert "Train/\u732b/b/c/\u00fc x.JPG" in images.train.paths


def test_val_is_carved_from_train(tmp_path: Path) -> None:
    root = tmp_path / "set"
    fill(root / "train", {"a": 10, "b": 2}, 0)
    fill(root / "test", {"a": 3, "b": 1}, 5000)
    images = open_images(root)
    assert counts(images) == {"train": [8, 1], "val": [2, 1], "test": [3, 1]}
    assert all(path.startswith("train/") for path in images.val.paths)
    assert images.notes == ["val is a fifth of train, drawn with seed 0"]
    (root / "train" / "b" / "01.png").unlink()
    assert message(root) == f"{root}: class b has 1 image and needs 2, one each for train and val"


def test_split_folders_that_do_not_fit(tmp_path: Path) -> None:
    root = fill(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    assert message(root) == (f"{root}: has train/ and val/ but no test/; splits need train/ and test/, or rename val/ "
                             "to test/, or give the folder that holds the class folders")
    fill(root / "test", {"a": 1})
    assert message(root) == f"{root}: class b has no image in test; every split needs every class"
    fill(root / "valid", {"a": 1})
    assert message(root) == f"{root}: val/ and valid/ both mean val; keep one"
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "valid")
    assert "has test/ and val/ but no train/; splits need train/ and test/ (val/ is optional)" in message(root)


def test_class_too_small_to_split(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 5, "bee": 2})
    assert message(root) == f"{root}: class bee has 2 images and needs 3, one each for train, val and test"


def test_folders_without_use(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert message(root) == f"{root}: no images; one sub-folder per class is needed, with image files in it"
    picture(0).save(root / "x.png")
    assert message(root) == f"{root}: 1 image but no sub-folders; make one sub-folder per class"
    fill(root, {"ant": 3})
    assert message(root) == f"{root}: one class only (ant); a classifier needs two or more"
    (root / "bee").mkdir()
    (root / "bee" / "x.heic").write_text("")
    assert message(root) == (f"{root / 'bee'}: the class has no images, only 1 file of other kinds (x.heic); add "
                             "images or remove the folder")
    outer = tmp_path / "outer"
    fill(outer / "inner", {"ant": 3, "bee": 3})
    assert message(outer) == (f"{outer}: one class only (inner); did you mean {outer / 'inner'}, which has 2 "
                              "sub-folders?")


def test_unknown_sources(tmp_path: Path) -> None:
    text = tmp_path / "list.txt"
    text.write_text("")
    assert message(text) == f"{text}: a file, but not a CSV (.csv) with columns path and label; give a folder or a CSV"
    nothing = "no such folder or CSV file, and no built-in set (digits, planted, tiles)"
    assert message("tilse") == f"tilse: {nothing}; did you mean tiles?"
    assert message("/no/where") == f"/no/where: {nothing}"


def test_stray_files_are_noted(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 3, "bee": 3})
    picture(9).save(root / "loose.png")
    (root / "ant" / "notes.txt").write_text("x")
    assert open_images(root).notes == [f"ignored 1 image beside the class folders of {root} (loose.png)",
                                       f"ignored 1 file in {root / 'ant'} that are no images by name (notes.txt)"]


# files


def huge_png(path: Path) -> None:
    """A file of 30000x30000 pixels by its header, and nothing else."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def test_unusable_files_are_noted_and_skipped(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 4, "bee": 4})
    ant = root / "ant"
    for suffix in ("jpg", "png", "webp"):
        whole = tmp_path / f"whole.{suffix}"
        picture(5, (200, 150)).save(whole)
        (ant / f"cut.{suffix}").write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
        whole.unlink()
    (ant / "empty.jpg").write_bytes(b"")
    (ant / "text.jpg").write_text("hello")
    huge_png(ant / "huge.png")
    picture(6, (1, 40)).save(ant / "thin.png")
    picture(7, (2, 2)).save(ant / "two.png")
    images = open_images(root)
    assert sum(counts(images)[split][0] for split in counts(images)) == 5
    assert len(images.notes) == 7 and all(note.startswith("skipped ant/") for note in images.notes)
    told = dict(note.removeprefix("skipped ant/").split(": ", 1) for note in images.notes)
    assert told["text.jpg"] == told["empty.jpg"] == "not an image that Pillow knows"
    assert told["thin.png"] == "1x40 pixels are too few, 2x2 is the least"
    assert told["huge.png"].startswith("too large to open safely, make it smaller (Image size (900000000 pixels)")
    assert told["cut.jpg"].startswith("cannot be decoded (image file is truncated")
    assert "cannot be decoded" in told["cut.png"] and "cannot be decoded" in told["cut.webp"]
    assert message(root, strict=True) == f"ant/cut.jpg: {told['cut.jpg']}; mend or remove it"


def test_class_without_a_readable_file(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 3, "bee": 1})
    (root / "bee" / "00.png").write_text("x")
    assert message(root) == (f"{root}: no image of class bee can be read; the first is bee/00.png: not an image that "
                             "Pillow knows")


def test_many_unusable_files_are_counted(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 3, "bee": 3})
    for index in range(25):
        (root / "ant" / f"bad{index:02d}.jpg").write_text("x")
    notes = open_images(root).notes
    assert len(notes) == 21 and notes[0] == "skipped 25 of 31 files; the first 20 follow"


def test_near_duplicates_across_splits_are_noted(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4}, 0)
    fill(tmp_path / "val", {"a": 2, "b": 2}, 5000)
    fill(tmp_path / "test", {"a": 2, "b": 2}, 9000)
    picture(1, (240, 200)).save(tmp_path / "val" / "a" / "copy.jpg", quality=80)  # train/a/01.png, larger, recompressed
    shutil.copy(tmp_path / "train" / "b" / "02.png", tmp_path / "test" / "b" / "same.png")
    assert open_images(tmp_path).notes == [
        "2 images of val and test nearly equal to one of train, scores will flatter "
        "(val/a/copy.jpg = train/a/01.png, test/b/same.png = train/b/02.png)"]


def test_transparency_and_depth_are_noted(tmp_path: Path) -> None:
    root = fill(tmp_path, {"ant": 3, "bee": 3})
    picture(9).convert("RGBA").save(root / "ant" / "alpha.png")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(root / "bee" / "deep.png")
    assert open_images(root).notes == ["laid 1 image with transparency on white",
                                       "scaled 1 image of 16 bits a pixel to 8 bits"]


def test_workers_and_pickle(tmp_path: Path) -> None:
    images = open_images(fill(tmp_path, {"ant": 3, "bee": 3}))
    again = pickle.loads(pickle.dumps(images))
    assert again.fingerprint == images.fingerprint and again.train.paths == images.train.paths
    loader = DataLoader(images.train, batch_size=1, num_workers=1, collate_fn=list)
    assert [label for [(_, label)] in loader] == images.train.labels
    (tmp_path / images.train.paths[0]).unlink()
    with pytest.raises(SaccadeError, match="cannot be decoded .No such file"):
        images.train[0]


# CSV


def write_csv(folder: Path, header: str, rows: list[str]) -> Path:
    path = folder / "list.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_csv_without_splits(tmp_path: Path) -> None:
    fill(tmp_path, {"x": 10})
    table = write_csv(tmp_path, "\ufeffPath, Label", [f"x/{index:02d}.png,{'ab'[index % 2]}" for index in range(10)])
    images = open_images(table)
    assert (images.name, images.classes) == ("list", ["a", "b"])
    assert counts(images) == {"train": [3, 3], "val": [1, 1], "test": [1, 1]}
    assert all("ab"[int(path[2:4]) % 2] == "ab"[label] for path, label in zip(images.train.paths, images.train.labels))


def test_csv_splits(tmp_path: Path) -> None:
    fill(tmp_path, {"x": 6})
    splits = ["train", "train", "Validation", "valid", "test", "test"]
    rows = [f"x/{index:02d}.png,{'ab'[index % 2]},{split}" for index, split in enumerate(splits)]
    images = open_images(write_csv(tmp_path, "path,label,split", rows))
    assert images.val.paths == ["x/02.png", "x/03.png"] and images.test.paths == ["x/04.png", "x/05.png"]


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole(tmp_path: Path, seed: int) -> None:
    fill(tmp_path, {"x": 40})
    rows = [f"x/{index:02d}.png,{'ab'[index // 4 % 2]},p{index // 4}" for index in range(40)]
    images = open_images(write_csv(tmp_path, "path,label,group", rows), seed=seed)
    groups = {split: {int(path[2:4]) // 4 for path in part.paths}
              for split, part in (("train", images.train), ("val", images.val), ("test", images.test))}
    assert not groups["train"] & groups["val"] and not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"] and set.union(*groups.values()) == set(range(10))
    assert counts(images) == {"train": [12, 12], "val": [4, 4], "test": [4, 4]}


def test_few_and_uneven_groups() -> None:
    labels, groups = list("aaabbb"), ["1", "2", "3", "1", "2", "3"]
    splits = draw_splits("x", labels, groups, ("val", "test"), 0)
    assert sorted(splits[:3]) == sorted(splits[3:]) == ["test", "train", "val"] and splits[:3] == splits[3:]
    rare = ["a"] * 60 + ["b"] * 3
    owners = [f"a{index // 3}" for index in range(60)] + ["b0", "b1", "b2"]
    for seed in range(5):
        splits = draw_splits("x", rare, owners, ("val", "test"), seed)
        assert sorted(splits[60:]) == ["test", "train", "val"]
    with pytest.raises(SaccadeError) as caught:
        draw_splits("x", rare, owners[:60] + ["b0", "b1", "b1"], ("val", "test"), 0)
    assert str(caught.value) == ("x: class b has 2 groups and needs 3, one each for train, val and test; "
                                 "groups never cross splits")
    with pytest.raises(SaccadeError, match="no way was found"):
        draw_splits("x", list("aaabbb"), ["1", "2", "3", "3", "4", "5"], ("val", "test"), 0)


def test_csv_errors(tmp_path: Path) -> None:
    fill(tmp_path, {"x": 6})
    good = [f"x/{index:02d}.png,{'ab'[index % 2]}" for index in range(6)]
    table = write_csv(tmp_path, "path;label", good)
    assert message(table) == (f"{table}: no column path and label; path,label[,split][,group] are needed, the header "
                              "is: path;label")
    write_csv(tmp_path, "path,class", good)
    assert "no column label; " in message(table)
    write_csv(tmp_path, "path,label", [])
    assert message(table) == f"{table}: has a header but no rows"
    write_csv(tmp_path, "path,label", [*good, *(f"lost{index}.png,a" for index in range(5))])
    assert message(table) == (f"{table}: 5 of 11 files are missing (lost0.png, lost1.png, lost2.png, ...); paths are "
                              f"relative to {tmp_path}")
    write_csv(tmp_path, "path,label", [*good, "x/../x/01.png,a"])
    assert message(table) == f"{table}, line 8: x/01.png stands already in line 3"
    write_csv(tmp_path, "path,label", [*good, "x/01.png"])
    assert message(table) == f"{table}, line 8: label is empty"
    write_csv(tmp_path, "path,label,split", [f"{row},{split}" for row, split in zip(good, ["train", "trian"] * 3)])
    assert message(table) == f"{table}, line 3: split is 'trian'; it must be train, val or test"
    write_csv(tmp_path, "path,label,split", [f"{row},train" for row in good])
    assert message(table) == f"{table}: the split column has no test; it needs train and test (val is optional)"
    crossing = [f"{row},{'train' if index < 4 else 'test'},p{index % 4}" for index, row in enumerate(good)]
    write_csv(tmp_path, "path,label,split,group", crossing)
    assert message(table) == (f"{table}: group p0 stands in train and test (2 groups cross splits); put each group in "
                              "one split")
    table.write_bytes(b"path,label\n\xff\xfe,a\n")
    assert message(table).startswith(f"{table}: cannot be read as CSV in UTF-8 (")


def test_an_empty_group_stands_alone(tmp_path: Path) -> None:
    fill(tmp_path, {"x": 20})
    rows = [f"x/{index:02d}.png,{'ab'[index % 2]}," for index in range(20)]
    images = open_images(write_csv(tmp_path, "path,label,group", rows))
    assert counts(images) == {"train": [6, 6], "val": [2, 2], "test": [2, 2]}
