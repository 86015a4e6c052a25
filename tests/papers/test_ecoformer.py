"""What EcoFormer's goldens do not show: the sums in loops, what is learned from attention, the published cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model, record
from saccade.golden import fill
from saccade.papers.ecoformer import CARD, HashFunctions, KernelizedHashing, learn_hash_functions
from saccade.tools.measure import declared_macs


def test_linear_form_is_the_attention_of_all_pairs_in_loops():
    torch.manual_seed(0)
    mixer = KernelizedHashing(Site(8, 2, grid=(3, 4)), bits=5, anchors=6).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        ours = mixer(x.view(1, 3, 4, 8)).view(12, 8)
        wanted = torch.zeros(12, 8, dtype=torch.float64)
        for head, channels in enumerate((slice(0, 4), slice(4, 8))):
            unit = [F.normalize(qk, dim=0) for qk in mixer.qk(x)[0, :, channels]]
            values, hashes = mixer.v(x)[0, :, channels], mixer.hash
            distance = [[float((token - a).square().sum()) for a in hashes.anchors[head]] for token in unit]
            width = sum(map(sum, distance)) / (12 * 6)
            codes = []
            for row in distance:
                kernel = torch.tensor(row, dtype=torch.float64).div(-2 * width).exp() - hashes.mean[head, 0]
                codes.append([1 if float(kernel @ a) > 0 else -1 for a in hashes.weight[head]])
            for i, code in enumerate(codes):
                total, denominator = 6 * values[i], 0
                for j, other in enumerate(codes):
                    similarity = sum(p * q for p, q in zip(code, other))
                    total = total + similarity * values[j]
                    denominator += similarity + 6
                wanted[i, channels] = total / denominator
        wanted = mixer.proj(wanted)
    torch.testing.assert_close(ours, wanted)


def ground_truth(unit, topk):
    """1 for the most similar tokens of a row, -1 for the least, else 0: (B, h, N, N)."""
    similarity = unit @ unit.mT
    truth = torch.zeros_like(similarity)
    for row, target in zip(similarity.flatten(0, -2), truth.view(-1, truth.shape[-1])):
        order = row.argsort()
        target[order[-topk:]], target[order[:topk]] = 1, -1
    return truth


def clusters(images=2, heads=2, tokens=60, dim=8):
    """Unit tokens around four directions, the same in all images."""
    centres = torch.randn(1, heads, 4, dim, dtype=torch.float64).repeat(1, 1, tokens // 4, 1)
    return F.normalize(centres + 0.2 * torch.randn(images, heads, tokens, dim, dtype=torch.float64), dim=-1)


def test_learned_codes_are_nearer_to_the_similarities_of_attention():
    torch.manual_seed(1)
    unit, bits, topk = clusters(), 8, 12
    hashes, truth = HashFunctions(2, 8, bits, 10).double(), ground_truth(unit, topk)
    first = hashes.weight.clone()
    losses = hashes.learn(unit, topk, steps=60, rate=0.5)

    codes, residual, reference = hashes(unit), bits * truth, []
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    for code in codes.unbind(-1):  # the losses again, every residual written out
        reference.append(-torch.einsum("bhn,bhnm,bhm->bh", code, residual, code).mean().item() / (60 * bits))
        residual = residual - code[..., :, None] * code[..., None, :]
    assert losses == pytest.approx(reference)

    hashes.weight.copy_(first)
    random = hashes(unit)

    def distance(codes):  # what hashing minimises
        return float((codes @ codes.mT - bits * truth).square().mean())

    def agreement(codes):  # between -1 and 1
        return float((codes @ codes.mT * truth).sum() / (bits * truth.abs().sum()))

    assert distance(random) == pytest.approx(16.6, abs=0.1) and distance(codes) < 10
    assert agreement(random) == pytest.approx(0.61, abs=0.01) and agreement(codes) > 0.72


def test_a_bit_is_kept_where_descent_does_not_help():
    torch.manual_seed(0)
    hashes = HashFunctions(2, 8, 3, 10).double()
    first = hashes.weight.clone()
    hashes.learn(clusters(), steps=1, rate=0.0)
    assert torch.equal(hashes.weight, first)
    distance = (hashes.anchors.norm(dim=-1) - 1).abs().max()
    assert distance < 1e-9  # anchors are tokens


def test_layers_learn_in_order_within_one_forward():
    torch.manual_seed(0)
    model, images = create_model("ecoformer_nano", anchors=6, bits=4).eval(), torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.named_buffers()}
    torch.manual_seed(1)
    losses = learn_hash_functions(model, images, topk=5, steps=2)
    layers = ["stages.0.blocks.0.mixer.hash", "stages.1.blocks.0.mixer.hash", "stages.1.blocks.1.mixer.hash"]
    assert list(losses) == layers and all(len(bits) == 4 for bits in losses.values())
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    assert {f"{layer}.{table}" for layer in layers for table in ("anchors", "mean")} <= set(changed)

    units = {}
    for name in layers:  # what a layer learned from is what it sees afterwards
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, out, name=name: units.update({name: inputs[0]}))
    with torch.no_grad():
        model(images)
    for name in layers:
        hashes = model.get_submodule(name)
        torch.testing.assert_close(hashes.mean, hashes.kernel(units[name]).mean((0, -2))[:, None])


def test_what_cannot_be_learned_from_is_one_line():
    with pytest.raises(SaccadeError, match="16 tokens are too few.*25 anchors.*larger images"):
        learn_hash_functions(create_model("ecoformer_nano"), torch.randn(1, 3, 16, 16))
    with pytest.raises(SaccadeError, match="Pyramid has no kernelized hashing"):
        learn_hash_functions(create_model("pvt_v2_nano"), torch.randn(1, 3, 32, 32))


def test_last_stage_attends_by_softmax():
    model = create_model("ecoformer_nano").eval()
    with torch.no_grad(), record(model) as r:
        model(torch.randn(1, 3, 32, 32))
    assert sorted(r.keys()) == ["stages.2.blocks.0.mixer", "stages.2.blocks.1.mixer"]


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    with torch.device("meta"):
        macs = declared_macs(create_model(name), (torch.empty(1, 3, 224, 224),))
    assert macs == pytest.approx(CARD.macs[name], rel=0.01, abs=0.01e9)


def twins_state(dims=(32, 64, 128), depths=(1, 2, 2), classes=5):
    """The names and shapes of the authors' Twins with patches of 2 pixels, the last stage with softmax attention."""
    shapes = {"norm.weight": (dims[-1],), "norm.bias": (dims[-1],), "head.weight": (classes, dims[-1]),
              "head.bias": (classes,)}
    for stage, (before, dim, depth) in enumerate(zip((3, *dims), dims, depths)):
        at, heads = f"patch_embeds.{stage}.", dim // 32
        shapes |= {at + "proj.weight": (dim, before, 2, 2), at + "proj.bias": (dim,), at + "norm.weight": (dim,),
                   at + "norm.bias": (dim,), f"pos_block.{stage}.proj.0.weight": (dim, 1, 3, 3),
                   f"pos_block.{stage}.proj.0.bias": (dim,)}
        layers = {"attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        layers |= {"attn.qkv": (3 * dim, dim)} if stage == 2 else {"attn.to_qk": (dim, dim), "attn.to_v": (dim, dim)}
        for index in range(depth):
            at = f"blocks.{stage}.{index}."
            for name, shape in {**layers, "norm1": (dim,), "norm2": (dim,)}.items():
                shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
            if stage < 2:
                shapes |= {at + "attn.fast_attention.projection_matrix": (110, 32),
                           at + "attn.fast_attention.ksh.A": (heads, 16, 25),
                           at + "attn.fast_attention.ksh.mvec": (1, heads, 1, 25),
                           at + "attn.fast_attention.ksh.anchor": (1, heads, 25, 32)}
    return {name: fill(name, shape, "param") for name, shape in shapes.items()}


def test_the_authors_twins(tmp_path):
    """Step by step from the authors' names, but for what mixes tokens, against the network."""
    state = twins_state()
    torch.save({"model": state}, tmp_path / "twins.pth")
    model = create_model("ecoformer_twins_nano", num_classes=5, checkpoint_path=tmp_path / "twins.pth").eval()
    assert model.load_report.format == "authors" and not model.load_report.left
    x = image = torch.randn(2, 3, 33, 40)  # one row is in no patch

    def norm(x, name, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    with torch.no_grad():
        for stage, depth in enumerate((1, 2, 2)):
            at = f"patch_embeds.{stage}."
            x = F.conv2d(x, state[at + "proj.weight"], state[at + "proj.bias"], stride=2).movedim(1, -1)
            x = norm(x, at + "norm", 1e-5)
            for index in range(depth):
                at = f"blocks.{stage}.{index}."
                x = x + model.stages[stage].blocks[index].mixer(norm(x, at + "norm1"))
                x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
                if index == 0:
                    weight, bias = (state[f"pos_block.{stage}.proj.0.{what}"] for what in ("weight", "bias"))
                    x = x + F.conv2d(x.movedim(-1, 1), weight, bias, padding=1, groups=len(bias)).movedim(1, -1)
            x = x.movedim(-1, 1)
        wanted = linear(norm(x.movedim(1, -1), "norm").mean((1, 2)), "head")
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)
