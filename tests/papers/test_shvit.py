"""What SHViT's goldens do not show: what is left of a model once it is deployed."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.parts.norm import BatchNorm
from saccade.parts.reparameterize import reparameterize
from tests.contracts.registered import randomised


def test_deployed_has_no_batch_norm_and_equal_outputs():
    model = randomised(create_model("shvit_nano", num_classes=5)).double().eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    deployed, image = reparameterize(model), torch.randn(2, 3, 41, 29, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(image), model(image))
    assert not any(isinstance(module, BatchNorm) for module in deployed.modules())
    assert any(isinstance(module, BatchNorm) for module in model.modules())


def test_a_model_in_training_is_refused():
    with pytest.raises(SaccadeError, match="training mode.*eval()"):
        reparameterize(create_model("shvit_nano"))
