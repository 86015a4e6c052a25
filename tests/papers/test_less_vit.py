"""What goldens of LESS attention do not show: one attention to all pairs, the perception field, bad numbers."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.papers.less_vit import LessAttention, LowRankAttention, perception_field
from tests.contracts.registered import randomised


def test_one_rank_is_attention_among_all_pairs_with_the_product_of_weights():
    layer = randomised(LowRankAttention(8, 1, 2, 4)).double()
    layer.proj = torch.nn.Identity()
    bands, places = torch.randn(1, 3, 2, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)

    def weights_and_values(branch, x):
        q, k = branch.qk(x).chunk(2, -1)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[0], branch.v(x)[0]

    with torch.no_grad():
        (A, V), (B, W) = (weights_and_values(branch, x) for branch, x in
                          ((layer.channel_branch, bands), (layer.spatial_branch, places)))
        wanted = torch.kron(A, B) @ torch.kron(V, W)
        torch.testing.assert_close(layer(bands, places)[0].flatten(0, 1), wanted)


def test_perception_field_in_loops():
    mask = perception_field((4, 5), 2.5, torch.float32, torch.device("cpu"))
    for i in range(20):
        for j in range(20):
            near = (i // 5 - j // 5) ** 2 + (i % 5 - j % 5) ** 2 <= 2.5**2
            assert float(mask[i, j]) == (0 if near else -torch.inf)


def test_a_field_as_wide_as_the_grid_is_none():
    mixer = randomised(LessAttention(Site(16, 2, grid=(3, 4, 4)))).eval()
    x = torch.randn(2, 3, 4, 4, 16)
    with torch.no_grad():
        free = mixer(x)
        mixer.field = 9.0
        torch.testing.assert_close(mixer(x), free)
        mixer.field = 1.0
        assert (mixer(x) - free).abs().max() > 1e-3


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="product is 2 x 8"):
        LowRankAttention(8, 2, 4, 8)
    with pytest.raises(SaccadeError, match="head_bands=3"):
        LessAttention(Site(16, 2), head_bands=3)


def network(**options):
    torch.manual_seed(0)
    return randomised(create_model("less_vit_nano", num_classes=3, **options)).double().eval()


def bands(count, side=16):
    return torch.randn(1, count, side, side, dtype=torch.float64)


def test_the_order_of_bands_does_not_count_their_wavelengths_do():
    model, image, waves = network(), bands(5), (443.0, 665.0, 842.0, 1610.0, 2190.0)
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        scores = model(image, wavelengths=waves)
        turned = model(image[:, order], wavelengths=[waves[place] for place in order])
        other = model(image[:, order], wavelengths=waves)
    torch.testing.assert_close(turned, scores, rtol=1e-9, atol=1e-9)
    assert (other - scores).abs().max() > 1e-3


def test_codes_in_loops():
    """Half the code of a band where there is one, half that of a place where there is one."""
    model = network(wavelengths=(443.0, 665.0), in_chans=2, resolution=30)
    code = model.codes(2, (2, 3), torch.zeros(1, 16, dtype=torch.float64))

    def wave(step, dim):
        angles = [step / 10000 ** (2 * i / dim) for i in range(dim // 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    assert code.shape == (3, 7, 16) and not code[0, 0].any()
    for a, nm in enumerate((443.0, 665.0)):
        torch.testing.assert_close(code[1 + a, 0], wave(nm, 16) / 2)
        for n in range(6):
            place = torch.cat([wave(30.0 * (n % 3), 8), wave(30.0 * (n // 3), 8)]) / 2
            torch.testing.assert_close(code[0, 1 + n], place)
            torch.testing.assert_close(code[1 + a, 1 + n], place + wave(nm, 16) / 2)


def test_the_field_hides_far_places_from_each_other_and_nothing_from_class_tokens():
    model, x = network(field=85.0), torch.zeros(1)
    mask = model.mask((3, 4), x)  # patches of 4 pixels of 10 m: two steps and a half reach 100 m
    for i in range(12):
        for j in range(12):
            metres = 40 * math.dist((i // 4, i % 4), (j // 4, j % 4))
            assert float(mask[1 + i, 1 + j]) == (0 if metres <= 85 else -torch.inf)
    assert not mask[0].any() and not mask[:, 0].any()
    assert torch.equal(model.mask((3, 4), x, resolution=1000.0)[1:, 1:] == 0, torch.eye(12, dtype=torch.bool))
    image, wide = bands(3, 32), network(field=1e6)
    wide.load_state_dict(model.state_dict())
    plain = network()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(wide(image), plain(image))
        assert (model(image) - plain(image)).abs().max() > 1e-3


def test_radar_adds_bands():
    model, image, radar = network(radar=True, global_pool=""), bands(3), bands(2)
    waves = (665.0, 560.0, 490.0, 5.5e7, 5.5e7)
    with torch.no_grad():
        tokens = model.forward_features(image, radar=radar, wavelengths=waves)
        equal = model.stem(radar), model.radar_stem(radar)
        patches = model.patches(image, radar)
    assert tokens.shape == (1, 6, 17, 32)
    assert torch.equal(patches[:, 3:], equal[1]) and not torch.equal(*equal)
    with pytest.raises(SaccadeError, match="5 bands and 3 wavelengths"):
        model(image, radar=radar)
    with pytest.raises(SaccadeError, match="radar=True"):
        network()(image, radar=radar)


def test_bands_of_any_number_load_one_checkpoint(tmp_path):
    """No weight belongs to a band; a head of another class count prints what to write."""
    model = network()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = create_model("less_vit_nano", num_classes=3, in_chans=7, checkpoint_path=tmp_path / "w.pt").double().eval()
    image = bands(3)
    with torch.no_grad():
        torch.testing.assert_close(again(image, wavelengths=model.wavelengths), model(image))
    with pytest.raises(SaccadeError, match="fresh="):
        create_model("less_vit_nano", num_classes=5, checkpoint_path=tmp_path / "w.pt")
    assert create_model("less_vit_nano", num_classes=0, checkpoint_path=tmp_path / "w.pt").load_report.dropped
