"""What AFFNet's goldens do not show: published arithmetic, and what the filter is."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.core.index import index
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


@pytest.mark.parametrize("name", ["affnet_et", "affnet_t", "affnet"])
def test_published_multiply_adds(name):
    """To the one digit after the point that the authors print."""
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 256, 256)
    assert count_macs(model, (image,)) == pytest.approx(index()["papers"]["affnet"]["macs"][name], abs=0.05e9)


def test_the_filter_is_made_of_the_spectrum_phase_and_all_and_shrunk():
    mixer = randomised(create_mixer("adaptive_frequency_filter", Site(16, grid=(4, 6)), blocks=4)).double()
    x = torch.randn(1, 4, 6, 16, dtype=torch.float64)
    rolled = x.roll((1, 2), (1, 2))
    with torch.no_grad():
        # The spectrum of a moved image differs in phase, and the filter sees phase: it does not simply move along.
        assert not torch.allclose(mixer(rolled), mixer(x).roll((1, 2), (1, 2)))
        # Weights of zero leave a filter of the shrunk bias alone: a multiple of the image, added to it.
        for weight in (mixer.w1, mixer.w2):
            weight.zero_()
        mixer.b2.zero_()
        mixer.b2[0] = 0.51
        torch.testing.assert_close(mixer(x), 1.5 * x)
        mixer.b2.fill_(0.01)  # weaker than the threshold
        torch.testing.assert_close(mixer(x), x)


def test_blocks_that_do_not_divide_are_one_line():
    with pytest.raises(SaccadeError, match="blocks=8 do not divide 20 channels"):
        create_mixer("adaptive_frequency_filter", Site(20))
