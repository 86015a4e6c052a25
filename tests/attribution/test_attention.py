"""Maps from attention: a rollout by hand, a planted patch, maps that die with the weights, other libraries' models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.attribution.attention import features_as_colours
from saccade.attribution.explanation import explain
from saccade.core.record import record
from tests.attribution.planted import auc, pictures, trained

ROLLOUTS = ("attention_rollout", "gradient_rollout", "attention_relevance")
OTHERS = ("raw_attention", "class_token_similarity")


def foreign(name):
    torch.manual_seed(0)
    if name == "timm":
        timm = pytest.importorskip("timm")
        return timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
                                             num_classes=5, init_values=None).eval()
    if name == "torchvision":
        vision = pytest.importorskip("torchvision")
        model = vision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
        torch.nn.init.normal_(model.heads.head.weight)
        return model
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5)).eval()


@pytest.mark.parametrize("method", (*ROLLOUTS, "cd_t"))
def test_planted_patch_is_found(method):
    """The last layer's raw weights and the likeness to the class token make no such claim: both miss it here."""
    x, label, where = pictures(12, seed=0)
    assert auc(explain(trained("deit_nano"), x, method, label).maps, where) > 0.97


def test_rollout_is_the_product_of_the_layers():
    model, (x, _, _) = trained("deit_nano"), pictures(2, seed=1)
    with record(model) as found, torch.no_grad():
        model(x)
    product = torch.eye(1 + model.grid[0] * model.grid[1])
    for name in found.keys():
        product = (found[name].dense(2).mean(1) + torch.eye(len(product[0]))) / 2 @ product
    maps = product[:, 0, 1:].unflatten(1, model.grid)
    expected = F.interpolate(maps[:, None], (32, 32), mode="bilinear")[:, 0]
    assert_close(explain(model, x, "attention_rollout").maps, expected)
    assert_close(product.sum(-1), torch.ones_like(product[..., 0]))


@pytest.mark.parametrize("method", (*ROLLOUTS, *OTHERS, "cd_t"))
def test_maps_change_when_the_weights_are_randomised(method):
    x, label, _ = pictures(4, seed=0)
    torch.manual_seed(5)
    models = trained("deit_nano"), create_model("deit_nano", num_classes=2).eval()
    ranks = [explain(model, x, method, label).maps.flatten(1).argsort(1).argsort(1).double() for model in models]
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    assert torch.stack(correlations).mean() < 0.7


def test_only_gradients_tell_classes_apart():
    model, (x, _, _) = trained("deit_nano"), pictures(2, seed=0)
    for method in ROLLOUTS:
        first, second = (explain(model, x, method, target).maps for target in (0, 1))
        assert torch.equal(first, second) == (method == "attention_rollout")


@pytest.mark.parametrize("host", ["timm", "torchvision", "transformers"])
def test_models_of_other_libraries_are_watched_and_compute_the_same(host):
    model, x = foreign(host), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fused = F.scaled_dot_product_attention
    with torch.no_grad():
        plain = model(x)
        with record(model) as found:
            watched = model(x)
    assert F.scaled_dot_product_attention is fused
    assert_close(getattr(watched, "logits", watched), getattr(plain, "logits", plain))
    assert len(found.keys()) == 2
    for name in found.keys():
        weights = found[name].dense(2)
        assert weights.shape == (2, 2, 17, 17)
        assert_close(weights.sum(-1), torch.ones(2, 2, 17))
    maps = {method: explain(model, x, method, 1).maps for method in ROLLOUTS + OTHERS}
    for method, one in maps.items():
        assert one.shape == (2, 32, 32) and one.isfinite().all() and one.std() > 0, method
        assert_close(explain(model, x[1], method, 1).maps[0], one[1], rtol=1e-3, atol=1e-5)


def test_windows_are_laid_on_the_grid():
    model = create_model("swin_nano", num_classes=2).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = explain(model, x, "raw_attention", layer="stages.0.blocks.0.mixer").maps
    assert_close(maps.mean((1, 2)), torch.full((2,), 1 / 256))  # all rows sum to 1 over the 16 x 16 tokens
    with pytest.raises(SaccadeError, match="rollout needs one set of tokens"):
        explain(model, x, "attention_rollout")


def test_features_as_colours_show_the_planted_patch():
    x, _, where = pictures(8, seed=0)
    colours = features_as_colours(trained("deit_nano"), x, "blocks.0")
    assert colours.shape == (8, 3, 32, 32) and colours.min() >= 0 and colours.max() <= 1
    inside = torch.stack([colour[:, mask].mean(1) for colour, mask in zip(colours, where, strict=True)])
    outside = torch.stack([colour[:, ~mask].mean(1) for colour, mask in zip(colours, where, strict=True)])
    assert (inside - outside).abs().amax(1).mean() > 0.2


def test_errors_say_what_to_do():
    x = torch.randn(1, 3, 32, 32)
    for method, message in (("attention_rollout", "softmax attention"), ("class_token_similarity", "class token")):
        with pytest.raises(SaccadeError, match=message):
            explain(trained("cnn"), x, method)
    with pytest.raises(SaccadeError, match="no module 'body'"):
        explain(trained("deit_nano"), x, "class_token_similarity", layer="body")
