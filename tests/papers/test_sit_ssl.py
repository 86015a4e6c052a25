"""SiT: groups cover what they should, each part of the loss is what it says, and all are learnt."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.sit_ssl import SelfSupervisedTransformer, groups
from saccade.parts.masking import spread


def small(model=None, **options):
    return SelfSupervisedTransformer(model or create_model("deit_nano"), out_dim=32, hidden=64, **options)


def test_groups_cover_at_least_their_share_and_hardly_more():
    torch.manual_seed(0)
    spoilt = groups(200, (8, 10), 0.5, 3)
    share = spoilt.flatten(1).float().mean(1)
    assert share.min() >= 0.5 and share.max() <= 0.5 + 9 / 80  # the last group goes over by less than its area
    beside = (spoilt[:, :, 1:] & spoilt[:, :, :-1]).float().mean() / spoilt.float().mean() ** 2
    assert beside > 1.15  # neighbours are spoilt together: 1 if places were drawn alone
    assert groups(3, (1, 1), 0.9, 4).all()


def test_spoilt_pixels_are_noise_or_another_picture():
    torch.manual_seed(0)
    method, image = small(), torch.rand(4, 3, 32, 32) + torch.arange(4.0)[:, None, None, None] * 10
    spoilt, where = method.spoil(image)
    where = where.expand_as(image)
    assert torch.equal(spoilt[~where], image[~where])
    from_other = (spoilt == image.roll(1, 0)) & where
    assert 0.2 < from_other[where].float().mean() < 0.6
    assert (spoilt != image)[where].float().mean() > 0.99


def test_losses_by_hand():
    torch.manual_seed(0)
    method, images = small().eval(), torch.randn(3, 2, 3, 32, 32)
    picked = torch.zeros(6, 8, 8, dtype=torch.bool)
    picked[:, 2:5, 1:3] = True
    where = spread(picked, (32, 32))[:, None]
    method.spoil = lambda image: (torch.where(where, 0.0, image), where)
    torch.manual_seed(1)
    out = method(images)
    torch.manual_seed(1)
    turns = torch.randint(4, (6,))
    flat = torch.stack([images[n % 3, n // 3].rot90(int(turns[n]), (1, 2)) for n in range(6)])
    token, restored = method.read(torch.where(where, 0.0, flat))
    torch.testing.assert_close(out["restoration"], (restored - flat).abs()[where.expand_as(flat)].mean())
    z = torch.nn.functional.normalize(method.project(token), dim=1)
    each = []
    for n in range(6):
        others = torch.stack([z[n] @ z[m] / 0.2 for m in range(6) if m != n])
        each.append(others.logsumexp(0) - z[n] @ z[(n + 3) % 6] / 0.2)
    torch.testing.assert_close(out["contrast"], torch.stack(each).mean())
    torch.testing.assert_close(out["rotation"], -method.turn(token).log_softmax(1)[torch.arange(6), turns].mean())
    torch.testing.assert_close(out["loss"], out["restoration"] + out["contrast"] + out["rotation"])


@pytest.mark.parametrize("task", SelfSupervisedTransformer.TASKS)
def test_each_part_is_learnt(task):
    torch.manual_seed(0)
    method = small(tasks=(task,)).train()
    ramp = torch.linspace(-2, 2, 32)
    images = torch.stack([(ramp[:, None] * a.abs() + b).expand(3, 32, 32) for a, b in torch.randn(16, 2)])
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    found = []
    for _ in range(60):
        out = method(torch.stack([images, images + 0.1 * torch.randn_like(images)], 1))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        found.append(out[task].item())
    assert sum(found[-5:]) < 0.7 * sum(found[:5]), found
    assert method.eval().reconstruct(images).shape == images.shape


def test_tasks_and_bad_input():
    assert set(small(tasks=("contrast",))(torch.randn(2, 2, 3, 32, 32))) == {"loss", "contrast"}
    with pytest.raises(SaccadeError, match="'jigsaw'"):
        small(tasks=("jigsaw",))
    with pytest.raises(SaccadeError, match=r"\(B, 2, C, S, S\)"):
        small()(torch.randn(2, 3, 32, 32))
    with pytest.raises(SaccadeError, match="plain vision transformer"):
        small(create_model("swin_nano"))
