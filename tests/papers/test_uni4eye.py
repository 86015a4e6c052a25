"""Uni4Eye: one model for pictures and volumes, gradient maps, and both guesses learnt."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.uni4eye import Uni4Eye, gradient_map
from saccade.parts.pixels import image_of, patches_of
from tests.papers.learning import ramps


def small(model=None, **options):
    return Uni4Eye(model or create_model("uni4eye_nano"), dim=32, depth=1, heads=2, **options)


def test_gradient_map_beside_a_textbook_sobel():
    """Within the border, in 2D by scipy; a ramp has its slope everywhere within, in 3D too."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = torch.randn(9, 11, dtype=torch.float64)
    wanted = sum((ndimage.sobel(image.numpy(), axis, mode="nearest") / 8) ** 2 for axis in (0, 1)) ** 0.5
    torch.testing.assert_close(gradient_map(image[None, None])[0, 0], torch.from_numpy(wanted), atol=1e-5, rtol=0)
    steps = torch.arange(6.0)
    ramp = (2 * steps[:, None, None] + 3 * steps[:, None] - 6 * steps)[None, None]
    torch.testing.assert_close(gradient_map(ramp)[0, 0, 1:-1, 1:-1, 1:-1], torch.full((4, 4, 4), 7.0))


def test_one_model_takes_pictures_and_volumes():
    torch.manual_seed(0)
    model = create_model("uni4eye_nano", num_classes=5).eval()
    picture, volume = torch.randn(2, 3, 32, 24), torch.randn(2, 3, 16, 12, 8)
    assert model(picture).shape == model(volume).shape == (2, 5)
    assert [x.shape[2:] for x in model.features(volume)] == [(4, 3, 2)] * 2
    shuffled = volume.unflatten(3, (3, 4)).flip(3).flatten(3, 4)  # volumes have no positions: slabs may trade places
    torch.testing.assert_close(model(volume), model(shuffled))
    assert (model(picture) - model(picture.flip(2))).abs().max() > 1e-3
    with pytest.raises(SaccadeError, match=r"\(B, C, H, W, D\)"):
        model(torch.randn(2, 3, 32))


def test_hidden_patches_are_not_seen_and_the_loss_is_of_them():
    torch.manual_seed(0)
    method = small().eval()
    for size in ((16, 24), (8, 12, 8)):
        image = torch.randn(2, 3, *size)
        hidden = method.draw(image)
        assert hidden.float().mean() == 0.5
        guesses = method.guesses(image, hidden)
        other = torch.where(hidden[..., None], torch.randn(2, hidden.shape[1], 3 * 4 ** len(size)),
                            torch.full((), float("nan")))
        kept = torch.where(hidden[..., None], other, patches_of(image, 4))
        again = method.guesses(image_of(kept, 4, tuple(side // 4 for side in size)), hidden)
        for what in guesses:
            torch.testing.assert_close(guesses[what], again[what])
        method.draw = lambda image, hidden=hidden: hidden
        off = (guesses["edges"] - patches_of(gradient_map(image), 4)).square().mean(-1)
        torch.testing.assert_close(method(image)["edges"], (off * hidden).sum() / hidden.sum())
        del method.draw


def test_both_are_learnt_in_turns():
    torch.manual_seed(0)
    method = small()
    pictures, ramp = ramps(8, 16), torch.linspace(-1, 1, 16)
    volumes = torch.stack([(ramp[:, None, None] * a + ramp[:, None] * b).expand(3, 16, 16, 8)
                           for a, b in torch.randn(8, 2)])
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        for images in (pictures, volumes):
            optimizer.zero_grad()
            out = method(images)
            out["loss"].backward()
            optimizer.step()
            losses.append(out["loss"].item())
    assert losses[-2] < 0.5 * losses[0] and losses[-1] < 0.5 * losses[1]
    assert method.reconstruct(volumes).shape == volumes.shape


def test_other_hosts_and_bad_input():
    assert small(create_model("deit_nano"))(torch.randn(2, 3, 32, 32))["loss"] > 0
    with pytest.raises(SaccadeError, match="takes no volumes"):
        small(create_model("deit_nano"))(torch.randn(2, 3, 8, 8, 8))
    with pytest.raises(SaccadeError, match="no whole number of patches"):
        small()(torch.randn(2, 3, 30, 32))
