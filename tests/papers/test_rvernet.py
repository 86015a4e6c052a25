"""RveRNet: the halves of its head, its pictures, and a segmenter with a random small configuration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, create_model
from saccade.papers.rvernet import (
    GREY,
    RveRNet,
    authors_names,
    parted,
    permuted,
    scores,
    segment,
    squared,
    translocated,
)
from tests.contracts.registered import randomised
from tests.ports.port import key_map


def pair(classes=5):
    torch.manual_seed(0)
    sides = [create_model(name, num_classes=7) for name in ("mobilenet_v2_nano", "deit_nano")]
    return randomised(RveRNet(*sides, classes, outputs=(7, 7), hidden=16)).eval()


def test_the_halves_of_the_head():
    """Sides and halves swapped together change nothing; without its half, a side is not heard."""
    model = pair().double()
    first, second = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        out = model(first, second)
        torch.testing.assert_close(out.exp().sum(1), torch.ones(2, dtype=torch.float64))
        label = torch.tensor([1, 3])
        inner = model.fc2(model.fc1(torch.cat([model.roi(first), model.surroundings(second)], 1)).relu())
        torch.testing.assert_close(F.cross_entropy(out, label), F.cross_entropy(inner, label))
        other = RveRNet(model.surroundings, model.roi, 5, outputs=(7, 7), hidden=16).double().eval()
        other.load_state_dict(other.state_dict() | {
            "fc1.weight": model.fc1.weight.roll(7, 1), "fc1.bias": model.fc1.bias,
            "fc2.weight": model.fc2.weight, "fc2.bias": model.fc2.bias})
        torch.testing.assert_close(other(second, first), out)
        model.fc1.weight[:, 7:] = 0
        assert torch.equal(model(first, second), model(first, first))
        assert not torch.equal(model(first, second), model(second, second))


def test_of_a_distilled_deit_the_class_token_speaks():
    model = randomised(create_model("deit_tiny_distilled_patch16_224", num_classes=4, img_size=32)).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model.head(model.forward_features(image)[:, 0])
        assert torch.equal(scores(model, image), wanted) and not torch.allclose(model(image), wanted)


def test_torchvisions_vit_on_a_side():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(32, 16, 2, 3, 192, 768, num_classes=1000).eval()
    ours = create_model("deit_tiny_patch16_224", img_size=32).eval()
    for number in range(11, 1, -1):
        del ours.blocks[number]
    state = {f"roi_module.{key}": value for key, value in randomised(theirs).state_dict().items()}
    renamed = key_map(authors_names("vit_base_patch16_224", "mobilenet_v2"))(state)
    ours.load_state_dict({key.removeprefix("roi."): value for key, value in renamed.items()})
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scores(ours, image), theirs(image), rtol=1e-4, atol=1e-5)


def test_the_two_pictures_make_up_the_whole():
    image, mask = torch.rand(2, 3, 8, 9), torch.rand(2, 8, 9) > 0.5
    inside, outside = parted(image, mask)
    assert torch.equal(inside + outside, image)
    assert (inside[:, 0][~mask] == 0).all() and (outside[:, 0][mask] == 0).all()
    with pytest.raises(SaccadeError, match="same size"):
        parted(image, mask[:, :4])


def test_pictures_are_padded_to_squares():
    out = squared(torch.ones(1, 1, 50, 100))
    assert out.shape == (1, 1, 224, 224)
    assert (out[:, :, 56:-56] == 1).all()
    torch.testing.assert_close(out[:, :, :56], torch.full((1, 1, 56, 224), GREY))
    odd = squared(torch.ones(1, 1, 3, 6), side=6)[0, 0, :, 0]
    torch.testing.assert_close(odd, torch.tensor([GREY, GREY, 1, 1, 1, GREY]))


def test_probes():
    image = torch.arange(2 * 20 * 32.0).view(1, 2, 20, 32) + 1
    mixed = permuted(image, 16, torch.Generator().manual_seed(0))
    assert mixed.shape == (1, 2, 32, 32)
    assert torch.equal(mixed.flatten().sort()[0], F.pad(image, (0, 0, 0, 12)).flatten().sort()[0])
    assert not torch.equal(mixed, F.pad(image, (0, 0, 0, 12)))
    moved = translocated(image, right=3, down=-2)
    assert torch.equal(moved[..., :18, 3:], image[..., 2:, :29])
    assert (moved[..., 18:, :] == GREY).all() and (moved[..., :3] == GREY).all()


def test_a_promptable_segmenter_says_where():
    """transformers' SAM, small and random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=dict(hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64,
                           patch_size=8, window_size=4, global_attn_indexes=[0], num_pos_feats=4, mlp_dim=32),
        prompt_encoder_config=dict(hidden_size=8, image_size=64, patch_size=8, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=8, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=8))
    model = transformers.SamModel(config).eval()
    image, points = torch.rand(2, 3, 24, 48), torch.tensor([[[10.0, 5.0]], [[30.0, 20.0]]])
    mask = segment(model, image, points)
    assert mask.shape == (2, 24, 48) and mask.dtype == torch.bool and mask.float().std() > 0
    torch.testing.assert_close(segment(model, image[1:], points[1:]), mask[1:])
    box = torch.tensor([[2.0, 2, 20, 20], [5, 5, 40, 22]])
    assert segment(model, image, boxes=box).shape == (2, 24, 48)
    with pytest.raises(SaccadeError, match="points"):
        segment(model, image)
