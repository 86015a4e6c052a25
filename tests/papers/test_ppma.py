"""The path mask against walks along the paths, both forms of the attention against it, the recorded maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import SaccadeError, Site, create_mixer, record
from saccade.ops.rotary import rotate
from saccade.papers.ppma import PolylinePath, path_mask


def build(decomposed: bool) -> PolylinePath:
    torch.manual_seed(0)
    return create_mixer("polyline_path", Site(16, 2, grid=(4, 3)), decomposed=decomposed).double().eval()


def steps(mixer: PolylinePath, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, beta (B, H, W, heads): how much a path loses at a token, along its row and along its column."""
    length = F.softplus(mixer.steps(x.unflatten(-1, (2, -1))) + mixer.step_bias[:, None])
    return (length * -mixer.log_rate.exp()[:, None]).unbind(-1)


def walked(alpha: Tensor, beta: Tensor, here: tuple[int, int], there: tuple[int, int]) -> float:
    """What a path from `here` along its row, then along the column of `there`, has lost: alpha, beta (H, W)."""
    (y, x), (to_y, to_x) = here, there
    row = sum(float(alpha[y, at]) for at in range(min(x, to_x) + 1, max(x, to_x) + 1))
    return row + sum(float(beta[at, to_x]) for at in range(min(y, to_y) + 1, max(y, to_y) + 1))


def test_mask_is_what_the_paths_lose():
    mixer, x = build(False), torch.randn(2, 4, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        mask = path_mask(*mixer.masks(x))
        alpha, beta = steps(mixer, x)
    assert mask.shape == (2, 2, 12, 12) and (mask <= 0).all()
    for i in range(12):
        for j in range(12):
            wanted = walked(alpha[1, ..., 1], beta[1, ..., 1], divmod(i, 3), divmod(j, 3))
            assert float(mask[1, 1, i, j]) == pytest.approx(wanted, abs=1e-12)


def test_whole_attention_is_the_mean_under_the_mask_and_its_transpose():
    """Against the N x N mask that no forward builds; the recorded map is that mean."""
    model, x = torch.nn.Sequential(build(False)), torch.randn(2, 4, 3, 16, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    mixer = model[0]
    mixer.register_forward_pre_hook(lambda module, inputs: seen.update(mask=path_mask(*mixer.masks(inputs[0]))))
    with torch.no_grad(), record(model) as r:
        watched = model(x)
    with torch.no_grad():
        torch.testing.assert_close(watched, model(x), rtol=1e-12, atol=1e-12)
        qkv = mixer.qkv(x).unflatten(-1, (3, 2, -1))
        q, k = (part.flatten(1, 2).transpose(1, 2) for part in rotate(qkv[..., :2, :, :]).unbind(-3))
        logits = q @ k.transpose(-2, -1) * 8**-0.5
        mask = seen["mask"]
        wanted = ((logits + mask).softmax(-1) + (logits + mask.transpose(-2, -1)).softmax(-1)) / 2
    torch.testing.assert_close(r["0"].dense(batch=2), wanted, rtol=1e-6, atol=1e-8)  # angles are float32


def test_decomposed_equals_whole_on_a_line():
    """On one row there is one path, and both orders of the axes walk it."""
    x = torch.randn(2, 1, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(build(True)(x), build(False)(x), rtol=1e-12, atol=1e-12)


def test_errors():
    with pytest.raises(SaccadeError, match="even heads"):
        create_mixer("polyline_path", Site(6, 2))
    with pytest.raises(SaccadeError, match="rows and columns"):
        create_mixer("polyline_path", Site(16, 2, grid=(4, 4, 4)))
