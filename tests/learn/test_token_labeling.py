"""Mix-token swaps boxes behind the stem and puts labels back; the loss from its definition."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.learn.token_labeling import mixed_scores, random_box, share_outside, swapped, token_label_loss


def test_boxes_lie_in_the_grid_and_cover_half_on_average():
    generator = torch.Generator().manual_seed(0)
    boxes = [random_box((14, 10), generator) for _ in range(400)]
    assert all(0 <= part.start <= part.stop <= side for box in boxes for part, side in zip(box, (14, 10)))
    inside = [1 - share_outside(box, (14, 10)) for box in boxes]
    assert min(inside) == 0 and 0.2 < sum(inside) / len(inside) < 0.5  # edges cut off the rest of one half


def test_swapped_twice_is_nothing():
    x, box = torch.randn(4, 6, 5, 3), (slice(1, 4), slice(0, 2))
    mixed = swapped(x, box)
    assert torch.equal(mixed[0, 1:4, :2], x[3, 1:4, :2]) and torch.equal(mixed[0, :, 2:], x[0, :, 2:])
    assert torch.equal(swapped(mixed, box), x)


@pytest.mark.parametrize("name, options", [("volo_nano", {}), ("svt_nano", {}), ("rmt_nano", {"labels": "last"})])
def test_mixed_scores(name, options):
    torch.manual_seed(0)
    model, image = create_model(name, num_classes=5, **options).eval(), torch.randn(2, 3, 32, 48)
    side = model.feature_info[-1]["reduction"]
    grid = (32 // side, 48 // side)
    with torch.no_grad():
        scores, labels = model.label_scores(model.after_stem(model.stem(image)))
        nothing = mixed_scores(model, image, (slice(0, 0), slice(0, 0)))
        torch.testing.assert_close(nothing, (scores, labels.unflatten(1, grid)))
        everything = mixed_scores(model, image, tuple(slice(0, side) for side in grid))
        torch.testing.assert_close(everything[1], nothing[1])  # labels are back where they belong
        torch.testing.assert_close(everything[0], scores.flip(0))  # classes are those of what was seen
        some = mixed_scores(model, image, (slice(0, 1), slice(1, 2)))
    assert (some[0] - scores).abs().max() > 1e-4 and some[1].shape == (2, *grid, 5)


def test_loss_from_its_definition():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 4), torch.randn(2, 3, 2, 4)
    targets, tokens = torch.rand(2, 4).softmax(-1), torch.rand(2, 3, 2, 4).softmax(-1)
    mixed = 0.7 * targets + 0.3 * targets[[1, 0]]
    wanted = -(mixed * scores.log_softmax(-1)).sum(-1).mean() - 0.5 * (tokens * labels.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(token_label_loss(scores, labels, targets, tokens, 0.7), wanted)


def test_it_trains():
    torch.manual_seed(0)
    model = create_model("volo_nano", num_classes=3).train()
    image, targets = torch.randn(4, 3, 32, 32), torch.eye(3)[[0, 1, 2, 0]]
    tokens = targets[:, None, None].expand(-1, 4, 4, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(12):
        box = random_box((4, 4), torch.Generator().manual_seed(step % 3))
        scores, labels = mixed_scores(model, image, box)
        loss = token_label_loss(scores, labels, targets, tokens, share_outside(box, (4, 4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="does not score its tokens"):
        mixed_scores(create_model("swin_nano"), torch.randn(2, 3, 32, 32), (slice(0, 1),) * 2)
    with pytest.raises(SaccadeError, match="no multiple of 2"):
        mixed_scores(create_model("volo_nano"), torch.randn(2, 3, 36, 36), (slice(0, 1),) * 2)
