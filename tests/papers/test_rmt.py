"""Manhattan self-attention against loops, its decay, its grids, its recorded map; the networks against their table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.core.keymap import rename
from saccade.ops.rotary import rotate
from saccade.papers.rmt import AUTHORS, CARD, ManhattanAttention

GRIDS = [(5, 7), (1, 6), (6, 1), (1, 1), (4, 4)]


def build(decomposed: bool, grid: tuple[int, ...] = (5, 7), **options) -> ManhattanAttention:
    torch.manual_seed(0)
    return create_mixer("manhattan", Site(16, 2, grid=grid), decomposed=decomposed, **options).double().eval()


def turned(vector: Tensor, number: int) -> Tensor:
    """A token's query or key, each pair turned by number * 10000^(-i / (pairs - 1))."""
    result, pairs = vector.clone(), len(vector) // 2
    for i in range(pairs):
        angle = number * 10000 ** (-i / (pairs - 1))
        a, b = float(vector[2 * i]), float(vector[2 * i + 1])
        result[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        result[2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return result


def by_loops(mixer: ManhattanAttention, x: Tensor, initial: float, span: float) -> Tensor:
    """One image (H, W, C), token after token, from the formula."""
    H, W, C = x.shape
    d, places = C // mixer.heads, [(row, column) for row in range(H) for column in range(W)]
    q, k, v = mixer.qkv(x).chunk(3, -1)
    mixed = torch.zeros_like(v)

    def attention(head: int, values: dict, here: tuple[int, int], line: list[tuple[int, int]]) -> Tensor:
        gamma = 1 - 2 ** (-initial - span * head / mixer.heads)
        part = slice(head * d, head * d + d)
        query = turned(q[here][part], here[0] * W + here[1])
        weights = []
        for there in line:
            key = turned(k[there][part] / math.sqrt(d), there[0] * W + there[1])
            distance = abs(here[0] - there[0]) + abs(here[1] - there[1])
            weights.append(math.exp(float(query @ key)) * gamma**distance)
        return sum(weight * values[there] for weight, there in zip(weights, line)) / sum(weights)

    for head in range(mixer.heads):
        values = {place: v[place][head * d : head * d + d] for place in places}
        if mixer.decomposed:
            values = {(y, x): attention(head, values, (y, x), [(y, at) for at in range(W)]) for y, x in places}
            values = {(y, x): attention(head, values, (y, x), [(at, x) for at in range(H)]) for y, x in places}
        else:
            values = {place: attention(head, values, place, places) for place in places}
        for place in places:
            mixed[place][head * d : head * d + d] = values[place]
    local = torch.zeros_like(v)
    for row, column in places:
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                if 0 <= row + dy < H and 0 <= column + dx < W:
                    local[row, column] += mixer.local.weight[:, 0, dy + 2, dx + 2] * v[row + dy, column + dx]
    return mixer.proj(mixed + local + mixer.local.bias)


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_against_loops(grid, decomposed):
    """Any grid, whatever the native one."""
    mixer = build(decomposed, initial=1.5, span=3)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([by_loops(mixer, image, 1.5, 3) for image in x])
        torch.testing.assert_close(mixer(x), wanted, rtol=1e-6, atol=1e-6)  # angles are float32


def test_full_and_decomposed_agree_on_a_line():
    """With one axis there is nothing to decompose; a row of an image is a sequence."""
    x = torch.randn(2, 1, 9, 16, dtype=torch.float64)
    full, decomposed = build(False), build(True)
    sequence = build(True, grid=(9,))
    state = full.state_dict()
    sequence.load_state_dict(state | {"local.weight": state["local.weight"][:, :, 2]})
    with torch.no_grad():
        torch.testing.assert_close(decomposed(x), full(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sequence(x[:, 0]), full(x)[:, 0], rtol=1e-9, atol=1e-9)


def test_decomposed_without_content_is_full():
    """With q = 0 only the decay is left, and it is a product over axes: both forms are the same map."""
    full, decomposed = build(False), build(True)
    for mixer in (full, decomposed):
        with torch.no_grad():
            mixer.qkv.weight[:16] = 0
            mixer.qkv.bias[:16] = 0
    x = torch.randn(1, 5, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(decomposed(x), full(x), rtol=1e-12, atol=1e-12)


def test_volumes():
    mixer = build(True, grid=(3, 4, 5))
    x = torch.randn(1, 2, 5, 3, 16, dtype=torch.float64)
    assert mixer(x).shape == x.shape
    assert build(False, grid=(3, 4, 5))(x).shape == x.shape


def test_decay_by_distance():
    """Without content the weights fall by gamma a step; heads of higher number see further."""
    mixer = build(False, initial=1, span=2)
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.bias[:32] = 0
    model = torch.nn.Sequential(mixer)
    with torch.no_grad(), record(model) as r:
        model(torch.randn(1, 4, 5, 16, dtype=torch.float64))
    weights = r["0"].dense()[0, :, 0]  # what the first token sees
    for head, gamma in enumerate((1 - 2**-1, 1 - 2**-2)):
        grid = weights[head].view(4, 5) / weights[head, 0]
        for row in range(4):
            for column in range(5):
                assert float(grid[row, column]) == pytest.approx(gamma ** (row + column))


def test_recorded_cross():
    """The decomposed map: rows sum to the number of axes, nothing off the cross."""
    model = torch.nn.Sequential(build(True))
    with torch.no_grad(), record(model) as r:
        model(torch.randn(2, 5, 7, 16, dtype=torch.float64))
    dense = r["0"].dense(batch=2)
    torch.testing.assert_close(dense.sum(-1), torch.full_like(dense.sum(-1), 2))
    row, column = torch.arange(35) // 7, torch.arange(35) % 7
    cross = (row[:, None] == row) | (column[:, None] == column)
    assert ((dense > 0) == cross).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_both_forms_of_rotation(kind, monkeypatch):
    """The complex product and the real form which compilers and half precision take; gradients too."""
    x = torch.randn(2, 3, 5, 2, 2, 8, dtype=kind, requires_grad=True)
    weight = torch.randn_like(x)
    complex_form = rotate(x)
    (complex_gradient,) = torch.autograd.grad((complex_form * weight).sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    real_form = rotate(x)
    torch.testing.assert_close(complex_form, real_form)
    torch.testing.assert_close(complex_gradient, torch.autograd.grad((real_form * weight).sum(), x)[0])
    torch.testing.assert_close(real_form.norm(dim=-1), x.norm(dim=-1))


def test_half_precision():
    mixer = build(True).bfloat16()
    x = torch.randn(1, 5, 7, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        out = mixer(x)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_errors():
    with pytest.raises(SaccadeError, match="even heads"):
        create_mixer("manhattan", Site(6, 2))
    with pytest.raises(SaccadeError, match="above 0"):
        create_mixer("manhattan", Site(8, 2), initial=0)


@pytest.mark.parametrize("name", [name for name in CARD.params if not name.endswith("_label")])
def test_parameters_of_the_paper(name):
    """In millions, as the paper rounds them."""
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == CARD.params[name] / 1e6


@pytest.mark.parametrize("name, count", [("rmt_s_label", 27992240), ("rmt_b_label", 54667896),
                                         ("rmt_l_label", 96105864)])
def test_parameters_of_the_authors_logs(name, count):
    """With a second head; a model without classes has neither."""
    with torch.device("meta"):
        assert sum(value.numel() for value in create_model(name).parameters()) == count
        assert create_model(name, num_classes=0).head_aux is None


@pytest.mark.parametrize("labels", ["last", "projected"])
def test_labels_are_scored_token_by_token(labels):
    """With the weights of one without, the scores are the same; a token's labels come from its own place."""
    torch.manual_seed(0)
    model = create_model("rmt_nano", labels=labels, num_classes=4).eval()
    plain, image = create_model("rmt_nano", num_classes=4).eval(), torch.randn(2, 3, 32, 48)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("head_aux")})
    with torch.no_grad():
        last = model.features(image)[-1]
        scores, tokens = model.label_scores(last.movedim(1, -1))
        torch.testing.assert_close(scores, plain(image))
        torch.testing.assert_close(model(image), scores)
        read = last if labels == "last" else model.forward_features(image)
        wanted = torch.einsum("bchw,kc->bhwk", read, model.head_aux.weight) + model.head_aux.bias
        torch.testing.assert_close(tokens.unflatten(1, (4, 6)), wanted)


def test_authors_names_of_layer_scale_and_buffers():
    """Factors a channel may come as (1, 1, 1, C); angles and decays follow from the settings."""
    gamma = torch.rand(1, 1, 1, 8)
    renamed = rename({"layers.2.blocks.1.gamma_2": gamma, "layers.0.Relpos.decay": torch.zeros(2)}, AUTHORS)
    model = create_model("rmt_nano", layer_scales=(None, None, 1e-6))
    assert set(renamed.state) <= set(model.state_dict()) and list(renamed.dropped) == ["layers.0.Relpos.decay"]
    assert torch.equal(renamed.state["stages.2.blocks.1.scale2.0.gamma"], gamma.flatten())


@pytest.mark.parametrize("size", [(32, 32), (41, 29), (7, 33), (1, 1)])
def test_nano_any_size(size):
    model = create_model("rmt_nano", num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, *size)).isfinite().all()
        assert model.forward_features(torch.randn(1, 3, *size)).shape[1] == model.num_features == 128
