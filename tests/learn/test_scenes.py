"""Scenes of several modalities: one crop for all, depth standardised, what does not fit told by its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import SaccadeError
from saccade.learn.pretrain import Recipe
from saccade.learn.scenes import open_scenes, standardised

RECIPE = Recipe(img_size=16, smallest_crop=0.3)


def scenes(root: Path, count: int = 4, height: int = 40, width: int = 48) -> Path:
    """Pictures of a ramp, whose depth and labels are read off its red channel."""
    for folder in ("rgb", "depth", "labels"):
        (root / folder / "room").mkdir(parents=True, exist_ok=True)
    ramp = np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))
    for number in range(count):
        Image.fromarray(np.stack([ramp] * 3, -1)).save(root / f"rgb/room/{number}.png")
        Image.fromarray(ramp // 2).save(root / f"labels/room/{number}.png")
        if number % 2:
            np.save(root / f"depth/room/{number}.npy", ramp.astype(np.float64))
        else:
            Image.fromarray(ramp.astype(np.uint16) * 256).save(root / f"depth/room/{number}.png")
    return root


def test_one_crop_for_all(tmp_path):
    """Everywhere in every crop the depth is the red channel, and the label half of it."""
    found = open_scenes(scenes(tmp_path))
    assert found.modalities == ("rgb", "depth", "semseg") and len(found.files) == 4 and not found.notes
    items = found.items(RECIPE, 1)
    items.begin(0, 0)
    crops, mirrored = [], 0
    for number in range(4):
        crop, _ = items[number]
        red, depth, labels = crop["rgb"][0].float(), crop["depth"][0], crop["labels"][0].float()
        assert crop["rgb"].shape == (3, 16, 16) and depth.shape == labels.shape == (16, 16)
        scale = 1 if number % 2 else 256
        assert (red - depth / scale).abs().max() < 1.5
        assert (red / 2 - labels).abs().max() < 12  # the nearest of few pixels, twice
        assert torch.equal(crop["depth"], items[number][0]["depth"])
        mirrored += bool(red[0, 0] > red[0, -1])
        crops.append(red)
    assert not torch.equal(crops[0], crops[1]) and 0 < mirrored < 4


def test_as_the_model_takes_them(tmp_path):
    items = open_scenes(scenes(tmp_path)).items(RECIPE, 0)
    (batch, _), = items.loader(4)
    inputs = items.normalised(batch, (0.5,) * 3, (0.5,) * 3)
    assert {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()} == {
        "rgb": ((4, 3, 16, 16), torch.float32), "depth": ((4, 1, 16, 16), torch.float32),
        "semseg": ((4, 4, 4), torch.int64)}
    torch.testing.assert_close(inputs["depth"][0], inputs["depth"][1], atol=1e-2, rtol=0)  # 16 bits and floats alike
    assert torch.equal(inputs["semseg"], batch["labels"][:, 0, 2::4, 2::4].long())


def test_depth_without_its_extremes():
    depth = torch.arange(100.0).view(1, 1, 10, 10)[..., torch.randperm(10)]
    wild = depth.clone()
    wild[depth >= 95] = 1e6
    middle = torch.arange(10.0, 90)
    wanted = (depth - middle.mean()) / middle.std()
    torch.testing.assert_close(standardised(depth), wanted)
    torch.testing.assert_close(standardised(wild)[depth < 95], wanted[depth < 95])
    assert torch.isfinite(standardised(torch.ones(2, 1, 4, 4))).all()


def test_fingerprint_is_of_the_contents(tmp_path):
    one, other = (open_scenes(scenes(tmp_path / name)).fingerprint for name in ("a", "b"))
    assert one == other
    np.save(tmp_path / "b/depth/room/1.npy", np.zeros((40, 48)))
    assert open_scenes(tmp_path / "b").fingerprint != one


def test_what_does_not_fit_is_named(tmp_path):
    def broken(name: str, change) -> Path:
        root = scenes(tmp_path / name)
        change(root)
        return root

    cases = [
        ("partner", lambda root: (root / "depth/room/2.png").unlink(), r"rgb/room/2\.png: has no partner in .*depth"),
        ("twice", lambda root: np.save(root / "depth/room/2.npy", np.ones((40, 48))), r"2\.png: 2\.npy has the same"),
        ("sizes", lambda root: np.save(root / "depth/room/1.npy", np.ones((20, 24))),
         r"depth/room/1\.npy: 24x20 pixels, and .*rgb/room/1\.png has 48x40: modalities of different sizes"),
    ]
    for name, change, said in cases:
        with pytest.raises(SaccadeError, match=said):
            open_scenes(broken(name, change))
    unusable = [
        ("text", lambda root: (root / "depth/room/1.npy").write_text("no array"), r"depth/room/1\.npy: "),
        ("colours", lambda root: Image.new("RGB", (48, 40)).save(root / "labels/room/1.png"), "class numbers are one"),
        ("class", lambda root: Image.new("L", (48, 40), 133).save(root / "labels/room/1.png"), "class 133 is outside"),
        ("fractions", lambda root: ((root / "labels/room/1.png").unlink(),
                                    np.save(root / "labels/room/1.npy", np.ones((40, 48)))), "save integers"),
        ("infinite", lambda root: np.save(root / "depth/room/1.npy", np.full((40, 48), np.inf)), "not finite"),
    ]
    for name, change, said in unusable:
        root = broken(name, change)
        with pytest.raises(SaccadeError, match=said):
            open_scenes(root, strict=True)
        found = open_scenes(root)
        assert len(found.files) == 3 and any(note.startswith("skipped") and "room/1" in note for note in found.notes)
