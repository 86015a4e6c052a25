"""Divided attention, token pruning and the published sizes of UniFormer."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model, record
from saccade.papers.uniformer import CARD, PruningBlock, ScoredAttention, pooled
from saccade.parts.axes import AxesAttention
from saccade.parts.convolution import depthwise
from saccade.tools.measure import count_macs

SIZE = {"uniformer_video_small": (16, 224, 224), "uniformer_video_base": (16, 224, 224)}


@pytest.mark.parametrize("name", list(CARD.macs))
def test_multiply_adds_of_the_paper(name):
    with torch.device("meta"):
        model = create_model(name)
    image = torch.empty(1, 3, *SIZE.get(name, (224, 224)), device="meta")
    assert count_macs(model, (image,)) == pytest.approx(CARD.macs[name], rel=0.04)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 2)])
def test_axes_attention_is_attention_on_each_line(axes):
    torch.manual_seed(0)
    mixer = AxesAttention(Site(16, 2, grid=(3, 4, 5)), axes).double()
    x = torch.randn(2, 3, 4, 5, 16, dtype=torch.float64)
    others = [axis for axis in range(3) if axis not in axes]
    line = (slice(None), *(1 if axis in others else slice(None) for axis in range(3)))
    whole = super(AxesAttention, mixer).forward
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[line], whole(x[line]))
    model = torch.nn.Sequential(mixer)
    with torch.no_grad(), record(model) as watched:
        model(x)
    dense = watched["0"].dense(batch=2)
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense.sum(-1)))


def test_divided_video_model_starts_as_attention_in_frames():
    """Temporal attention gives zero at first: frames meet through convolutions alone; all parameters learn."""
    settings = dict(dims=(16, 32, 48), depths=(1, 1, 1), head_dim=16, local=1, divided=True, num_classes=3,
                    img_size=(4, 32, 32))
    model = create_model("uniformer_nano", **settings)
    model(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    block = model.stages[2].blocks[0].eval()
    x = torch.randn(1, 2, 3, 3, 48)
    with torch.no_grad():
        local = x + block.position(x)
        torch.testing.assert_close(block.time(local), torch.zeros_like(local))


def by_hand(block, x, token, scores):
    """The pruning block as it is told: sort, keep, represent, update, put back."""
    x = (x + block.position(x)).flatten(1, -2)
    count = int(x.shape[1] * 0.5)
    order = scores.argsort(1, descending=True)
    out, new_scores, tokens = x.clone(), scores.clone(), token.clone()
    for image in range(len(x)):
        kept, rest = order[image, :count], order[image, count:]
        weight = scores[image, rest] / scores[image, rest].sum()
        mean = (weight[:, None] * x[image, rest]).sum(0)
        seen = torch.cat([token[image], x[image, kept], mean[None]])[None]
        mixed, attention = block.mixer(block.norm1(seen))
        after = seen + mixed
        second = block.mlp(block.norm2(after))
        after = (after + second)[0]
        tokens[image], out[image, kept] = after[:1], after[1:-1]
        out[image, rest] = x[image, rest] + (mixed + second)[0, -1]
        new_scores[image, kept] = 0.5 * scores[image, kept] + 0.5 * attention[0, 1:-1]
    return out, tokens, new_scores


def test_pruning_against_the_slow_form():
    torch.manual_seed(0)
    site = Site(16, 2, grid=(3, 5))
    block = PruningBlock(site, ScoredAttention(site), keep=0.5, pace=0.5, position=depthwise(2, 16, 3)).double().eval()
    x, token = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 1, 16).double()
    scores = torch.rand(2, 15).double()
    with torch.no_grad():
        got, want = block(x, token, scores), by_hand(block, x, token, scores)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


def test_scores_between_stages():
    scores = torch.rand(2, 4 * 6)
    halved = pooled(scores, (4, 6))
    mean = torch.nn.functional.avg_pool2d(scores.view(2, 1, 4, 6), 2).flatten(1)
    torch.testing.assert_close(halved, mean * (scores.sum(1) / mean.sum(1))[:, None])
    assert pooled(torch.rand(2, 7), (1, 7)).shape == (2, 3)


def test_light_model_in_training_and_with_other_mixers():
    light = create_model("uniformer_light_nano", num_classes=3)
    out = light(torch.randn(2, 3, 32, 32))
    (out["scores"].square().sum() + out["class_scores"].square().sum()).backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in light.parameters())
    other = create_model("uniformer_light_nano", num_classes=3, mixer="pooling").eval()
    assert other(torch.randn(2, 3, 37, 29)).shape == (2, 3)
    volume = create_model("uniformer_light_nano", num_classes=3, img_size=(4, 32, 32)).eval()
    assert volume(torch.randn(1, 3, 5, 34, 32)).shape == (1, 3)


def test_token_labels_head():
    model = create_model("uniformer_nano", token_labels=True, num_classes=3).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x = model.forward_features(image).movedim(1, -1).flatten(1, 2)
        whole, tokens = model.head.fc, model.head.fc.tokens
        wanted = x.mean(1) @ whole.weight.T + whole.bias + 0.5 * (x @ tokens.weight.T + tokens.bias).amax(1)
        torch.testing.assert_close(model(image), wanted)
