"""The parts make the ordinary forward, whatever the source and the host; a planted circuit is found."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.attribution.explanation import explain
from saccade.papers.cd_t import Node, Parts, Transformer, circuit, effects, faithfulness, importance, merge
from tests.attribution.planted import pictures, trained
from tests.attribution.test_attention import foreign

HOSTS = ("deit_nano", "timm", "transformers", "bert", "gpt2")
IDS = torch.tensor([[3, 9, 4, 11, 7, 2], [5, 8, 6, 10, 1, 1]])


def opened(name, split=False):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if name == "deit_nano":
        return Transformer(create_model(name, num_classes=3).double(), image, split=split)
    if name in ("timm", "transformers"):
        return Transformer(foreign(name).double(), image, split=split)
    transformers = pytest.importorskip("transformers")
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=12,
            num_labels=3))
        seen = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        return Transformer(model.double(), IDS, attention_mask=seen, split=split)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=12, n_positions=8, bos_token_id=0, eos_token_id=0))
    return Transformer(model.double(), IDS, split=split)


def parted(host, count=3):
    chosen = torch.rand(count, host.tokens.shape[1], generator=torch.Generator().manual_seed(1)) < 0.4
    where = chosen[:, None, :, None]
    return Parts(torch.where(where, host.tokens, 0), torch.where(where, 0, host.tokens))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_parts_make_the_ordinary_forward_at_every_layer(name, split):
    host = opened(name, split)
    for stop, state in enumerate(host.states):
        found = host.run(parted(host), stop=stop)
        assert_close(found.rel + found.irrel, state.expand_as(found.rel), rtol=1e-11, atol=1e-11)
    found = host.run(parted(host))
    assert_close(found.rel + found.irrel, host.scores.expand_as(found.rel), rtol=1e-11, atol=1e-11)
    assert found.rel.std(0).amin() > 0


@pytest.mark.parametrize("name", HOSTS)
def test_all_tokens_are_everything_and_none_are_nothing(name):
    host = opened(name)
    every = torch.tensor([[True], [False]]).expand(2, host.tokens.shape[1])
    everything, nothing = importance(host, every)
    assert_close(everything, host.scores, rtol=1e-5, atol=1e-6)  # 1e-8 of each bias is left
    assert nothing.abs().max() == 0


def test_merging():
    x = torch.tensor([[[3.0, -3.0, 1.0, -1.0, 2.0, -2.0, 0.0, 2.0]], [[-1.0, 1.0, -3.0, 3.0, 2.0, -2.0, 5.0, -2.0]]])
    rel, irrel = merge(Parts(*x))
    assert rel.tolist() == [[2.0, -2.0, 0.0, 0.0, 2.0, -2.0, 0.0, 0.0]]
    assert irrel.tolist() == [[0.0, 0.0, -2.0, 2.0, 2.0, -2.0, 5.0, 0.0]]


@pytest.mark.parametrize("name", ["deit_nano", "bert"])
def test_sources_together_are_sources_alone(name):
    host = opened(name, split=True)
    nodes, targets = [*host.nodes(mlps=True), Node(0, 1, 2)], [Node(1, 0), Node(1)]
    for given, sets in ((effects(host, nodes, batch_size=5), ()), (effects(host, nodes, targets), targets)):
        for number, node in enumerate(nodes):
            assert_close(effects(host, [node], sets)[0], given[number], rtol=1e-9, atol=1e-12)
    own = [{kind: value[0] for kind, value in found.items()} for found in host.activations]
    assert effects(host, nodes, means=own)[:, 0].abs().max() < 1e-12  # what gives its mean gives nothing


def only(model, kept):
    """No head but those `kept`, {(layer, head): factor}, writes anything; neither do MLPs."""
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            weight = block.mixer.proj.weight.unflatten(1, (block.mixer.heads, -1))
            for head in range(block.mixer.heads):
                weight[:, head] *= kept.get((layer, head), 0)
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    return model


def test_a_planted_circuit_is_found():
    torch.manual_seed(1)
    kept = {(4, 0): 40, (2, 1): 10, (0, 1): 4}
    model = only(create_model("deit_nano", num_classes=3).double(), kept)
    host = Transformer(model, torch.randn(3, 3, 32, 32, dtype=torch.float64), split=True)

    def metric(scores):
        return scores[..., 1].abs().mean(1)

    given = metric(effects(host, host.nodes()))
    assert {tuple(node)[:2] for node, one in zip(host.nodes(), given, strict=True) if one > 0} == set(kept)
    found = circuit(host, metric, size=3, keep=1)
    assert [tuple(node)[:2] for node in found] == list(kept)
    assert faithfulness(host, found, metric) == pytest.approx(1)
    shares = effects(host, [Node(0, 1), Node(0, 0)], [Node(2, 1), Node(4, 0), Node(0, 0)])
    assert (shares[0, :2] > 0).all() and (shares[1, :2] == 0).all() and shares[:, 2].tolist() == [0, 1]
    assert faithfulness(host, found[1:], metric) != pytest.approx(1, abs=0.01)
    assert faithfulness(host, host.nodes(), metric) == pytest.approx(1)


def test_the_heads_that_give_most_are_missed_most():
    model, (image, label, _) = trained("deit_nano"), pictures(16, seed=0)
    host = Transformer(model, image)
    given = effects(host, host.nodes())[:, range(16), label].mean(1)

    def metric(scores):
        return scores[:, range(16), label].mean(1)

    nodes = host.nodes()
    lost = torch.tensor([1 - faithfulness(host, [other for other in nodes if other != node], metric) for node in nodes])
    most = given.topk(2)
    assert set(most.indices.tolist()) == set(lost.topk(2).indices.tolist())
    assert most.values[1] > 2 * given.sort().values[-3]  # the others are far behind


def test_errors_say_what_to_do():
    image = torch.randn(1, 3, 32, 32)
    for name in ("convnext_nano", "swin_nano"):
        with pytest.raises(SaccadeError, match="no plain transformer"):
            explain(create_model(name, num_classes=3), image, "cd_t")
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5,
                                          qk_norm=True)
    torch.nn.init.normal_(model.head.weight)
    with pytest.raises(SaccadeError, match="parts of its own"):
        explain(model, image, "cd_t")
    host = opened("deit_nano")
    with pytest.raises(SaccadeError, match="6 layers of 2 heads"):
        effects(host, [Node(6, 0)])
    with pytest.raises(SaccadeError, match="size=0"):
        circuit(host, lambda scores: scores[:, 0, 0], 0)
    with pytest.raises(SaccadeError, match="batch_size is 0"):
        explain(create_model("deit_nano", num_classes=3), image, "cd_t", batch_size=0)
