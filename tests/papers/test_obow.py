"""OBoW: the words are a queue of local features, the teacher follows, and bags are learnt."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.obow import OBoW, Vocabulary


def test_words_are_renewed_from_the_oldest():
    torch.manual_seed(0)
    vocabulary = Vocabulary(5, 3)
    first = vocabulary.words.clone()
    x = torch.rand(2, 3, 6, 7)
    vocabulary.train()(x)
    assert int(vocabulary.oldest) == 2 and torch.equal(vocabulary.words[2:], first[2:])
    for row in range(2):
        local = [x[row, :, 1 + i:4 + i, 1 + j:4 + j].mean((1, 2)) for i in range(2) for j in range(3)]
        assert any(torch.allclose(vocabulary.words[row], one) for one in local)
    for _ in range(2):
        vocabulary(x)
    assert int(vocabulary.oldest) == 1 and not torch.equal(vocabulary.words[0], first[0])


def test_bag_by_loops():
    torch.manual_seed(0)
    vocabulary, x = Vocabulary(4, 3, sharpness=2.0).eval(), torch.rand(1, 3, 4, 5)
    code = torch.zeros(4, 2, 3)
    for i in range(2):
        for j in range(3):
            off = torch.stack([((x[0, :, i + 1, j + 1] - word) ** 2).sum() for word in vocabulary.words])
            code[:, i, j] = torch.softmax(-2.0 / 0.5 * off, 0)
    wanted = code.flatten(1).max(1).values
    torch.testing.assert_close(vocabulary(x)[0], wanted / wanted.sum())
    assert vocabulary(torch.rand(2, 3, 2, 2)).sum(1).tolist() == pytest.approx([1, 1])


def test_teacher_follows_the_student():
    method = OBoW(create_model("resnet_nano"), words=16)
    ours, theirs = next(method.model.parameters()), next(method.teacher.parameters())
    before = theirs.clone()
    with torch.no_grad():
        ours.add_(1.0)
    method.after_step(0.0)
    torch.testing.assert_close(theirs, before + 0.01)
    method.after_step(1.0)
    torch.testing.assert_close(theirs, before + 0.01)


def test_bags_are_learnt():
    torch.manual_seed(0)
    method = OBoW(create_model("resnet_nano"), words=32).train()
    palette = torch.rand(8, 3, 1, 1) * 4
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 2e-3)
    losses = []
    for step in range(60):
        images = (palette[:, None] + 0.3 * torch.randn(8, 3, 3, 32, 32))
        out = method(images)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(step / 60)
        losses.append(out["loss"].item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[10:15]), losses  # the first words are noise
    assert 1 < out["perplexity"] < 32
    assert all(p.grad is None for p in method.teacher.parameters())


def test_bad_input():
    with pytest.raises(SaccadeError, match="pyramid"):
        OBoW(create_model("deit_nano"))
    with pytest.raises(SaccadeError, match=r"\(B, 3, C, H, W\)"):
        OBoW(create_model("resnet_nano"), words=8)(torch.zeros(2, 3, 32, 32))
    with pytest.raises(SaccadeError, match="pool='sum'"):
        OBoW(create_model("resnet_nano"), pool="sum")
