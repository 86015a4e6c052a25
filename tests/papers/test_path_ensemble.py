"""Paths: what the algebra of the sum says, on our hosts and timm's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from saccade import SaccadeError, create_model
from saccade.papers.path_ensemble import (
    path_ensemble,
    path_importance,
    path_terms,
    scores_of,
    self_distillation_loss,
    short_scores,
    zero_frequency_share,
)
from tests.contracts.registered import randomised

HOSTS = {
    "ours": lambda: create_model("deit_nano", num_classes=5),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=6, init_values=0.1),
}


def host(where="ours"):
    torch.manual_seed(0)
    return randomised(HOSTS[where]()).double().eval()


def pictures(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("where", HOSTS)
def test_the_paths_sum_up_to_the_host(where):
    model, image = host(where), pictures()
    with torch.no_grad():
        before = model(image)
        terms = path_terms(model, image)
        assert len(terms) == 13
        torch.testing.assert_close(scores_of(model, terms.sum(0)), before)
        for scaled in (False, True):
            handle = path_ensemble(model, scaled=scaled)
            torch.testing.assert_close(model(image), before)
            handle.undo()
        assert torch.equal(model(image), before)


@pytest.mark.parametrize("where", HOSTS)
def test_a_cut_path_is_read_by_the_blocks_and_not_by_the_classifier(where):
    model, image = host(where), pictures()
    with torch.no_grad():
        terms = path_terms(model, image)
        handle = path_ensemble(model, cut=(0, 4, 11))
        left = [number for number in range(13) if number not in (0, 4, 11)]
        torch.testing.assert_close(model(image), scores_of(model, terms[left].sum(0)))
        torch.testing.assert_close(path_terms(model, image), terms)  # what later blocks read is as before
        handle.undo()


def test_the_embedding_alone_hears_no_block():
    model, image = host(), pictures()
    path_ensemble(model, cut=range(1, 13))
    with torch.no_grad():
        before = model(image)
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(2)
        assert torch.equal(model(image), before)


def test_ensemble_scale():
    """Its size, its gradient <P_k, dE>, and that one factor for all changes nothing."""
    plain = sum(parameter.numel() for parameter in create_model("deit_small_patch16_224").parameters())
    scaled = sum(parameter.numel() for parameter in create_model("path_ensemble_deit_small").parameters())
    assert scaled - plain == 25 * 384
    model, image = host(), pictures()
    terms = path_terms(model, image).detach()
    total = terms.sum(0).requires_grad_()
    scores_of(model, total).square().sum().backward()
    path_ensemble(model, scaled=True)
    before = model(image)
    before.square().sum().backward()
    copy.deepcopy(model)
    found = torch.cat([block.scale.grad for block in model.blocks])
    torch.testing.assert_close(found, (terms * total.grad).sum((1, 2)))
    with torch.no_grad():
        for block in model.blocks:
            block.scale.mul_(3)
        torch.testing.assert_close(model(image), before, rtol=1e-3, atol=1e-4)  # but for the norm's epsilon


def test_stochastic_depth_drops_a_path_from_both_sums():
    model = create_model("deit_nano", num_classes=5, drop_path_rate=0.9).train()
    path_ensemble(model)
    terms = path_terms(model, torch.randn(4, 3, 32, 32))
    gone = (terms.flatten(2) == 0).all(2)
    assert gone.any() and not gone.all()


def test_importance_is_the_accuracy_without_a_path():
    model, image = host(), pictures(40)
    label = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(0))
    found = path_importance(model, image, label)
    with torch.no_grad():
        accuracy = (model(image).argmax(1) == label).double().mean()
        for path in (0, 3, 12):
            handle = path_ensemble(model, cut=(path,))
            assert found[path] == pytest.approx(float(accuracy - (model(image).argmax(1) == label).double().mean()))
            handle.undo()
    assert found.abs().max() > 0


def test_self_distillation_teaches_the_short_by_the_long():
    model, image = host(), pictures()
    scores = short_scores(model, path_terms(model, image))
    assert scores.shape == (6, 2, 5)
    torch.testing.assert_close(scores[-1], model(image))
    wanted = sum(F.kl_div((one / 2).log_softmax(1), (scores[-1] / 2).softmax(1), reduction="batchmean") * 4
                 for one in scores[:-1]) / 5
    loss = self_distillation_loss(scores, 2.0)
    torch.testing.assert_close(loss, wanted)
    taught = torch.autograd.grad(loss, scores)[0]
    assert (taught[-1] == 0).all() and taught[:-1].abs().amax((1, 2)).min() > 0


def test_the_share_of_the_zero_frequency():
    grid = torch.randn(2, 16, 8, dtype=torch.float64)
    energy = torch.fft.fft2(grid.unflatten(1, (4, 4)), dim=(1, 2)).abs().square().sum(-1)
    torch.testing.assert_close(zero_frequency_share(grid), energy[:, 0, 0] / energy.sum((1, 2)))


def test_paths_that_there_are_not():
    for cut in ((13,), (-1,), range(13)):
        with pytest.raises(SaccadeError, match="0 to 12"):
            path_ensemble(create_model("deit_nano"), cut=cut)
