"""Sparsifiner: the sparse and the gathered form are the masked one, and the masks are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, apply, create_model
from saccade.papers.sparsifiner import at_columns, gathered_rows
from tests.contracts.registered import randomised


def test_attention_at_columns_is_masked_attention():
    q, k, v = torch.randn(3, 2, 3, 11, 8, dtype=torch.float64)
    columns = torch.stack([torch.randperm(11)[:4] for _ in range(2 * 3 * 11)]).view(2, 3, 11, 4)
    hidden = torch.full((2, 3, 11, 11), -torch.inf, dtype=torch.float64).scatter(-1, columns, 0.0)
    wanted = (q @ k.transpose(-2, -1) / 8**0.5 + hidden).softmax(-1) @ v
    torch.testing.assert_close(at_columns(q, k, v, columns), wanted)
    places = columns + 11 * torch.arange(6).view(2, 3, 1, 1)
    torch.testing.assert_close(gathered_rows(q, k, v, places), wanted)


def test_masks_and_both_forms():
    model = create_model("deit_nano", num_classes=5)
    apply(model, "sparsifiner", keep=0.25)
    model = randomised(model).double().eval()
    masks = []
    for block in model.blocks:
        block.watched.register_forward_hook(lambda module, inputs, output: masks.append(output))
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        gathered = model(image)
    torch.testing.assert_close(model(image), gathered)  # with gradients: masked
    assert len(masks) == 12
    assert all(mask[:, :, 0].all() and (mask[:, :, 1:].sum(-1) == 17).all() for mask in masks)  # ceil(65 / 4)


def test_tables_follow_the_grid():
    model = create_model("deit_nano", num_classes=5).eval()
    apply(model, "sparsifiner", keep=0.5)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 24, 40)).isfinite().all()


def test_a_host_that_does_not_tell_its_grid():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, depth=2).eval()
    apply(model, "sparsifiner")
    with pytest.raises(SaccadeError, match="26 tokens came"):
        model(torch.zeros(1, 3, 80, 80))
