"""The plain form beside which restoration is measured is the same function, written out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.restoration_speed import plain
from saccade.papers.hat import hat
from saccade.papers.rgt import rgt
from saccade.tools.measure import peak_memory
from tests.contracts.registered import randomised


@pytest.mark.parametrize("make", [
    lambda: hat(2, dim=16, depths=(2,), heads=(2,), window=16, compress=2, squeeze=4),
    lambda: rgt(2, (4,), dim=16, heads=4, window=(8, 32)),
])
def test_plain_form_holds_the_weights_of_all_windows(make):
    torch.manual_seed(0)
    model, image = randomised(make()).eval(), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(plain(model, image), model(image), rtol=1e-4, atol=1e-5)
        fused, written = (peak_memory(lambda: run(model, image)) for run in (lambda net, x: net(x), plain))  # noqa: B023
    of_all = 2 * 64**2 * 256 * 4  # bytes of the weights: two heads (RGT: a half's), 256 keys a token
    assert written > 2 * of_all and fused < written / 2
