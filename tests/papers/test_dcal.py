"""What the goldens of DCAL's attentions do not show: the network, its branches, its rollout, its losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model, record
from saccade.attribution.attention import attention_rollout
from saccade.papers.dcal import PairwiseAttention, UncertaintyWeights, pairs_of, rollout, telling
from tests.contracts.registered import randomised


def network(**options):
    torch.manual_seed(0)
    return randomised(create_model("dcal_deit_nano", num_classes=5, **options)).double().eval()


def images(count=3, size=(24, 32)):
    return torch.randn(count, 3, *size, dtype=torch.float64)


def test_the_rollout_is_the_first_row_of_the_product():
    maps = [torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(-1) for _ in range(4)]
    product = torch.eye(7, dtype=torch.float64)
    for weights in maps:
        product = (torch.eye(7) + weights.mean(1)) / 2 @ product
    torch.testing.assert_close(rollout(maps), product[:, 0])
    torch.testing.assert_close(rollout(maps).sum(1), torch.ones(2, dtype=torch.float64))


def test_the_telling_places():
    seen = torch.tensor([[0.3, 0.1, 0.2, 0.05, 0.3, 0.05]])
    assert telling(seen, 0.5).tolist() == [[0, 4, 2]]
    assert telling(seen, 0.0).tolist() == [[0]]
    assert telling(seen[:, :5], 1.0, prefix=2).tolist() == [[0, 4, 2, 3]]


def test_pairwise_attention_in_loops():
    mixer = randomised(PairwiseAttention(Site(6, 2))).double()
    x, other = torch.randn(2, 3, 2, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x, context=other)
        for image in range(2):
            q, _, _ = mixer.qkv(x[image].flatten(0, 1)).view(-1, 3, 2, 3).unbind(1)
            _, k, v = mixer.qkv(torch.cat([x[image].flatten(0, 1), other[image]])).view(-1, 3, 2, 3).unbind(1)
            rows = []
            for i in range(6):
                heads = [(k[:, h] @ q[i, h] / 3**0.5).softmax(0) @ v[:, h] for h in range(2)]
                rows.append(mixer.proj(torch.cat(heads)))
            torch.testing.assert_close(found[image].flatten(0, 1), torch.stack(rows))
        prefix = torch.randn(2, 1, 6, dtype=torch.float64)
        mixed, first = mixer(x, prefix, other)
        whole = mixer(torch.cat([prefix, x.flatten(1, 2)], 1), context=other)
        torch.testing.assert_close(torch.cat([first, mixed.flatten(1, 2)], 1), whole)


def test_a_pair_of_itself_is_no_pair():
    """The same keys twice: the same weights, halved and doubled."""
    model, image = network().train(), images()
    branches = model.branches(image, torch.arange(3))
    torch.testing.assert_close(branches.paired, branches.alone)


def test_another_picture_distracts_by_its_number():
    model, image, pairs = network().train(), images(), torch.tensor([1, 0, 1])
    paired = model.branches(image, pairs).paired
    for number, moves in ((2, [False, False, True]), (0, [True, True, True])):
        moved = image.clone()
        moved[number] += 1
        change = (model.branches(moved, pairs).paired - paired).abs().amax(1)
        assert (change > 1e-9).tolist() == moves
    assert model.eval().branches(image).paired is None


@pytest.mark.parametrize("count", [2, 5, 8])
def test_pairs_are_never_of_one_picture(count):
    for _ in range(20):
        pairs = pairs_of(count, torch.device("cpu"))
        assert (pairs != torch.arange(count)).all()
        assert (pairs[pairs] == torch.arange(count)).sum() == count - count % 2
    with pytest.raises(SaccadeError, match="two pictures"):
        network().train().branches(images(1))


def test_a_class_is_what_both_heads_say():
    model, image = network(), images()
    with torch.no_grad():
        branches = model.branches(image)
        wanted = (branches.alone.softmax(-1) + branches.local.softmax(-1)) / 2
        torch.testing.assert_close(model(image).softmax(-1), wanted)
        torch.testing.assert_close(model(image).exp(), wanted)
    model.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(model(image), torch.cat(model.branches(image)[:2], -1))


def test_the_class_token_is_told_the_same_whoever_asks_beside_it():
    model, image = network(share=0.3), images()
    with torch.no_grad():
        look, told = model.look(image), model.forward_features(image)[:, 0]
        assert look.places.shape == (3, 1 + int(0.3 * 48)) and look.seen.shape == (3, 6, 8)
        torch.testing.assert_close(look.local[:, 0], told)
        block, tokens = model.local, torch.randn(2, 9, 64, dtype=torch.float64)
        asked = block(tokens, torch.tensor([[0, 3, 5], [0, 8, 1]]))
        every = block(tokens, torch.arange(9).expand(2, -1))
        torch.testing.assert_close(asked[1], every[1, [0, 8, 1]])


def test_the_look_is_the_rollout_of_recorded_weights():
    model, image = network(), images(2)
    with torch.no_grad(), record(model) as r:
        model(image)
    product = torch.eye(49, dtype=torch.float64)
    for number in range(len(model.blocks)):
        product = (torch.eye(49) + r[f"blocks.{number}"].dense(2).mean(1)) / 2 @ product
    with torch.no_grad():
        torch.testing.assert_close(model.look(image).seen.flatten(1), product[:, 0, 1:])
    told = r["local"].dense(2)  # the class token alone asks
    torch.testing.assert_close(told.sum(-1)[..., 0], torch.ones(2, 2, dtype=torch.float64))
    assert not told[:, :, 1:].any()
    assert attention_rollout(model, image, torch.zeros(2, dtype=torch.long)).isfinite().all()


def test_another_mixer_has_no_pairs():
    model = network(mixer="attention").train()
    assert model(images()).shape == (3, 5)
    with pytest.raises(SaccadeError, match="pairwise_attention"):
        model.branches(images())


def test_a_vit_loads_but_for_what_is_new(tmp_path):
    plain = randomised(create_model("deit_nano", num_classes=5))
    torch.save(plain.state_dict(), tmp_path / "vit.pt")
    model = create_model("dcal_deit_nano", num_classes=5, checkpoint_path=tmp_path / "vit.pt",
                         fresh=("local.*", "norm_local.*", "head_local.*"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().branches(image).alone, plain.eval()(image))


def test_uncertainty_weights():
    weights, losses = UncertaintyWeights(3).double(), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        weights.log_variance.copy_(torch.tensor([0.0, 1.0, -1.0]))
    wanted = 0.5 * (1 + 2 * torch.tensor(-1.0).exp() + 0.5 * torch.tensor(1.0).exp() + 0)
    torch.testing.assert_close(weights(*losses).detach(), wanted.double(), rtol=1e-6, atol=0)
    with torch.no_grad():
        weights.log_variance.copy_(losses.log())  # where the slope is zero: e^w = L
    weights(*losses).backward()
    torch.testing.assert_close(weights.log_variance.grad, torch.zeros(3, dtype=torch.float64))


def test_all_of_it_learns_from_the_three_losses():
    torch.manual_seed(0)
    model, weights = create_model("dcal_deit_nano", num_classes=3), UncertaintyWeights()
    optimizer = torch.optim.Adam([*model.parameters(), *weights.parameters()], 2e-3)
    labels = torch.arange(24) % 3
    image = 0.3 * torch.randn(24, 3, 32, 32)
    image[torch.arange(24), labels, 8:20, 8:20] += 2  # a square of the class's colour
    for _ in range(25):
        loss = weights(*(F.cross_entropy(scores, labels) for scores in model.train().branches(image)))
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad.isfinite().all() and value.grad.any() for value in model.parameters())
        optimizer.step()
    assert (model.eval()(image).argmax(1) == labels).float().mean() > 0.9


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match=r"share=1.5"):
        create_model("dcal_deit_nano", share=1.5)
