"""The contracts of backbones, put to a model that predicts frames, and what PredFormer's goldens do not show."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx.experimental._config as fx_config

from saccade import SaccadeError, create_model, load
from saccade.papers.predformer import CARD, SIZES, VARIANTS, authors_names, sinusoid
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def narrow(variant="tsst", **options):
    """Four frames of two channels, patches of four."""
    torch.manual_seed(0)
    settings = dict(dim=16, heads=2, ratio=2, depth=1, img_size=(2, 12, 16)) | options
    return randomised(create_model(f"predformer_{variant}_taxibj", **settings)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 2, 12, 16), (3, 2, 13, 7), (1, 2, 5, 3)])
def test_any_number_of_frames_of_any_size(variant, shape):
    frames = torch.randn(2, *shape)
    with torch.no_grad():
        out = narrow(variant)(frames)
    assert out.shape == frames.shape and out.isfinite().all() and out.is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    model = narrow(variant, drop_path_rate=0.1).train()
    out = model(torch.randn(3, 4, 2, 12, 16))
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, value in model.named_parameters()
            if value.grad is None or not value.grad.isfinite().all() or value.grad.abs().max() == 0] == []


def test_batch_elements_do_not_meet_and_nothing_is_random():
    model, frames = narrow(drop_path_rate=0.3).double(), torch.randn(3, 4, 2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        out = model(frames)
        torch.testing.assert_close(out[1:2], model(frames[1:2]), rtol=1e-9, atol=1e-9)
        assert torch.equal(out, model(frames)) and torch.equal(out, copy.deepcopy(model)(frames))
        assert torch.equal(out, pickle.loads(pickle.dumps(model))(frames))


def test_maps_of_every_transformer():
    model = narrow("triplet_sts", depth=2)
    chosen = create_model("predformer_triplet_sts_taxibj", features_only=True, out_indices=(1, -1), dim=16, heads=2,
                          ratio=2, depth=2, img_size=(2, 12, 16)).eval()
    chosen.model.load_state_dict({key: value for key, value in model.state_dict().items() if "head" not in key})
    frames = torch.randn(2, 4, 2, 12, 16)
    with torch.no_grad():
        maps = model.features(frames)
        assert [tuple(value.shape) for value in maps] == [(2, 16, 4, 3, 4)] * 6
        assert model.feature_info.channels() == [16] * 6 and model.feature_info.reduction() == [4] * 6
        for ours, wanted in zip(chosen(frames), (maps[1], maps[5])):
            torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(model.forward_head(model.forward_features(frames)), model(frames))


@pytest.mark.parametrize(("variant", "far"), [("fac_st", True), ("full", True), ("s", False), ("t", False)])
def test_who_meets_whom(variant, far):
    """A change in one patch of one frame reaches all frames and places; a single transformer only its own axis."""
    model = narrow("fac_st" if variant in "st" else variant).double()
    if variant in "st":
        model.blocks[0] = model.blocks[0]["st".index(variant):][:1]
    frames = torch.randn(1, 4, 2, 12, 16, dtype=torch.float64)
    moved = frames.clone()
    moved[0, 1, :, :4, :4] += 1
    with torch.no_grad():
        change = (model(moved) - model(frames)).abs().amax(2)[0]
    other_frame, other_place = float(change[3, :4, :4].max()), float(change[1, 8:, 12:].max())
    assert float(change[1, :4, :4].max()) > 0
    assert (other_frame > 1e-9) == (variant != "s") and (other_place > 1e-9) == (variant != "t")
    assert (float(change[3, 8:, 12:].max()) > 1e-9) == far


def test_position_of_a_token_is_its_number():
    table = sinusoid(6, 4, torch.float64, torch.device("cpu"))
    for place in range(6):
        wanted = [torch.tensor(place / rate, dtype=torch.float64) for rate in (1, 100)]
        expected = torch.stack([part for angle in wanted for part in (angle.sin(), angle.cos())])
        torch.testing.assert_close(table[place], expected)
    model = narrow()
    with torch.no_grad():
        blank = model.stem(torch.zeros(1, 4, 2, 12, 16)) - model.stem.proj.bias
    torch.testing.assert_close(blank[0, 2, 1, 3], sinusoid(48, 16, torch.float32, torch.device("cpu"))[2 * 12 + 4 + 3])


def test_a_long_forecast_feeds_on_itself():
    model, frames = narrow(), torch.randn(1, 4, 2, 12, 16)
    with torch.no_grad():
        first = model(frames)
        torch.testing.assert_close(model.forecast(frames, 3), first[:, :3])
        torch.testing.assert_close(model.forecast(frames, 6), torch.cat([first, model(first)[:, :2]], 1))


@pytest.mark.parametrize("variant", ["tsst", "full"])
def test_exported_once_and_compiled(variant):
    model = narrow(variant)
    auto = torch.export.Dim.AUTO
    sides = (torch.export.Dim("height", min=8, max=64), torch.export.Dim("width", min=8, max=64))
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 4, 2, 20, 28),),
                                      dynamic_shapes=({0: auto, 1: auto, 3: sides[0], 4: sides[1]},))
        for shape in [(2, 4, 2, 20, 28), (1, 3, 2, 13, 9), (3, 6, 2, 16, 16)]:
            frames = torch.randn(*shape)
            torch.testing.assert_close(program.module()(frames), model(frames), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        compiled, frames = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(1, 4, 2, 12, 15)
        torch.testing.assert_close(compiled(frames), model(frames), rtol=1e-4, atol=1e-4)


def test_other_mixers_along_time_and_space():
    model = create_model("predformer_tsst_taxibj", dim=16, heads=2, mixer={"blocks.0.*": "neighborhood"})
    assert type(model.blocks[0][0].layers[0].mixer).__name__ == "Neighborhood"
    assert type(model.blocks[1][0].layers[0].mixer).__name__ == "FrameAttention"
    assert model(torch.randn(1, 4, 2, 20, 9)).shape == (1, 4, 2, 20, 9)
    with pytest.raises(SaccadeError, match="matches no block"):
        create_model("predformer_tsst_taxibj", mixer={"blocks.9.*": "pooling"})


def test_a_head_left_out_and_put_back(tmp_path):
    model, frames = narrow(), torch.randn(1, 4, 2, 12, 16)
    bare = create_model("predformer_tsst_taxibj", dim=16, heads=2, ratio=2, depth=1, num_classes=0).eval()
    report = load(bare, model.state_dict())
    assert sorted(report.dropped) == sorted(key for key in model.state_dict() if key.startswith("head"))
    with torch.no_grad():
        torch.testing.assert_close(bare(frames), model.features(frames)[-1])
    bare.reset_head()
    assert bare(frames).shape == frames.shape


def test_variants_share_their_layers():
    """As many layers in every variant of a data set (three do not divide eight: nine), none named twice."""
    for name, size in SIZES.items():
        count = sum(key.endswith("mixer.qkv.weight") for key in create_meta(name).state_dict())
        wanted = {"mmnist": 24, "taxibj": 8, "weather": 8, "human": 12}[name.rpartition("_")[2]]
        assert count == wanted + (size["variant"].startswith("triplet") and wanted == 8), name
        assert len(set(authors_names(size["variant"]))) == len(authors_names(size["variant"]))


def create_meta(name):
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    size = SIZES[name]
    frames = torch.empty(1, size["in_chans"], *size["img_size"], device="meta")
    assert count_macs(create_meta(name), (frames,)) == pytest.approx(CARD.macs[name], rel=0.01)


@pytest.mark.parametrize(("options", "said"), [
    (dict(num_classes=10), "predicts frames"), (dict(img_size=64), "channels, height, width"),
    (dict(img_size=(32, 32)), "channels, height, width"), (dict(variant="ttt"), "choose one of full")])
def test_what_makes_no_sense_is_one_line(options, said):
    with pytest.raises(SaccadeError, match=said):
        create_model("predformer_tsst_taxibj", **options)
