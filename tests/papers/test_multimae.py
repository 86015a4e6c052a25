"""MultiMAE: how the visible are drawn, what is hidden is not seen, each loss by loops, missing modalities."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.multimae import CLASSES, MultiMAE

ALL = ("rgb", "depth", "semseg")


def small(modalities=ALL, **options):
    return MultiMAE(create_model("multivit_nano", modalities=modalities, num_classes=0), dim=32, depth=1, heads=2,
                    **options)


def scene(batch=2, height=32, width=24):
    return {"rgb": torch.randn(batch, 3, height, width), "depth": torch.randn(batch, 1, height, width),
            "semseg": torch.randint(CLASSES, (batch, height // 4, width // 4))}


def test_visible_tokens_are_shared_by_dirichlet():
    torch.manual_seed(0)
    shares = {}
    for alpha in (0.1, 1.0, 1e4):
        seen = small(ratio=0.75, alpha=alpha).draw(2000, 3, 20, torch.device("cpu"))
        assert seen.shape == (2000, 15) and (seen.diff(dim=1) > 0).all()
        shares[alpha] = torch.stack([((seen >= 20 * n) & (seen < 20 * (n + 1))).sum(1) for n in range(3)], 1) / 15
        assert shares[alpha].mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert shares[1e4].std(0).max() < 0.04
    # Var = (1/3)(2/3) / (3 alpha + 1): a quarter of 2/9 at alpha = 1, nearly all of it at 0.1.
    assert shares[1.0].var(0).mean() == pytest.approx(2 / 9 / 4, rel=0.1)
    assert shares[0.1].var(0).mean() == pytest.approx(2 / 9 / 1.3, rel=0.1)


def test_what_is_hidden_is_not_seen():
    torch.manual_seed(0)
    method, inputs = small().eval(), scene()
    seen = torch.tensor([[0, 5, 13, 30], [2, 12, 23, 35]])  # of 3 x 12 patches
    first, _ = method.guesses(inputs, seen)
    other = scene()
    for row in range(2):
        for place in seen[row].tolist():
            name, (y, x) = ALL[place // 12], divmod(place % 12, 3)
            side = 2 if name == "semseg" else 8
            at = (row, ..., slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side))
            other[name][at] = inputs[name][at]
    second, _ = method.guesses(other, seen)
    for name in ALL:
        torch.testing.assert_close(first[name], second[name])


def test_losses_by_loops():
    torch.manual_seed(0)
    method, inputs = small().eval(), scene(1)
    guesses, seen = method.guesses(inputs)
    method.draw = lambda *_: seen
    out = method(inputs)
    pictures = method.pictures(guesses, (4, 3))
    assert pictures["semseg"].shape == (1, CLASSES, 8, 6)
    each = {name: [] for name in ALL}
    for place in set(range(36)) - set(seen[0].tolist()):
        name, (y, x) = ALL[place // 12], divmod(place % 12, 3)
        side = 2 if name == "semseg" else 8
        rows, columns = slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side)
        guess, truth = pictures[name][0, :, rows, columns], inputs[name][0, ..., rows, columns]
        if name == "semseg":
            each[name].append(torch.nn.functional.cross_entropy(guess[None], truth[None]))
        elif name == "depth":
            each[name].append((guess - truth).abs().mean())
        else:
            each[name].append((guess - (truth - truth.mean()) / (truth.var() + 1e-6).sqrt()).square().mean())
    for name in ALL:
        torch.testing.assert_close(out[name], torch.stack(each[name]).mean())
    torch.testing.assert_close(out["loss"], sum(out[name] for name in ALL))


def test_missing_modalities():
    torch.manual_seed(0)
    method, inputs = small().eval(), scene()
    guesses, _ = method.guesses({"depth": inputs["depth"]})
    assert {name: tuple(value.shape) for name, value in guesses.items()} == {
        "rgb": (2, 12, 192), "depth": (2, 12, 64), "semseg": (2, 12, CLASSES * 4)}
    assert set(method({"depth": inputs["depth"]})) == {"loss", "depth"}
    model = create_model("multivit_nano", modalities=ALL, num_classes=5).eval()
    both, alone = model({"rgb": inputs["rgb"], "depth": inputs["depth"]}), model(inputs["rgb"])
    assert both.shape == alone.shape == (2, 5) and (both - alone).abs().max() > 1e-3
    torch.testing.assert_close(alone, model({"rgb": inputs["rgb"]}))
    order = {"depth": inputs["depth"], "rgb": inputs["rgb"]}
    torch.testing.assert_close(both, model(order))


def test_one_modality_tells_another():
    """Depth is the picture's first channel: with all of the picture and nothing of the depth, the loss falls."""
    torch.manual_seed(0)
    method = small(("rgb", "depth"), ratio=0.5)
    ramp = torch.linspace(-1, 1, 32)
    rgb = torch.stack([(ramp[:, None] * a + ramp * b).expand(3, 32, 32) for a, b in torch.randn(16, 2)])
    method.draw = lambda batch, given, count, device: torch.arange(count).expand(batch, -1)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        out = method({"rgb": rgb, "depth": rgb[:, :1]})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["depth"].item())
    assert losses[-1] < 0.4 * losses[0]


def test_bad_input():
    inputs = scene()
    with pytest.raises(SaccadeError, match="different sizes"):
        small()({"rgb": inputs["rgb"], "depth": inputs["depth"][..., :16]})
    with pytest.raises(SaccadeError, match=r"\['thermal'\]"):
        small()({"thermal": inputs["depth"]})
    with pytest.raises(SaccadeError, match="multivit_base"):
        MultiMAE(create_model("deit_nano"))
    with pytest.raises(SaccadeError, match="choose some of rgb, depth, semseg"):
        create_model("multivit_nano", modalities=("thermal",))
