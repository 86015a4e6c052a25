"""The claim of the benchmark: a narrow network, trained in minutes on bundled pictures, beats the bicubic resize."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import restoration
from saccade.tools.watch import Watch


def test_no_picture_is_on_both_sides():
    assert not set(restoration.TRAINED_ON) & set(restoration.HELD_OUT)


@pytest.mark.slow
def test_beats_bicubic_by_0_8_db(tmp_path):
    pytest.importorskip("skimage")
    rows = restoration.measure(restoration.train(restoration.STEPS, tmp_path, Watch()), tmp_path)
    assert np.mean([restoration.gain(row, "y") for row in rows]) >= 0.8
    assert min(restoration.gain(row, "y") for row in rows) > 0
