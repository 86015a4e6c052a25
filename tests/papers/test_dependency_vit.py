"""What DependencyViT's goldens do not show: sending in loops and in pieces, dropped tokens, the tree."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_model, record
from saccade.papers import dependency_vit
from saccade.papers.dependency_vit import (
    DependencyTree,
    ReversedAttention,
    arborescence,
    dependencies,
    dependency_tree,
    send,
)
from tests.contracts.registered import randomised


def test_each_token_sends_in_loops():
    mixer = randomised(ReversedAttention(Site(8, 2, grid=(2, 3)))).double()
    x, before = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.rand(1, 2, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        out, after = mixer(x, before)
        tokens = x.view(6, 8)
        q, k, v = mixer.qkv(tokens).view(6, 3, 2, 4).unbind(1)
        m = (before.view(6) * mixer.controller(tokens).sigmoid()[:, 0]).tolist()
        received, mask = torch.zeros(6, 2, 4, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
        for sender, head in product(range(6), range(2)):
            p = float((mixer.selector(tokens[sender]) / 0.1).softmax(0)[head])
            shares = torch.stack([q[sender, head] @ k[parent, head] / 2 for parent in range(6)]).softmax(0)
            for parent in range(6):
                received[parent, head] += shares[parent] * p * m[sender] * v[sender, head]
                mask[sender, parent] += shares[parent] * p * m[sender]
        torch.testing.assert_close(out.view(6, 8), mixer.proj(received.flatten(1)))
        torch.testing.assert_close(after.view(6), torch.tensor(m, dtype=torch.float64))
        torch.testing.assert_close(mixer.dependencies(x, before)[0], mask)


def test_in_pieces_is_the_same(monkeypatch):
    q, k, v = torch.randn(3, 2, 2, 45, 4, dtype=torch.float64)
    with torch.no_grad():
        whole = send(q, k, v)
        monkeypatch.setattr(dependency_vit, "WEIGHTS_AT_ONCE", 45 * 4 * 17)
        torch.testing.assert_close(send(q, k, v), whole)


@pytest.mark.parametrize(("side", "counts"), [(224, (196, 164, 132, 100, 69)), (16, (1, 1, 1, 1, 1))])
def test_lite_models_drop_sixteen_percent_four_times(side, counts):
    model = create_model("dependencyvit_lite_tiny", img_size=side).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, out: seen.append(out[0].flatten(1, -2).shape[1]))
    with torch.no_grad():
        model(torch.randn(1, 3, side, side))
    assert tuple(dict.fromkeys(seen)) == tuple(dict.fromkeys(counts))
    assert [seen[number - 1] for number in (1, 2, 5, 8, 11)] == list(counts)


def test_the_quietest_tokens_leave_and_stay_in_the_map():
    model = randomised(create_model("dependencyvit_lite_nano")).eval()
    image, states = torch.randn(2, 3, 24, 28), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, out: states.append(out))
    with torch.no_grad():
        maps = [value.flatten(2).transpose(1, 2) for value in model.features(image)]
        whole = create_model("dependencyvit_lite_nano", prune=()).eval()
        whole.load_state_dict(model.state_dict())
        messages = []
        whole.blocks[1].register_forward_hook(lambda block, inputs, out: messages.append(out[1]))
        whole(image)
    places = states[1][2]
    for number in range(2):
        loud = messages[0][number].flatten().topk(42 * 84 // 100).indices.sort().values
        assert places[number].tolist() == loud.tolist()
        gone = sorted(set(range(42)) - set(loud.tolist()))
        torch.testing.assert_close(maps[1][number, gone], maps[0][number, gone])
        torch.testing.assert_close(maps[1][number, loud], states[1][0][number])


def test_a_watcher_sees_dropped_tokens_at_their_place():
    model = randomised(create_model("dependencyvit_lite_nano")).double().eval()
    image = torch.randn(2, 3, 24, 28, dtype=torch.float64)
    with torch.no_grad(), record(model) as r:
        model(image)
    weights = r["blocks.3.mixer"].dense(batch=2)
    assert sorted(set((weights.sum(-1) > 0.5).sum(-1).flatten().tolist())) == [28]  # 42 tokens, 35 and 28 are left


def test_dependencies_are_what_is_sent_in_all_layers():
    model = randomised(create_model("dependencyvit_lite_nano")).double().eval()
    image, wanted = torch.randn(2, 3, 24, 28, dtype=torch.float64), torch.zeros(42, 42, dtype=torch.float64)
    sums = dependencies(model, image)

    def add(block, inputs):
        x, messages, places = inputs
        mask = block.mixer.dependencies(block.norm1(x), messages)[1]
        numbers = list(range(42)) if places is None else places[1].tolist()
        for (row, sender), (column, parent) in product(enumerate(numbers), repeat=2):
            wanted[sender, parent] += mask[row, column]

    for block in model.blocks:
        block.register_forward_pre_hook(add)
    with torch.no_grad():
        model(image)
    torch.testing.assert_close(sums[1], wanted)


@pytest.mark.parametrize("seed", range(8))
def test_arborescence_is_the_best_of_all_trees(seed):
    score = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root, best = seed % 5, (-float("inf"), None)
    for parents in product(range(5), repeat=5):
        if parents[root] != root or any(child == parent for child, parent in enumerate(parents) if child != root):
            continue
        if all(_climbs(parents, child, root) for child in range(5)):
            total = sum(float(score[child, parent]) for child, parent in enumerate(parents) if child != root)
            best = max(best, (total, parents))
    found = arborescence(score, root).tolist()
    assert found[root] == -1
    assert tuple(root if parent < 0 else parent for parent in found) == best[1]


def _climbs(parents, child, root):
    for _ in parents:
        child = parents[child]
    return child == root


def test_the_tree_of_an_image():
    model = randomised(create_model("dependencyvit_nano")).eval()
    image = torch.randn(2, 3, 20, 28)
    trees, sums = dependency_tree(model, image), dependencies(model, image)
    for tree, mask in zip(trees, sums):
        assert tree.grid == (5, 7) and tree.root == int(mask.sum(0).argmax())
        assert tree.depths.shape == (5, 7) and int((tree.depths == 0).sum()) == 1  # one root, and all reach it
        assert bool(tree.subtree(tree.root).all())
        assert sorted(set(tree.parts().flatten().tolist())) == list(range(-1, len(tree.children(tree.root))))


def test_reading_a_tree():
    tree = DependencyTree(torch.tensor([2, 0, -1, 2, 0, 3]), (2, 3))
    assert tree.root == 2 and tree.children(0) == [1, 4]
    assert tree.depths.tolist() == [[1, 2, 0], [1, 2, 2]]
    assert tree.subtree(0).tolist() == [[True, True, False], [False, True, False]]
    assert tree.parts().tolist() == [[0, 0, -1], [1, 0, 1]]


def test_what_makes_no_sense_is_one_line():
    for options, said in [(dict(prune=(1,)), "from 2"), (dict(prune=(5,)), "to 4"),
                          (dict(prune=(2, 3), dropped=0.5), "leaves none")]:
        with pytest.raises(SaccadeError, match=said):
            create_model("dependencyvit_nano", **options)
    with pytest.raises(SaccadeError, match="own mixer"):
        dependencies(create_model("dependencyvit_nano", mixer="pooling"), torch.randn(1, 3, 32, 32))
