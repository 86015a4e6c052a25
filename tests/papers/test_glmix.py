"""GLNet's token labels and the number of slots."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model


def test_token_labels_add_half_the_best_token():
    model = create_model("glmix_nano", token_labels=True, num_classes=5).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(image).flatten(2).mT
        fc, tokens = model.head.fc, model.head.fc.tokens
        wanted = features.mean(1) @ fc.weight.T + fc.bias + 0.5 * (features @ tokens.weight.T + tokens.bias).amax(1)
        torch.testing.assert_close(model(image), wanted)
    model.reset_classifier(0)
    assert model(image).shape == (2, 128)


@pytest.mark.parametrize("grid", [(40,), (9, 7), (4, 5, 6)])
def test_every_rank(grid):
    mixer = create_mixer("glmix", Site(32, 2, grid=grid), slots=64)
    x = torch.randn(2, *grid, 32)
    assert mixer(x).shape == x.shape and mixer.seeds(x).shape == (2, 64, 32)


def test_a_number_of_slots_without_a_grid():
    with pytest.raises(SaccadeError, match="slots=10: .* choose 9"):
        create_mixer("glmix", Site(32, 2), slots=10)
    assert create_mixer("glmix", Site(32, 2), slots=10, learned=True).seeds(torch.zeros(1, 4, 4, 32)).shape[1] == 10
