"""The same questions put to every method that makes a host compute less, on our hosts and timm's."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch

from saccade import SaccadeError, apply, create_model, record
from saccade.core.apply import KIND
from saccade.core.index import index
from saccade.tools.export import checked, export_square
from saccade.tools.measure import count_macs
from tests.contracts.registered import over, randomised

# A method's options under which nothing is left out (the host's very numbers), and under which much is.
OPTIONS = {
    "ats": (dict(layers=()), dict(samples=12, layers=(1, 3))),
    "evit": (dict(keep=1.0, layers=(1, 3)), dict(keep=0.5, layers=(1, 3))),
    "expedite": (dict(keep=1.0), dict(keep=0.49, start=2)),
    "ia_red2": (dict(layers=(0, 2), threshold=0.0, heads=4), dict(layers=(0, 2), heads=4)),
    "patch_dropout": (dict(keep=1.0), dict(keep=0.5, layer=1)),
    "self_slimmed": (dict(layers=()), dict(layers=(0, 2))),
    "sparsifiner": (dict(keep=1.0), dict(keep=0.25)),
    "token_merging": (dict(r=0), dict(r=5)),
}
HOSTS = {
    "ours": lambda: create_model("deit_nano", num_classes=5),
    "distilled": lambda: create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=128),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=128, depth=6, init_values=0.1),
}
METHODS = sorted(OPTIONS)


def host(name):
    torch.manual_seed(0)
    return randomised(HOSTS[name]()).eval()


def pictures(model, count=3):
    return torch.randn(count, 3, *((32, 32) if getattr(model, "name", "") == "deit_nano" else (128, 128)))


def test_every_method_is_asked():
    known = index()
    kinds = {name: known["papers"][paper]["kinds"] for name, paper in known["methods"].items()}
    assert set(OPTIONS) == {name for name in kinds if KIND in kinds[name]}


@pytest.mark.parametrize("where", HOSTS)
@over("test_nothing_left_out_is_the_host", METHODS)
def test_nothing_left_out_is_the_host(name, where):
    model = host(where)
    image = pictures(model)
    with torch.no_grad():
        before = model(image)
        handle = apply(model, name, **OPTIONS[name][0])
        torch.testing.assert_close(model(image), before, rtol=1e-5, atol=1e-5)
        handle.undo()
        assert torch.equal(model(image), before)


@pytest.mark.parametrize("where", HOSTS)
@over("test_reduced", METHODS)
def test_reduced(name, where):
    """Fewer multiply-adds, another output, each image alone as in its batch; the host comes back to the bit."""
    model = host(where)
    image = pictures(model)
    with torch.no_grad():
        before, macs, keys = model(image), count_macs(model, (image,)), set(model.state_dict())
        handle = apply(model, name, **OPTIONS[name][1])
        out = model(image)
        assert keys <= set(model.state_dict())
        assert out.isfinite().all() and (out - before).abs().max() > 1e-4
        torch.testing.assert_close(torch.cat([model(one[None]) for one in image]), out, rtol=1e-4, atol=1e-5)
        assert count_macs(model, (image,)) < macs
        handle.undo()
        assert torch.equal(model(image), before) and set(model.state_dict()) == keys


@over("test_copies", METHODS)
def test_copies(name):
    model = host("ours")
    apply(model, name, **OPTIONS[name][1])
    image = pictures(model)
    with torch.no_grad():
        out = model(image)
        assert torch.equal(copy.deepcopy(model)(image), out)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), out)


@over("test_autocast_and_training", METHODS)
def test_autocast_and_training(name):
    model = host("ours")
    apply(model, name, **OPTIONS[name][1])
    image = pictures(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(image).isfinite().all()
    model.train()
    out = model(image)
    out = out if isinstance(out, torch.Tensor) else next(iter(out.values()))
    out.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["blocks.0.mixer.qkv.weight"].abs().max() > 0


@over("test_kept_tokens_are_told", METHODS)
def test_kept_tokens_are_told(name):
    """`record` numbers the tokens that are left as they stood in the whole picture."""
    model = host("ours")
    apply(model, name, **OPTIONS[name][1])
    image = pictures(model, 2)
    with torch.no_grad(), record(model) as recorded:
        model(image)
    whole = 65
    for block in ("blocks.0", "blocks.5"):
        for part in recorded[block].parts:
            assert part.weights.shape[-1] == part.key.shape[-1] <= whole
            assert -1 <= part.key.min() and part.key.max() < whole
            torch.testing.assert_close(part.weights.sum(-1), torch.ones_like(part.weights.sum(-1)))


def test_a_shallow_host_is_reduced_where_a_deep_one_is():
    """What a method does by default to 12 blocks it does to 6, at the same shares of the depth."""
    for name, wanted in (("evit", (1, 3, 4)), ("ats", (1, 2, 3, 4, 5)), ("self_slimmed", (1, 3, 4)),
                         ("ia_red2", (0, 2, 4))):
        model = host("ours")
        image = pictures(model)
        options = {"heads": 4} if name == "ia_red2" else {}
        torch.manual_seed(1)  # of the weights that a method adds
        apply(model, name, **options)
        with torch.no_grad():
            out = model(image)
        asked = host("ours")
        torch.manual_seed(1)
        apply(asked, name, layers=wanted, **options)
        with torch.no_grad():
            assert torch.equal(asked(image), out) and asked.blocks[wanted[0]].drops(), name


@over("test_its_graph_takes_any_batch", METHODS, slow=set(METHODS) - {"evit", "token_merging"})
def test_its_graph_takes_any_batch(name, tmp_path):
    """What a comparison ranks and ships: pictures of one size, in batches of any number, by onnxruntime."""
    pytest.importorskip("onnxruntime")
    model = host("ours")
    apply(model, name, **OPTIONS[name][1])
    images = pictures(model, 5)
    assert export_square(model, tmp_path / "model.onnx", images).agree == 5
    for count in (1, 2, 4):
        checked(model, tmp_path / "model.onnx", images[:count])


def test_hosts_that_are_not_understood():
    for model, words in ((create_model("swin_nano"), "plain vision transformer"),
                         (create_model("convit_nano"), "softmax attention"),
                         (timm.create_model("resnet18"), "plain vision transformer")):
        with pytest.raises(SaccadeError, match=words):
            apply(model, "evit", layers=(1,))
    model = create_model("deit_nano")
    for options, words in ((dict(keep=0.0), "keep=0.0"), (dict(keep=1.5), "keep=1.5"), (dict(layers=(9,)), "0 to 5"),
                           (dict(keeps=0.5), "did you mean keep")):
        with pytest.raises(SaccadeError, match=words):
            apply(model, "evit", **({"layers": (1,)} | options))
    with pytest.raises(SaccadeError, match="no class token|has none"):
        apply(timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg"), "evit")
    apply(model, "evit", layers=(1,))
    with pytest.raises(SaccadeError, match="undo it first"):
        apply(model, "evit", layers=(1,))
    with pytest.raises(SaccadeError, match="lets tokens go"):
        model.features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(SaccadeError, match="token reduction method 'evitt'; did you mean evit"):
        apply(model, "evitt")
