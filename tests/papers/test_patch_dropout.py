"""PatchDropout: which tokens stay, in training and in evaluation."""

from __future__ import annotations

import torch

from saccade import apply, create_model
from tests.contracts.registered import randomised


def test_tokens_that_stay_are_those_of_the_host_without_the_others():
    """The network sees what it would see of a shorter sequence, nothing of what went."""
    model = randomised(create_model("deit_nano", num_classes=5)).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens, _ = model.tokens(image)
        handle = apply(model, "patch_dropout", keep=0.3)
        out, kept = model(image), model.blocks[0].kept.numbers
        handle.undo()
        assert kept.shape == (2, 1 + 20) and (kept[0] == kept[1]).all()  # ceil(0.3 64), the same for all
        assert (kept[0].diff() > 0).all() and kept[0, 0] == 0 and kept[0, -1] < 65
        short = tokens[:, kept[0]]
        for block in model.blocks:
            short = block(short, 1, (4, 5))
        torch.testing.assert_close(model.forward_head(model.norm(short)), out)


def test_training_draws_anew_for_each_picture_and_uniformly():
    model = create_model("deit_nano", num_classes=5).train()
    apply(model, "patch_dropout", keep=0.25, layer=0)
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randn(400, 3, 32, 32))
    kept = model.blocks[0].kept.numbers[:, 1:]
    assert kept.shape == (400, 16) and not (kept[0] == kept[1]).all()
    shares = torch.bincount(kept.flatten(), minlength=65)[1:] / 400
    assert (shares - 0.25).abs().max() < 0.1  # over four standard deviations


def test_a_later_layer_sees_all_before():
    model = randomised(create_model("deit_nano", num_classes=5)).eval()
    image, seen = torch.randn(1, 3, 32, 32), {}
    apply(model, "patch_dropout", keep=0.5, layer=3)
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, number=number: seen.update({number: out.shape[1]}))
    with torch.no_grad():
        model(image)
    assert [seen[number] for number in range(6)] == [65, 65, 65, 33, 33, 33]
