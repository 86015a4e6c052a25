"""Hyper-MAE: what the encoder sees, what the loss counts, where tokens go back."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.hyper_mae import HyperMAE, drawn
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised

BANDS, PLACES = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 5, 6], [0, 2, 7]])


def mae(**options):
    torch.manual_seed(0)
    encoder = create_model("less_vit_nano", num_classes=0, in_chans=4, **options)
    return randomised(HyperMAE(encoder, dim=24, depth=2, heads=2)).double().eval()


def image():
    return torch.randn(2, 4, 8, 16, dtype=torch.float64)  # 4 bands of 2 x 4 patches


def hidden_pixels():
    """(2, 4, 8, 16) True where a patch is hidden."""
    hidden = torch.ones(2, 4, 8, dtype=torch.bool)
    for number in range(2):
        for band in BANDS[number]:
            hidden[number, band, PLACES[number]] = False
    patches = hidden.view(2, 4, 2, 4)
    return hidden, patches.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("field", [None, 100.0])
def test_the_encoder_sees_what_is_left_alone(field):
    model, x = mae(field=field), image()
    hidden, pixels = hidden_pixels()
    shown = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].shape))
    with torch.no_grad():
        one = model(x, seen=(BANDS, PLACES))
        other = model(torch.where(pixels, torch.randn_like(x), x), seen=(BANDS, PLACES))
        third = model(torch.where(pixels, x, x + 0.1), seen=(BANDS, PLACES))
    assert set(shown) == {(2, 3, 4, 32)}  # of 1 + 4 and 1 + 8
    assert torch.equal(one["hidden"], hidden) and torch.equal(one["guess"], other["guess"])
    assert one["guess"].shape == (2, 4, 8, 16) and not torch.allclose(one["guess"], third["guess"])


def test_the_loss_counts_what_was_hidden():
    model, x = mae(), image()
    hidden, _ = hidden_pixels()
    with torch.no_grad():
        out = model(x, seen=(BANDS, PLACES))
    errors = []
    for number in range(2):
        for band in range(4):
            for place in range(8):
                if hidden[number, band, place]:
                    row, column = place // 4 * 4, place % 4 * 4
                    pixels = x[number, band, row:row + 4, column:column + 4].flatten()
                    errors.append((out["guess"][number, band, place] - pixels).square().mean())
    torch.testing.assert_close(out["loss"], torch.stack(errors).mean())


def test_all_seen_is_the_encoder_itself():
    model, x = mae(field=70.0), image()
    everything = torch.arange(4).expand(2, -1), torch.arange(8).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x, *everything), model.encoder.forward_features(x))
        turned = model.encode(x, everything[0].flip(1), everything[1])
    torch.testing.assert_close(turned[:, 1:].flip(1), model.encoder.forward_features(x)[:, 1:])


def test_tokens_go_back_to_their_places():
    model, shown = mae(), []
    model.decoder[0].register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    x = image()
    with torch.no_grad():
        model(x, seen=(BANDS, PLACES))
        known = model.embed(model.encode(x, BANDS, PLACES))
        code = model.encoder.codes(4, (2, 4), known)
    whole = shown[0] - code
    for number in range(2):
        rows, columns = [0, *(BANDS[number] + 1).tolist()], [0, *(PLACES[number] + 1).tolist()]
        for row in range(5):
            for column in range(9):
                there = row in rows and column in columns
                wanted = known[number, rows.index(row), columns.index(column)] if there else model.missing
                torch.testing.assert_close(whole[number, row, column], wanted)


def test_drawn_masks_differ_between_images_and_hide_their_share():
    torch.manual_seed(0)
    numbers = drawn(50, 10, 0.75, torch.device("cpu"))
    assert numbers.shape == (50, 2) and (numbers[:, 0] < numbers[:, 1]).all() and numbers.unique().numel() == 10
    assert drawn(3, 1, 0.9, torch.device("cpu")).tolist() == [[0]] * 3


def test_hiding_is_cheap_and_everything_learns():
    model = mae().float()
    x = torch.randn(2, 4, 32, 32)
    seen = count_macs(model, (x,))
    model.hide_bands, model.hide_places = 0.0, 0.1
    assert seen < 0.7 * count_macs(model, (x,))
    model.hide_places = 0.75
    model(x)["loss"].backward()
    dead = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []


def test_other_wavelengths_and_sizes():
    model = mae()
    out = model(torch.randn(1, 6, 10, 13, dtype=torch.float64), wavelengths=range(500, 1100, 100))
    assert out["guess"].shape == (1, 6, 12, 16) and out["loss"].isfinite()
    with pytest.raises(SaccadeError, match="hide_bands=1"):
        HyperMAE(model.encoder, hide_bands=1)
