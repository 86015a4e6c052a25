"""SimMIM: what is hidden is not seen, by any host, and guessing is learnt."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.simmim import SimMIM
from saccade.parts.masking import spread
from tests.papers.learning import losses, ramps

HOSTS = ("deit_nano", "swin_nano", "convnext_nano", "biformer_nano", "nat_nano", "timm vit", "timm swin")


def host(name):
    if not name.startswith("timm"):
        return create_model(name)
    timm = pytest.importorskip("timm")
    if name == "timm vit":
        return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=0, embed_dim=24, depths=(1, 1, 1),
                             num_heads=(1, 2, 4), window_size=4)


@pytest.mark.parametrize("name", HOSTS)
def test_what_is_hidden_is_not_seen_and_the_loss_reaches_the_host(name):
    torch.manual_seed(0)
    method = SimMIM(host(name)).eval()
    side = 64 if name.startswith("timm") else 32
    image, other = torch.randn(2, 3, side, side), torch.randn(2, 3, side, side)
    hidden = method.draw(image)
    pixels = spread(hidden, (side, side))[:, None]
    guess = method.guess(image, hidden)
    torch.testing.assert_close(guess, method.guess(torch.where(pixels, other, image), hidden))
    assert guess.shape == image.shape and (guess - method.guess(other, hidden)).abs().max() > 1e-3
    method.draw = lambda image: hidden
    off = [(guess - image)[b, :, y, x].abs().mean() for b in range(2) for y in range(side) for x in range(side)
           if pixels[b, 0, y, x]]
    loss = method(image)["loss"]
    torch.testing.assert_close(loss, torch.stack(off).mean())
    loss.backward()
    assert next(p for p in method.model.parameters() if p.ndim == 4).grad.abs().max() > 0
    assert method.missing.grad.abs().max() > 0


def test_guessing_is_learnt():
    torch.manual_seed(0)
    method = SimMIM(create_model("swin_nano"))
    images = ramps(16)
    found = losses(method, images, 40)
    assert found[-1] < 0.5 * found[0]
    assert method.reconstruct(images).shape == images.shape


def test_bad_input():
    with pytest.raises(SaccadeError, match="no stem that gives them"):
        SimMIM(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(SaccadeError, match="patch=6"):
        SimMIM(create_model("swin_nano"), patch=6)
    with pytest.raises(SaccadeError, match="36 x 32 pixels"):
        SimMIM(create_model("swin_nano"))(torch.zeros(1, 3, 36, 32))
