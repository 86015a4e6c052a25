"""Volumes from NIfTI and .npy files: scaled, standardised, cropped; what is none told by its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saccade import SaccadeError
from saccade.learn.pretrain import Recipe
from saccade.learn.volumes import cube, open_volumes, read_volume

RECIPE = Recipe(img_size=8, smallest_crop=0.3)


def volumes(root: Path, count: int = 3) -> Path:
    root.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        np.save(root / f"{number}.npy", random.normal(100, 20, (10, 12, 9)))
    return root


def test_nifti_is_turned_to_one_orientation(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    mirrored = nibabel.Nifti1Image(np.ascontiguousarray(values[::-1].transpose(0, 2, 1)),
                                   np.array([[-1., 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    mirrored.to_filename(tmp_path / "b.nii")
    wanted = torch.from_numpy(values).float()
    assert torch.equal(read_volume(tmp_path / "a.nii.gz"), wanted)
    assert torch.equal(read_volume(tmp_path / "b.nii"), wanted)
    assert [path.name for path in open_volumes(tmp_path).files] == ["a.nii.gz", "b.nii"]


def test_cube():
    """A ramp stays one along its axis, longer and shorter axes alike; extremes and units do not matter."""
    ramp = torch.linspace(0, 1, 30)[:, None, None].expand(30, 5, 8)
    found = cube(ramp, 8)
    assert found.shape == (1, 8, 8, 8)
    assert found.mean().abs() < 1e-5 and found.std() == pytest.approx(1, abs=1e-3)
    assert (found[0].diff(dim=0) > 0).all() and found[0].diff(dim=1).abs().max() < 1e-5
    torch.testing.assert_close(cube(1000 * ramp - 200, 8), found, atol=1e-4, rtol=0)
    assert torch.isfinite(cube(torch.ones(4, 4, 4), 8)).all()


def test_crops_are_cubes_of_the_volume(tmp_path):
    items = open_volumes(volumes(tmp_path)).items(RECIPE, 1)
    items.begin(0, 0)
    first, again, second = items[0][0], items[0][0], items[1][0]
    assert first.shape == (1, 8, 8, 8) and torch.equal(first, again) and not torch.equal(first, second)
    batch = items.normalised(torch.stack([first, second]), (), ())
    assert batch.shape == (2, 3, 8, 8, 8) and torch.equal(batch[:, 0], batch[:, 2])


def test_a_mirrored_crop_is_a_part_of_the_volume(tmp_path):
    """Of a ramp along the first axis every crop is a ramp, some of them falling."""
    (tmp_path / "ramps").mkdir()
    for number in range(8):
        np.save(tmp_path / f"ramps/{number}.npy", np.tile(np.arange(12.0)[:, None, None], (1, 12, 12)))
    items = open_volumes(tmp_path / "ramps").items(RECIPE, 1)
    items.begin(0, 0)
    falling = 0
    for number in range(8):
        steps = items[number][0][0].diff(dim=0)
        falls = bool(steps.mean() < 0)
        assert (steps <= 1e-6).all() if falls else (steps >= -1e-6).all()
        assert items[number][0][0].diff(dim=1).abs().max() < 1e-5
        falling += falls
    assert 0 < falling < 8


def test_what_is_no_volume(tmp_path):
    cases = {
        "picture": (np.ones((8, 8)), "it is a picture"), "slice": (np.ones((8, 8, 1, 1)), "it is a picture|one slice"),
        "film": (np.ones((4, 4, 4, 3)), "save one volume a file"), "holes": (np.full((4, 4, 4), np.nan), "finite"),
    }
    for name, (values, said) in cases.items():
        root = volumes(tmp_path / name)
        np.save(root / "wrong.npy", values)
        with pytest.raises(SaccadeError, match=rf"wrong\.npy: .*({said})"):
            open_volumes(root, strict=True)
        found = open_volumes(root)
        assert len(found.files) == 3 and "wrong.npy" in found.notes[0]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/broken.nii.gz").write_bytes(b"no volume")
    with pytest.raises(SaccadeError, match=r"none of 1 can be used; the first is .*broken\.nii\.gz: "):
        open_volumes(tmp_path / "alone")
